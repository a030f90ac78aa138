"""A claim on integers means: zero is the zero point of those who read them; and stacked layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import SparseLayout, stacked_layout
from planish.ir.verify import verify
from planish.ir.verify_schemes import layout_problem

HALF = SparseLayout(2, 4, 1)
SCHEMES = [
    QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=4, symmetric=False),
    QuantScheme(dtype="uint8", granularity="channel", axis=0, symmetric=False),
    QuantScheme(dtype="int4", granularity="channel", axis=0, narrow=True),
    QuantScheme(dtype="uint8", granularity="tensor", symmetric=False),
]


def sparse_rows() -> Tensor:
    value = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    return value * torch.tensor([1.0, 0.0, 1.0, 0.0] * 2)


def program(scheme: QuantScheme, codes: Tensor, scale: Tensor, zero: Tensor) -> Program:
    """A linear whose weight is ``codes``, claimed to be 2:4."""
    made = capture(nn.Linear(8, 6, bias=False).eval(), (torch.randn(2, 8),))
    rewriter = Rewriter(made, "test")
    (source,) = made.graph.find_nodes(op="get_attr")
    with rewriter.site("round", next(iter(source.users))):
        parts = [rewriter.constant(codes, "codes", layout=HALF, like=source)]
        parts += [rewriter.constant(v, n) for v, n in ((scale, "scale"), (zero, "zero"))]
        options = {"dtype": scheme.dtype, "axis": scheme.axis, "block_size": scheme.block_size}
        op = torch.ops.planish.dequantize.default
        rewriter.replace(source, rewriter.call(op, parts, options, like=source))
    return rewriter.finish()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_of_integers_are_their_zero_points(scheme: QuantScheme) -> None:
    value = sparse_rows()
    scale, zero = scheme.qparams_of(value)
    codes = scheme.quantize(value, scale, zero)
    if not scheme.symmetric:
        assert bool((zero != 0).any())  # so that comparing with 0 would be wrong
        assert layout_problem(codes, HALF) is not None
    good = program(scheme, codes, scale, zero)
    verify(good)
    off = codes.clone()
    off[3, 1] = codes[3, 1] + 1 if codes[3, 1] < scheme.range[1] else codes[3, 1] - 1
    with pytest.raises(VerificationError, match=r"sparse-layouts.*'codes' claims sparse<2:4"):
        verify(program(scheme, off, scale, zero))


def test_new_zero_points_under_the_same_codes_are_seen() -> None:
    scheme = SCHEMES[1]
    value = sparse_rows()
    scale, zero = scheme.qparams_of(value)
    before = program(scheme, scheme.quantize(value, scale, zero), scale, zero)
    after = before.clone()
    rewriter = Rewriter(after, "moves")
    (source,) = (n for n in after.graph.find_nodes(op="get_attr") if n.target == "zero")
    with rewriter.site("move", next(iter(source.users))):
        moved = torch.where(zero < 128, zero + 1, zero - 1)
        rewriter.replace(source, rewriter.constant(moved, "zero", like=source))
    with pytest.raises(VerificationError, match="groups hold more than 2 nonzeros"):
        verify(rewriter.finish(), since=before)


def test_integers_whose_zero_point_is_computed_have_no_known_zeros() -> None:
    scheme = SCHEMES[3]
    value = sparse_rows()
    scale, zero = scheme.qparams_of(value)
    made = program(scheme, scheme.quantize(value, scale, zero), scale, zero)
    rewriter = Rewriter(made, "computes")
    (source,) = (n for n in made.graph.find_nodes(op="get_attr") if n.target == "zero")
    with rewriter.site("compute", next(iter(source.users))):
        neg = rewriter.call(torch.ops.aten.neg.default, [source], like=source)
        rewriter.replace(source, neg)
    with pytest.raises(VerificationError, match="the zero point of its integers is computed"):
        verify(rewriter.finish())


def test_integers_that_nobody_dequantizes_mean_themselves() -> None:
    codes = torch.tensor([[3, 0, 0, 1]], dtype=torch.int8)
    assert layout_problem(codes, HALF) is None
    assert layout_problem(codes + 1, HALF, torch.tensor(1)) is None
    assert layout_problem(codes + 1, HALF) is not None


@pytest.mark.parametrize(
    ("layouts", "shapes", "joint"),
    [
        ([None, None], [(4, 8), (6, 8)], None),
        ([HALF, HALF], [(4, 8), (6, 8)], HALF),
        ([SparseLayout(3, 32, None), SparseLayout(9, 48, None)], [(4, 8), (6, 8)],
         SparseLayout(12, 80, None)),
        ([SparseLayout(1, 2, None, (4, 4)), SparseLayout(2, 4, None, (4, 4))],
         [(4, 8), (6, 8)], SparseLayout(3, 6, None, (4, 4))),
        ([SparseLayout(2, 4, 0)] * 2, [(8, 3), (6, 3)], SparseLayout(2, 4, 0)),
    ],
)  # fmt: skip
def test_stacked_weights_have_the_joint_layout(
    layouts: list[SparseLayout | None], shapes: list[tuple[int, int]], joint: SparseLayout | None
) -> None:
    assert stacked_layout(layouts, shapes) == (joint, None)


@pytest.mark.parametrize(
    ("layouts", "shapes", "reason"),
    [
        ([HALF, None], [(4, 8), (6, 8)], "differ"),
        ([HALF, SparseLayout(1, 4, 1)], [(4, 8), (6, 8)], "differ"),
        ([HALF, SparseLayout(3, 48, None)], [(4, 8), (6, 8)], "differ"),
        ([SparseLayout(2, 4, 0)] * 2, [(6, 3), (8, 3)], "straddle"),
        ([SparseLayout(1, 4, None, (4, 4))] * 2, [(6, 8), (8, 8)], "straddle"),
    ],
)
def test_weights_that_cannot_be_stacked(
    layouts: list[SparseLayout | None], shapes: list[tuple[int, int]], reason: str
) -> None:
    found, problem = stacked_layout(layouts, shapes)
    assert found is None
    assert problem is not None
    assert reason in problem
