"""Which value stands for which: within a pass, and through passes that only mean well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir import Change, Program, Rewriter, capture
from planish.ir.compare import measure
from planish.ir.execute import run
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.debug.ancestry import Notes, follow, origins
from planish.passes.debug.attribution import attribute
from planish.passes.debug.lineage import stands
from planish.passes.fold.fold_batch_norm import FoldBatchNorm
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.steps import NodeError
from tests.support.example_passes import RoundWeights, SwapActivation, calling

aten = torch.ops.aten


class ConvNorm(nn.Module):
    """A batch norm behind one convolution and before another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        nn.init.uniform_(self.norm.weight, 2, 4)
        nn.init.normal_(self.norm.bias)
        self.norm.running_mean = torch.randn(6)
        self.norm.running_var = 1 + torch.rand(6)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))))


class NormFirst(ConvNorm):
    """The batch norm moves into what reads it; the value that it read stays."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.relu(self.first(x))))


def captured(module: nn.Module) -> Program:
    return capture(module.eval(), (torch.randn(2, 3, 8, 8),))


def ran(program: Program, *passes: Pass) -> Run:
    return run_pipeline(program, Recipe(passes), PassContext(), default_instruments())


def values(program: Program) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    run(program, program.samples[0], observe=lambda node, value: seen.update({node.name: value}))
    return seen


def rows(found: Run, step: int) -> dict[tuple[str, str | None], NodeError]:
    return {(e.node, e.constant): e for e in found.records[step].node_errors}


def test_behind_a_folded_norm_the_layer_stands_for_the_norm() -> None:
    program = captured(ConvNorm())
    found = ran(program, FoldBatchNorm(), RoundWeights(step=1 / 32))
    old, new = values(program), values(found.program)
    folded = [n.name for n in found.program.operators if n.target is aten.conv2d.default]
    error = rows(found, 1)[folded[0], "first.weight"]
    assert error.cumulative == measure((old["batch_norm"],), (new[folded[0]],))
    assert error.cumulative is not None
    assert error.cumulative.sqnr_db > 20
    assert measure((old["conv2d"],), (new[folded[0]],)).sqnr_db < 10


def test_a_value_that_only_inherited_a_place_does_not_stand_for_it() -> None:
    program = captured(NormFirst())
    found = ran(program, FoldBatchNorm(), SwapLossy(), RoundWeights(step=1 / 32))
    swapped = found.records[1].node_errors[0]
    # The pass let the users of the norm read relu, whose value is another one.
    assert (swapped.node, swapped.replaces) == ("clamp_min_default", "relu")
    assert swapped.cumulative is not None
    assert swapped.cumulative.equal
    old, new = values(program), values(found.program)
    last = rows(found, 2)["conv2d_default", "second.weight"]
    assert last.cumulative == measure((old["conv2d_1"],), (new["conv2d_default"],))


class SwapLossy(SwapActivation):
    """The same rewrite, but nothing is promised."""

    contract = Contract.LOSSY


def test_two_lossy_passes_add_up_and_are_told_apart() -> None:
    program = captured(ConvNorm())
    first, second = RoundWeights(step=1 / 16), RoundWeights(step=1 / 4)
    found = ran(program, first, second)
    between = ran(program, first).program
    old, middle, new = (values(p) for p in (program, between, found.program))
    error = rows(found, 1)["conv2d", "first.weight"]
    assert error.local == measure((middle["conv2d"],), (new["conv2d"],))
    assert error.cumulative == measure((old["conv2d"],), (new["conv2d"],))
    assert error.cumulative != error.local
    third = rows(found, 1)["conv2d_1", "second.weight"]
    assert third.local.sqnr_db < third.own.sqnr_db


def test_edits_outside_the_rewriter_are_found_and_measured() -> None:
    def halve(program: Program, context: PassContext) -> PassResult:
        weight = program.constants["second.weight"]
        assert isinstance(weight, Tensor)
        program.constants["second.weight"] = weight / 2
        program.touch()
        return PassResult(program)

    program = captured(ConvNorm())
    found = ran(program, calling(halve, contract=Contract.LOSSY))
    (error,) = found.records[0].node_errors
    assert (error.node, error.constant) == ("conv2d_1", "second.weight")
    old, new = values(program), values(found.program)
    assert error.own == error.local == measure((old["conv2d_1"],), (new["conv2d_1"],))


def test_a_rewrite_that_left_no_value_is_remarked() -> None:
    def behave(program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, "calls", context.sites)
        relu = next(n for n in program.operators if n.name == "relu")
        with rewriter.site("number", relu):
            rewriter.set_args(relu.next, (*_with(relu.next.args, 0, relu.args[0]),))
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    def drop(program: Program, context: PassContext) -> PassResult:
        done = behave(program, context)
        (change,) = done.changes
        bare = Change(change.number, change.rule, change.node, change.removed)
        return PassResult(done.program, (bare,))

    program = captured(ConvNorm())
    assert not ran(program, calling(behave, contract=Contract.LOSSY)).records[0].remarks
    (remark,) = ran(program, calling(drop, contract=Contract.LOSSY)).records[0].remarks
    assert remark == (
        "1 of 1 rewrites left no value that could be measured by itself: number at relu"
    )


def _with(values: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position + 1 :])


# -- parts ----------------------------------------------------------------------------------------


def test_a_new_node_of_an_old_name_does_not_stand_for_the_old_one() -> None:
    program = captured(ConvNorm())
    after = program.clone()
    # As in a later run of a pass: the name became free, and a new node got it.
    taken = Change(9, "new", "relu_1", added=("relu",))
    found = stands(program, after, (taken,))
    by_name = {node.name: node for node in after.operators}
    assert found.partner(by_name["relu"]) is None
    old = found.partner(by_name["relu_1"])
    assert old is not None
    assert old.name == "relu_1"


def test_without_notes_what_was_recorded_is_believed() -> None:
    program = captured(ConvNorm())
    done = FoldBatchNorm().run(program.clone(), PassContext())
    found = stands(program, done.program, done.changes)
    carried = follow(origins(program), found, done.program)
    assert carried["conv2d_default"] == "batch_norm"
    assert carried["relu"] == "relu"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (torch.linspace(-1, 1, 1000), torch.linspace(-1, 1, 1000) + 1e-5, True),
        (torch.linspace(-1, 1, 1000), torch.linspace(-1, 1, 1000) * 1.1, False),
        (torch.ones(3, 4), torch.ones(4, 3), False),
        (torch.ones(3, 4).t(), torch.ones(4, 3), True),
        (torch.arange(5), torch.arange(5), True),
        (torch.arange(5), torch.arange(5) + 1, False),
        (torch.ones(3), torch.tensor([1.0, float("nan"), 1.0]), False),
        (torch.full((3,), torch.inf), torch.full((3,), torch.inf), True),
        (torch.tensor(2.0), torch.tensor(2.0), True),
        (torch.ones(3).bfloat16(), torch.ones(3) + 1e-2, True),
        (torch.ones(0), torch.ones(0), True),
        (torch.ones(2) + 1j, torch.ones(2) - 1j, False),
        ((torch.ones(2), 3), (torch.ones(2), 3), True),
        ((torch.ones(2), 3), (torch.ones(2), 4), False),
        ((torch.ones(2), 3), torch.ones(2), False),
    ],
)
def test_a_few_elements_tell_values_apart(old: Any, new: Any, same: bool) -> None:
    (a, b) = captured(ConvNorm()).operators[:2]
    before, after = Notes(), Notes()
    before.observe(a, old)
    after.observe(b, new)
    assert after.agree(a, before, b) is same
    assert not after.agree(b, before, b)


def test_attribute_takes_equal_names_where_no_lineage_is_given() -> None:
    program = captured(ConvNorm())
    before = RoundWeights(step=1 / 16).run(program.clone(), PassContext()).program
    done = RoundWeights(step=1 / 4).run(before.clone(), PassContext())
    found = attribute(program, before, done.program, done.changes, program.samples)
    assert all(e.cumulative is not None and e.cumulative != e.local for e in found)
