"""Sparse layouts hold, and quantization has one possible scheme on both sides."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from planish.ir import verify_schemes as schemes
from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import SparseLayout
from planish.ir.verify import faults, verify
from planish.ir.verify_rules import Subject
from planish.ir.verify_schemes import layout_problem
from tests.support.broken import broken_rules, net, new_call, node, quantized

aten = torch.ops.aten


def crowded_groups(value: Tensor, n: int, m: int, axis: int) -> int:
    """The definition, one group at a time."""
    rows = value.movedim(axis, -1).reshape(-1, value.shape[axis]).tolist()
    groups = [row[i : i + m] for row in rows for i in range(0, len(row), m)]
    return sum(sum(v != 0 for v in group) > n for group in groups)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 999),
    st.floats(0.1, 0.9),
)
def test_layouts_are_checked_by_their_definition(
    n: int, m: int, axis: int, seed: int, density: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = (torch.rand(5, 8, 3, generator=generator) < density).float()
    problem = layout_problem(value, SparseLayout(min(n, m), m, axis))
    count = crowded_groups(value, min(n, m), m, axis)
    assert problem == (f"{count} groups hold more than {min(n, m)} nonzeros" if count else None)


def test_a_sparse_constant_passes_and_a_dense_one_does_not() -> None:
    value = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0]])
    assert layout_problem(value, SparseLayout(2, 4, 1)) is None
    assert layout_problem(value, SparseLayout(2, 4, -1)) is None
    assert layout_problem(value, SparseLayout(1, 4, 1)) == "2 groups hold more than 1 nonzeros"
    assert layout_problem(value, SparseLayout(3, 2, 1)) == "3:2 is no layout"
    assert layout_problem(value, SparseLayout(0, 2, 1)) == "0:2 is no layout"


def test_axes_count_from_both_ends() -> None:
    value = torch.zeros(8, 8)
    for axis in (-2, -1, 0, 1):
        assert layout_problem(value, SparseLayout(2, 4, axis)) is None
    for axis in (-3, 2):
        assert layout_problem(value, SparseLayout(2, 4, axis)) == "it has only 2 axes"


def test_the_last_short_group_counts_too() -> None:
    one = SparseLayout(1, 4, 1)
    assert layout_problem(torch.ones(1, 6), one) == "2 groups hold more than 1 nonzeros"
    assert layout_problem(torch.tensor([[0.0, 0, 0, 0, 1, 1]]), one) is not None
    assert layout_problem(torch.tensor([[0.0, 0, 0, 1, 1, 0]]), one) is None


def test_the_body_of_a_branch_has_no_layout() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            chosen: Tensor = torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))
            return chosen

    program = capture(Branch().eval(), (torch.ones(4),))
    layout = SparseLayout(2, 4, 0)
    program.layouts = {"true_graph_0": layout, "false_graph_0": layout}
    assert [rule for rule, _ in faults(program)] == ["sparse-layouts"] * 2


def test_layouts_of_old_constants_are_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = net()
    before.constants["two.weight"] = torch.zeros(8, 8)
    before.layouts["two.weight"] = SparseLayout(2, 4, 1)
    verify(before)
    after = before.clone()
    monkeypatch.setattr("planish.ir.verify_schemes.layout_problem", None)
    verify(after, since=before)


def claiming(*claims: tuple[str, Tensor, SparseLayout]) -> Program:
    program = net()
    for name, value, layout in claims:
        program.constants[name] = value
        program.layouts[name] = layout
    return program


def test_every_layout_is_checked_whatever_the_ones_before_it_are() -> None:
    layout, dense, sparse = SparseLayout(2, 4, 1), torch.ones(8, 8), torch.zeros(8, 8)
    first = torch.zeros(8, 4)
    before = claiming(("one.weight", first, layout), ("two.weight", sparse, layout))
    assert list(before.layouts) == ["one.weight", "two.weight"]
    after = before.clone()
    after.constants["two.weight"] = dense  # the first is known, the second new
    assert broken_rules(after, since=before) == {"sparse-layouts"}
    after.constants["one.weight"] = torch.ones(8, 4)
    with pytest.raises(VerificationError, match="and 1 more faults"):
        verify(after, since=before)


def test_another_claim_about_an_old_constant_is_checked() -> None:
    half = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8, 2)
    before = claiming(("two.weight", half, SparseLayout(2, 4, 1)))
    verify(before)
    after = before.clone()
    after.layouts["two.weight"] = SparseLayout(1, 4, 1)
    assert broken_rules(after, since=before) == {"sparse-layouts"}
    assert broken_rules(after) == {"sparse-layouts"}


# -- quantization schemes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 0.2}, "its scale is not that of"),
        ({"zero": 4}, "its zero_point is not that of"),
        ({"high": 120}, "its quant_max is not that of"),
        ({"low": -120}, "its quant_min is not that of"),
        ({"both": {"scale": -1.0}}, "its scale is not positive and finite everywhere"),
        ({"both": {"zero": -129}}, "its zero point is outside of -128 to 127"),
        ({"both": {"high": 400}}, "its range -128 to 400 is no range of i8"),
        ({"both": {"low": 5, "zero": 5, "high": 5}}, "its range 5 to 5 is no range of i8"),
    ],
)
def test_a_wrong_scheme_is_told(changes: dict[str, Any], says: str) -> None:
    program = net()
    quantized(program, **changes)
    with pytest.raises(VerificationError, match=says):
        verify(program)


@pytest.mark.parametrize("zero", [-128, 127])
def test_the_zero_point_may_be_an_end_of_the_range(zero: int) -> None:
    program = net()
    quantized(program, both={"zero": zero})
    verify(program)


def quantized_by(
    program: Program, operator: str, there: Sequence[Any], back: Sequence[Any]
) -> None:
    """Quantize the first output by one list of arguments, and dequantize it by another."""
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops, relu = torch.ops.quantized_decomposed, node(program, aten.relu.default)
    quantize = getattr(ops, f"quantize_{operator}")
    dequantize = getattr(ops, f"dequantize_{operator}")
    overload = "tensor" if operator == "per_tensor" else "default"
    code = new_call(program, program.output, getattr(quantize, overload), relu, *there)
    value = new_call(program, program.output, getattr(dequantize, overload), code, *back)
    program.output.args = ((value, program.results[1]),)


def test_a_scale_that_is_computed_must_be_the_same_value_on_both_sides() -> None:
    for same in (True, False):
        program = net()
        relu = node(program, aten.relu.default)
        scale, other = (new_call(program, program.output, aten.amax.default, relu) for _ in "ab")
        zero = new_call(program, program.output, aten.zeros_like.default, scale)
        there = (scale, zero, -128, 127, torch.int8)
        back = (scale if same else other, zero, -128, 127, torch.int8)
        quantized_by(program, "per_tensor", there, back)
        found = [fault.what for _, fault in faults(program)]
        told = "its scale is not that of quantize_per_tensor_tensor, which quantized its input"
        assert found == ([] if same else [told])


def read_constant(program: Program, name: str, value: Tensor) -> Node:
    program.constants[name] = value
    with program.graph.inserting_before(program.output):
        made = program.graph.get_attr(name)
    made.meta["val"] = program.fake_mode.from_tensor(value)
    return made


@pytest.mark.parametrize(
    ("scales", "axis", "told"),
    [
        (torch.full((3,), 0.1), 1, None),  # another constant, equal in value
        (torch.full((3,), 0.2), 1, "its scales is not that of"),
        (torch.full((1, 3), 0.1), 1, "its scales is not that of"),
        (torch.full((3,), 0.1), 0, "its axis is not that of"),
        (None, 1, "its scales is not that of"),  # computed on one side only
    ],
)
def test_channels_have_one_scheme_on_both_sides(
    scales: Tensor | None, axis: int, told: str | None
) -> None:
    program = net()
    zero = read_constant(program, "zero", torch.zeros(3, dtype=torch.int64))
    scale = read_constant(program, "scale", torch.full((3,), 0.1))
    if scales is None:
        relu = node(program, aten.relu.default)
        other = new_call(program, program.output, aten.amax.default, relu, [0, 2])
    else:
        other = read_constant(program, "other", scales)
    there = (scale, zero, 1, -128, 127, torch.int8)
    quantized_by(program, "per_channel", there, (other, zero, axis, -128, 127, torch.int8))
    found = [fault.what for fault in schemes.operator_schemes(Subject(program))]
    assert [what[: len(told or "")] for what in found] == ([told] if told else [])


def test_scales_of_channels_are_constants_and_checked() -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops = torch.ops.quantized_decomposed
    for scales, fine in ((torch.full((8,), 0.1), True), (torch.zeros(8), False)):
        program = net()
        relu = node(program, aten.relu.default)
        rewriter = Rewriter(program, "test")
        with rewriter.site("quantize", relu):
            rewriter.insert_before(program.output)
            scale = rewriter.constant(scales, "scale", like=relu)
            zero = rewriter.constant(torch.zeros(8, dtype=torch.int64), "zero", like=relu)
            args = (scale, zero, 2, -128, 127, torch.int8)
            code = rewriter.call(ops.quantize_per_channel.default, (relu, *args), like=relu)
            value = rewriter.call(ops.dequantize_per_channel.default, (code, *args), like=relu)
        program.output.args = ((value, program.results[1]),)
        assert broken_rules(program) == (set() if fine else {"operator-schemes"})
