"""Sparse layouts hold, and quantization has one possible scheme on both sides."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import SparseLayout
from planish.ir.verify import verify
from planish.ir.verify_schemes import layout_problem
from tests.support.broken import broken_rules, net, node, quantized

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


def test_the_body_of_a_branch_has_no_layout() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            chosen: Tensor = torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))
            return chosen

    program = capture(Branch().eval(), (torch.ones(4),))
    program.layouts["true_graph_0"] = SparseLayout(2, 4, 0)
    assert broken_rules(program) == {"sparse-layouts"}


def test_layouts_of_old_constants_are_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = net()
    before.constants["two.weight"] = torch.zeros(8, 8)
    before.layouts["two.weight"] = SparseLayout(2, 4, 1)
    verify(before)
    after = before.clone()
    monkeypatch.setattr("planish.ir.verify_schemes.layout_problem", None)
    verify(after, since=before)


# -- quantization schemes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 0.2}, "its scale is not that of"),
        ({"zero": 4}, "its zero_point is not that of"),
        ({"high": 120}, "its quant_max is not that of"),
        ({"both": {"scale": -1.0}}, "its scale is not positive and finite everywhere"),
        ({"both": {"zero": -129}}, "its zero point is outside of -128 to 127"),
        ({"both": {"high": 400}}, "its range -128 to 400 is no range of i8"),
    ],
)
def test_a_wrong_scheme_is_told(changes: dict[str, Any], says: str) -> None:
    program = net()
    quantized(program, **changes)
    with pytest.raises(VerificationError, match=says):
        verify(program)


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
