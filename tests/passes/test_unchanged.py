"""Proofs that outputs stay bit for bit: what they show, what they refuse, and what they save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from planish.ir import Change, Program, Rewriter, capture
from planish.ir.errors import VerificationError
from planish.ir.execute import run
from planish.passes import checking
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.instruments import CompareEach
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.unchanged import Proof
from tests.support.example_passes import calling

aten = torch.ops.aten
Edit = Callable[[Rewriter, Program], None]


class Net(nn.Module):
    """Something to rewrite at the beginning, and a long rest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        layers = [nn.Linear(4, 4, bias=False) for _ in range(12)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)  # what is changed before still shows behind
        self.rest = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.relu((x + 0.0) * self.scale)
        return self.rest(low + 2 * low.abs())


@pytest.fixture(scope="module")
def before() -> Program:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch")},)
    return capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes=shapes)


def named(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.name == name)


def edited(before: Program, edit: Edit) -> tuple[Program, tuple[Change, ...]]:
    after = before.clone()
    rewriter = Rewriter(after, "test")
    with rewriter.site("edit", after.operators[0]):
        edit(rewriter, after)
    return rewriter.finish(), tuple(rewriter.changes)


def calls(name: str, target: Any, *more: Any) -> Edit:
    def edit(rewriter: Rewriter, program: Program) -> None:
        node = named(program, name)
        rewriter.insert_before(node)
        rewriter.replace(node, rewriter.call(target, (node.args[0], *more), like=node))

    return edit


def bypass(name: str) -> Edit:
    return lambda rewriter, p: rewriter.replace(named(p, name), named(p, name).args[0])


def new_scale(factor: float) -> Edit:
    def edit(rewriter: Rewriter, program: Program) -> None:
        node = named(program, "p_scale")
        value = program.constant(node)
        assert value is not None
        rewriter.replace(node, rewriter.constant(value * factor, "scale", like=node))

    return edit


def in_place(name: str, *more: Any) -> Edit:
    def edit(rewriter: Rewriter, program: Program) -> None:
        node = named(program, name)
        rewriter.set_args(node, (node.args[0], *more))

    return edit


RIGHT: dict[str, Edit] = {
    "another operator": calls("relu", aten.clamp_min.default, 0),
    "bypassed": bypass("mul"),
    "bypassed to the input": bypass("add"),
    "equal constant": new_scale(1.0),
    "another number": calls("add", aten.add.Tensor, 0),
    "edited in place": in_place("add", 0),
    "replaced by a copy": calls("abs_1", aten.abs.default),
}
WRONG: dict[str, Edit] = {
    "another operator": calls("relu", aten.gelu.default),
    "bypassed": bypass("relu"),
    "other constant": new_scale(1.01),
    "another number": calls("add", aten.add.Tensor, 1e-2),
    "edited in place": in_place("add", 1e-2),
    "another axis": calls("abs_1", aten.softmax.int, 0),
    "frozen batch": calls("relu", aten.expand.default, [3, 4]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_equal_is_shown_to_be(before: Program, name: str) -> None:
    after, changes = edited(before, RIGHT[name])
    proof = Proof(before, after, changes)
    assert proof.possible
    for batch in (3, 5):
        x = (torch.randn(batch, 4),)
        assert proof.holds(x)
        assert torch.equal(run(before, x)[0], run(after, x)[0])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_equal_is_not_shown_and_is_caught(before: Program, name: str) -> None:
    after, changes = edited(before, WRONG[name])
    assert not Proof(before, after, changes).holds((torch.randn(5, 4),))

    def behave(program: Program, context: PassContext) -> PassResult:
        return PassResult(*edited(program, WRONG[name]))

    with pytest.raises(VerificationError):
        run_pipeline(before, Recipe((calling(behave),)), PassContext(), [CompareEach()])


def editing(edit: Edit) -> Pass:
    return calling(lambda program, context: PassResult(*edited(program, edit)))


def test_proofs_save_the_runs_of_all_programs_but_the_last(
    before: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Program] = []

    def counted(program: Program, inputs: Any, observe: Any = None) -> Any:
        ran.append(program)
        return run(program, inputs, observe=observe)

    monkeypatch.setattr(checking, "run", counted)
    names = ("another operator", "equal constant", "bypassed to the input")
    passes = tuple(editing(RIGHT[name]) for name in names)
    found = run_pipeline(before, Recipe(passes), PassContext(), [CompareEach()])
    # The sample and the second probe, whose first answer came with it. What the report says of the
    # result is measured, not inferred.
    assert ran == [before, found.program, found.program]
    for record in found.records:
        assert record.changed
        assert record.fidelity is not None
        assert record.fidelity.equal
        assert record.cumulative == record.fidelity


def test_a_write_behind_a_right_rewrite_is_caught_at_the_end() -> None:
    wide = nn.Sequential(nn.ReLU(), *(nn.Linear(64, 64) for _ in range(8))).eval()
    program = capture(wide, (torch.randn(3, 64),))
    weight = program.constants["7.weight"]
    assert isinstance(weight, Tensor)

    def behave(after: Program, context: PassContext) -> PassResult:
        weight.data[3, 5] += 1e3  # torch does not count it, and most of a tensor is not looked at
        return PassResult(*edited(after, RIGHT["another operator"]))

    with pytest.raises(VerificationError, match="the passes kept what they touched"):
        run_pipeline(program, Recipe((calling(behave),)), PassContext(), [CompareEach()])


def test_changes_near_the_end_are_not_worth_a_proof(before: Program) -> None:
    last = before.operators[-1].name

    def copied(rewriter: Rewriter, program: Program) -> None:
        node = named(program, last)
        rewriter.insert_before(node)
        rewriter.replace(node, rewriter.call(node.target, node.args, like=node))

    after, changes = edited(before, copied)
    assert not Proof(before, after, changes).possible


def test_an_output_that_is_another_value_is_not_shown(before: Program) -> None:
    def cut(rewriter: Rewriter, program: Program) -> None:
        rewriter.set_args(program.output, ((named(program, "linear_3"),),))

    after, _ = edited(before, cut)
    assert not Proof(before, after, ()).possible


def test_an_unrecorded_edit_is_not_shown(before: Program) -> None:
    after = before.clone()
    named(after, "add").args = (named(after, "x"), 0.5)
    assert not Proof(before, after, ()).possible
    weight = before.clone()
    weight.constants["rest.0.weight"] = torch.zeros(4, 4)
    assert not Proof(before, weight, ()).possible


def test_two_claims_about_one_value_do_not_prove_each_other() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.sin(x) * torch.sin(x * 1.0))

    program = capture(Twice().eval(), (torch.randn(3, 4),))
    sines = [n.name for n in program.operators if n.target is aten.sin.default]

    def both(rewriter: Rewriter, p: Program) -> None:
        one, two = (named(p, name) for name in sines)
        rewriter.insert_before(one)
        new = rewriter.call(aten.cos.default, one.args, like=one)
        rewriter.replace(one, new)
        rewriter.replace(two, new)

    after, changes = edited(program, both)
    proof = Proof(program, after, changes)
    assert len(proof.claims) == 2
    assert not proof.holds(program.samples[0])


class Rest(nn.Module):
    def __init__(self, early: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.early = early
        self.rest = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.reciprocal(self.early(x)))


def with_early(early: Callable[[Tensor], Tensor], example: Tensor) -> Program:
    return capture(Rest(early).eval(), (example,))


def test_a_negative_zero_is_not_a_zero() -> None:
    program = with_early(torch.neg, torch.zeros(3, 4))
    after, changes = edited(program, calls("neg", aten.abs.default))
    assert not Proof(program, after, changes).holds((torch.zeros(3, 4),))


def test_nan_is_compared_by_its_bits_and_other_strides_are_not_shown() -> None:
    program = with_early(torch.abs, torch.zeros(3, 4))
    after, changes = edited(program, calls("abs_1", aten.sqrt.default))
    proof = Proof(program, after, changes)
    assert proof.holds((torch.ones(3, 4),))
    assert not proof.holds((torch.full((3, 4), -1.0),))  # NaN, where it was a number
    after, changes = edited(program, calls("abs_1", aten.abs.default))
    assert Proof(program, after, changes).holds((torch.full((3, 4), torch.nan),))
    flat = with_early(lambda x: x[:1].expand(4, 4) * 1.0, torch.ones(4, 4))
    last = next(n.name for n in flat.operators if n.target is aten.mul.Tensor)
    wide, changes = edited(flat, bypass(last))
    assert not Proof(flat, wide, changes).holds((torch.ones(4, 4),))


def recomputed(target: Any, *more: Any) -> Edit:
    """Put an equal value with memory of its own in the place of the first result of a target."""

    def edit(rewriter: Rewriter, program: Program) -> None:
        node = next(n for n in program.operators if n.target is target)
        rewriter.insert_before(node)
        again = rewriter.call(target, node.args, node.kwargs, like=node)
        rewriter.replace(node, rewriter.call(aten.clone.default, (again,), like=node))

    return edit


def test_what_reads_memory_around_a_view_is_run() -> None:
    program = with_early(
        lambda x: torch.as_strided(torch.relu(x)[1:], (3, 4), (4, 1), 0), torch.rand(4, 4)
    )
    after, changes = edited(program, recomputed(aten.slice.Tensor))
    assert not torch.equal(*(run(p, program.samples[0])[0] for p in (program, after)))
    assert not Proof(program, after, changes).possible


def test_a_conjugation_that_is_put_off_is_not_shown() -> None:
    def early(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.conj_physical(torch.view_as_complex(x.reshape(3, 2, 2))))

    program = with_early(lambda x: early(x).reshape(3, 4), torch.ones(3, 4))

    def lazily(rewriter: Rewriter, p: Program) -> None:
        node = next(n for n in p.operators if n.target is aten.conj_physical.default)
        rewriter.insert_before(node)
        rewriter.replace(node, rewriter.call(aten._conj.default, node.args, like=node))

    after, changes = edited(program, lazily)
    proof = Proof(program, after, changes)
    assert proof.possible
    assert not proof.holds(program.samples[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64])
def test_rare_types_are_compared(dtype: torch.dtype) -> None:
    program = with_early(lambda x: torch.relu(x).to(dtype).to(torch.float32), torch.ones(3, 4))
    after, changes = edited(program, recomputed(aten.to.dtype))
    assert Proof(program, after, changes).holds(program.samples[0])


def test_a_program_that_draws_random_numbers_is_run() -> None:
    noisy = with_early(lambda x: torch.relu(x) + torch.rand_like(x), torch.ones(3, 4))
    after, changes = edited(noisy, calls("relu", aten.clamp_min.default, 0))
    assert not Proof(noisy, after, changes).possible
    off = with_early(
        lambda x: nn.functional.dropout(torch.relu(x), training=False), torch.ones(3, 4)
    )
    after, changes = edited(off, calls("relu", aten.clamp_min.default, 0))
    assert Proof(off, after, changes).possible


def test_a_program_with_a_branch_is_run() -> None:
    class Branch(Rest):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (super().forward(x),))

    program = capture(Branch(torch.relu).eval(), (torch.ones(3, 4),))
    after, changes = edited(program, calls("relu", aten.clamp_min.default, 0))
    assert not Proof(program, after, changes).possible


def test_a_program_with_other_inputs_is_not_shown(before: Program) -> None:
    after = before.clone()
    with after.graph.inserting_before(after.operators[0]):
        after.graph.placeholder("more")
    assert not Proof(before, after, ()).possible
