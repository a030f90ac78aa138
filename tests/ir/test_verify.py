"""The verifier: every rule has a program that breaks it, and it alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.snapshot import Snapshot
from planish.ir.verify import RULES, verify
from planish.ir.verify_rules import Subject
from tests.support.broken import (
    BREAKERS,
    Breaker,
    broken_rules,
    dead_operator,
    dropped_input,
    in_place_operator,
    nan_constant,
    net,
    node,
    operand_of_another_graph,
    quantized,
    retyped,
    static_input,
    traced,
    wrong_axis,
)

aten = torch.ops.aten


def test_a_whole_program_passes() -> None:
    program = net()
    verify(program)
    verify(program, since=traced(), snapshot=Snapshot(traced(), values=True))
    quantized(program)
    verify(program, since=traced())


@pytest.mark.parametrize(("rule", "broken"), BREAKERS)
def test_what_breaks_a_rule_is_told_by_its_name(rule: str, broken: Breaker) -> None:
    before, after = net(), net()
    broken(after)
    assert broken_rules(after, since=before) == {rule}
    with pytest.raises(VerificationError, match=f"rule {rule}: "):
        verify(after, since=before)


NEEDS_A_PAST = {"no-dead-nodes", "same-contract", "same-results", "constants-not-nan"}


@pytest.mark.parametrize(("rule", "broken"), [b for b in BREAKERS if b[0] not in NEEDS_A_PAST])
def test_it_is_found_in_a_program_without_a_past(rule: str, broken: Breaker) -> None:
    program = net()
    broken(program)
    assert broken_rules(program) == {rule}


def test_a_dropped_input_is_found() -> None:
    program = net()
    dropped_input(program)
    assert "inputs-match" in broken_rules(program)


@pytest.mark.parametrize("lost", [True, False])
def test_other_samples_than_before_are_found(lost: bool) -> None:
    before, after = net(), net()
    before.samples = ((torch.ones(2, 3, 4), torch.ones(2, 3, 1)),)
    after.samples = () if lost else tuple(tuple(v.clone() for v in s) for s in before.samples)
    assert broken_rules(after, since=before) == {"same-contract"}
    after.samples = tuple(tuple(sample) for sample in before.samples)
    assert broken_rules(after, since=before) == set()


def test_a_narrowed_input_is_found() -> None:
    before, after = net(), net()
    static_input(after)
    assert "same-contract" in broken_rules(after, since=before)


def test_every_rule_is_broken_by_a_test() -> None:
    tested = {rule for rule, _ in BREAKERS} | {"constants-unwritten"}
    assert tested == {rule.name for level in RULES.values() for rule in level}


# -- messages -------------------------------------------------------------------------------------


def test_a_failure_shows_rule_node_source_and_the_lines_around() -> None:
    program = net()
    retyped(aten.mul.Tensor, lambda v: v.double())(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "rule operator-types: it is typed f64[batch, 3, 8], and its operands give" in message
    assert "broken.py" in message  # the user's own line
    assert "-->" in message
    assert "aten.relu(" in message
    assert "(and 1 more faults)" in message  # flatten, whose operand it is


def test_a_graph_too_broken_to_print_is_still_reported() -> None:
    program = net()
    operand_of_another_graph(program)
    with pytest.raises(VerificationError, match="rule lint: it reads alien, which belongs to"):
        verify(program)


def test_a_fault_of_structure_ends_the_verification() -> None:
    program = net()
    in_place_operator(program)
    wrong_axis(program)
    assert broken_rules(program) == {"functional"}


# -- what may change ------------------------------------------------------------------------------


def test_dead_values_of_the_trace_are_no_fault_of_a_pass() -> None:
    before = net()
    dead_operator(before)
    verify(before.clone(), since=before)


def test_nan_that_was_there_before_may_move() -> None:
    before, after = net(), net()
    nan_constant(before)
    weight = before.constants["two.weight"]
    assert isinstance(weight, Tensor)
    after.constants["two.weight"] = weight.clone()
    verify(after, since=before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_nan_is_found_in_every_type(dtype: torch.dtype) -> None:
    program = net()
    for value in (1.0, torch.nan):
        program.constants["two.weight"] = torch.full((8, 8), value).to(dtype)
        found = [
            f
            for rule in RULES.values()
            for r in rule
            if r.name == "constants-not-nan"
            for f in r.check(Subject(program, since=net()))
        ]
        assert bool(found) == (value != 1.0)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        picked = x.nonzero()
        return picked, picked[: picked.shape[0] // 2] * 2


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))
        return chosen * 2


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool, directions: int):
        super().__init__()
        self.cell = kind(3, 5, 2, batch_first=batch_first, bidirectional=directions == 2)

    def forward(self, x: Tensor) -> Any:
        return self.cell(x)


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[int, str]]] = {
    "data-dependent sizes": (Rows, torch.eye(4), {0: "rows"}),
    "branches": (Branch, torch.ones(4), {}),
    "lstm": (lambda: Recurrent(nn.LSTM, True, 2), torch.randn(4, 6, 3), {0: "batch"}),
    "gru": (lambda: Recurrent(nn.GRU, False, 1), torch.randn(6, 4, 3), {1: "batch"}),
    "rnn": (lambda: Recurrent(nn.RNN, True, 1), torch.randn(4, 6, 3), {0: "batch"}),
    "sizes as numbers": (lambda: Sizes(), torch.randn(4, 6), {1: "columns"}),
}


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        half = x.shape[0] // 2
        return x.reshape(half, -1) * x.shape[1], half


@pytest.mark.parametrize("name", list(MODULES))
def test_traced_programs_pass(name: str) -> None:
    make, x, axes = MODULES[name]
    shapes = ({axis: Dim(dim) for axis, dim in axes.items()},) if axes else None
    program = capture(make().eval(), (x,), dynamic_shapes=shapes)
    verify(program)
    verify(program.clone(), since=program)
    verify(program)  # deriving left no symbols behind


def test_a_stale_number_is_found() -> None:
    shapes = ({0: 2 * Dim("half"), 1: Dim("columns")},)
    program = capture(Sizes().eval(), (torch.randn(4, 6),), dynamic_shapes=shapes)
    verify(program)
    size = node(program, aten.sym_size.int)
    size.meta = {**size.meta, "val": size.meta["val"] + 1}
    assert broken_rules(program) == {"operator-types"}


def test_the_output_structure_is_that_of_the_signature() -> None:
    program = net()
    leaves = pytree.tree_structure({"hidden": 0, "out": 0, "more": 0})
    program.signature = dataclasses.replace(program.signature, out_spec=leaves)
    assert broken_rules(program) == {"outputs-match"}
