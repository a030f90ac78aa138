"""Weights of 4 and 8 bits in ONNX Runtime: MatMulNBits and GatherBlockQuantized.

The codes of a linear layer are stored as they are multiplied: ``[out, blocks, bytes of a block]``,
so nothing is transposed, and a table that is embedding and output layer at once is one constant
in the file that both operators read. Signed codes are shifted into unsigned ones: the operators'
zero point, where none is given, is 8 (128 with 8 bits).

MatMulNBits has two ways to compute. With accuracy level 4 the rows are rounded to int8 block by
block and multiplied as integers: fast for few rows, where reading the weight is all there is. With
level 1 the weight is unpacked to float and multiplied by the float kernel: with many rows that
is faster where blocks are short, and keeps the activations as they are. Which is better depends
on the number of rows, known only at run time; so both may be in the file, under an If, reading
the same constants. The style ``weights`` says what to write:

    "integers"   level 4
    "branch"     level 4 up to ``FEW_ROWS`` rows, else level 1; where integers lose with many rows:
                 4 bits in blocks under ``LONG_BLOCK``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import Dequantized, dequantized
from planish.backends.onnx_view import Table, View, dtype_of
from planish.backends.ort_factors import factors_of
from planish.ir.ops import aten
from planish.ir.quantscheme import INTEGERS

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
INTEGER_ROWS, FLOAT_ROWS = 4, 1  # values of accuracy_level
# With 4 bits in blocks of 32, integers are faster up to about this many rows (measured on a
# processor with AVX-512 VNNI: 1.9x at 4 rows, 1.2x at 16, 0.7x at 64).
FEW_ROWS = 24
# From this block size on, integers are at least as fast with 64 rows too.
LONG_BLOCK = 128
# What one scale per output is written in: blocks that repeat it.
_CHANNEL_BLOCK = 128
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Packed:
    """A weight as the operators read it.

    Attributes:
        codes: uint8 ``[out, blocks, block * bits / 8]``, the earlier of two in the low half.
        scale: float32 ``[out, blocks]``.
        zero_point: uint8 ``[out, ceil(blocks * bits / 8)]``; None where all are the default.
        inputs: of one row, without what fills the last block.
        bits: of one code.
        block: inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    inputs: int
    bits: int
    block: int


def pack(
    codes: Tensor, scale: Tensor, zero: Tensor, dtype: str, block: int, *, channel: bool = False
) -> Packed:
    """Pack a weight.

    Args:
        codes: ``[out, in]``, as the program holds them.
        scale: float32 ``[out, blocks]``; with ``channel`` ``[out]``.
        zero: likewise.
        dtype: "int8", "uint8", "int4" or "uint4".
        block: inputs that share a scale: a power of two, 16 or more.
        channel: whether all blocks of a row share one scale.
    """
    bits = 4 if dtype.endswith("4") else 8
    shift = -INTEGERS[dtype][0]
    outputs, inputs = codes.shape
    blocks = -(-inputs // block)
    if channel:
        scale, zero = (p[:, None].expand(outputs, blocks) for p in (scale, zero))
    unsigned = (codes.to(torch.int16) + shift).to(torch.uint8)
    missing = blocks * block - inputs
    if missing:
        # The operators read whole blocks; what fills them up is multiplied by nothing.
        unsigned = torch.cat([unsigned, unsigned.new_zeros(outputs, missing)], 1)
    zeros = (zero.to(torch.int16) + shift).to(torch.uint8)
    default = bool((zeros == 1 << (bits - 1)).all())
    return Packed(
        halves(unsigned, bits).reshape(outputs, blocks, -1),
        scale.contiguous(),
        None if default else halves(zeros, bits),
        inputs,
        bits,
        block,
    )


def halves(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, n]`` two to a byte, the first in the low half; unchanged with 8 bits."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(len(codes), 1)], 1)
    return codes[:, 0::2] | codes[:, 1::2] << 4


@dataclass(frozen=True)
class _Stored:
    """A packed weight as constants of the file."""

    inputs: tuple[ir.Value | None, ...]  # codes, scale, zero points
    packed: Packed


def _stored(e: Emitter, weight: object, out_axis: int) -> _Stored | None:
    """Pack a dequantized constant weight, once per file; None for what has no such form."""
    q = dequantized(weight)
    if q is None or not _fits(e, q, out_axis):
        return None

    def make() -> _Stored:
        codes, scale, zero = (e.known(n) for n in (q.codes, q.scale, q.zero))
        assert codes is not None
        assert scale is not None
        assert zero is not None
        if out_axis == 1:
            codes = codes.t()
            scale, zero = (p.t() if p.dim() == 2 else p for p in (scale, zero))
        packed = pack(codes, scale, zero, q.dtype, q.block or _CHANNEL_BLOCK, channel=not q.block)
        names = [str(n.target) for n in (q.codes, q.scale, q.zero)]
        tensors = (packed.codes, packed.scale, packed.zero_point)
        values = [
            None if t is None else e.tensor(t, name) for t, name in zip(tensors, names, strict=True)
        ]
        return _Stored(tuple(values), packed)

    return e.cached(("packed", weight, out_axis), make)


def _fits(e: Emitter, q: Dequantized, out_axis: int) -> bool:
    """Whether the operators know this layout."""
    if any(e.known(n) is None for n in (q.codes, q.scale, q.zero)):
        return False
    if q.dtype not in ("int8", "uint8", "int4", "uint4") or q.node.meta["val"].dim() != 2:
        return False
    if dtype_of(q.node.meta["val"]) is not torch.float32:
        return False
    if not q.block:
        return q.axis == out_axis
    return q.axis == 1 - out_axis and q.block >= _SMALLEST_BLOCK and not q.block & (q.block - 1)


def _packed_product(e: Emitter, node: Node) -> View | None:
    """``x @ weight + bias`` with a float ``x`` and a packed weight; None where that has no form."""
    factors = factors_of(node)
    if factors is None or dequantized(factors.x) is not None:
        return None
    bias = factors.bias
    out = dims_of(node.meta["val"])
    stored = _stored(e, factors.weight, factors.out_axis) if len(out) > 1 else None
    if stored is None:
        return None
    rows, view = e.rows(factors.x)
    given = [rows, *stored.inputs]
    if bias is not None:
        given += [None] * (5 - len(given)) + [e.value(bias)]
    dims = (view.base_dims[0], out[-1])
    result = _product(e, stored.packed, given, dims, node.meta["val"])
    e.describe(result, node.meta["val"], dims)
    return View(result, dims, out)


def _product(
    e: Emitter, packed: Packed, given: list[ir.Value | None], dims: Dims, like: Tensor
) -> ir.Value:
    """The product ``[rows, out]``, in the form that is fastest for the number of rows."""
    rows, outputs = dims

    def nbits(level: int) -> ir.Value:
        return e.op(
            "MatMulNBits", *given, domain=DOMAIN, K=packed.inputs, N=outputs,
            bits=packed.bits, block_size=packed.block, accuracy_level=level,
        )  # fmt: skip

    if e.style.weights == "integers" or packed.bits == 8 or packed.block >= LONG_BLOCK:
        return nbits(INTEGER_ROWS)
    if isinstance(rows, int):
        return nbits(INTEGER_ROWS if rows <= FEW_ROWS else FLOAT_ROWS)

    import onnx_ir as ir

    few = e.cached(
        ("few rows", rows), lambda: e.op("LessOrEqual", e.size(rows), e.constant([FEW_ROWS]))
    )
    bodies = []
    for level in (INTEGER_ROWS, FLOAT_ROWS):
        with e.scope() as nodes:
            value = nbits(level)
        e.describe(value, like, dims)
        bodies.append(ir.Graph((), [value], nodes=nodes, name=e.unique("rows")))
    return e.op("If", few, then_branch=bodies[0], else_branch=bodies[1])


def _embedding(e: Emitter, node: Node) -> View | None:
    """Rows of a packed table; None where that has no form."""
    table, ids = node.args[:2]
    assert isinstance(ids, Node)
    stored = _stored(e, table, 0)
    if stored is None:
        return None
    packed = stored.packed
    codes, scale, zero = stored.inputs
    assert codes is not None
    whole = packed.codes.shape[1] * packed.block
    rows = e.cached(
        ("rows of codes", codes),
        lambda: e.op("Reshape", codes, e.constant([packed.codes.shape[0], -1])),
    )
    found = e.op(
        "GatherBlockQuantized", rows, e.value(ids), scale, zero, domain=DOMAIN,
        gather_axis=0, quantize_axis=1, block_size=packed.block, bits=packed.bits,
    )  # fmt: skip
    dims = dims_of(node.meta["val"])
    if whole != packed.inputs:
        found = e.op("Slice", found, e.constant([0]), e.constant([packed.inputs]), e.constant([-1]))
    e.describe(found, node.meta["val"], dims)
    return View(found, dims, dims)


ORT_WEIGHTS: Table = {
    aten.linear.default: _packed_product,
    aten.addmm.default: _packed_product,
    aten.mm.default: _packed_product,
    aten.matmul.default: _packed_product,
    aten.embedding.default: _embedding,
}
