"""Standard ONNX forms of planish's quantizing operators, and of what reads quantized weights.

``quantize``, ``dequantize`` and ``dynamic_quantize`` mean what ONNX QuantizeLinear,
DequantizeLinear and DynamicQuantizeLinear mean. What the standard cannot say in one operator
(one scale per token, int8 chosen at run time, 4-bit integers that are computed) is written with
the arithmetic of the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of
from planish.ir.errors import UnsupportedError
from planish.ir.ops import argument, aten, is_op, node_of
from planish.ir.quantscheme import INTEGERS

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.ir.program import Program

QUANTIZE = torch.ops.planish.quantize.default
DEQUANTIZE = torch.ops.planish.dequantize.default
DYNAMIC = torch.ops.planish.dynamic_quantize.default

_HALVES = ("int4", "uint4")
_MATMULS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
# Blocks, and integers other than of 8 bits, came to QuantizeLinear with this operator set.
BLOCK_OPSET = 21
_HALF_PRECISION_OPSET = 19


@dataclass(frozen=True)
class Dequantized:
    """A dequantized value, taken apart.

    Attributes:
        node: the ``dequantize``.
        codes: the integers.
        scale: its scales.
        zero: its zero points.
        dtype: which integers.
        axis: of channels or blocks, from the front; None for one scale.
        block: elements of a block; 0 for none.
    """

    node: Node
    codes: Node
    scale: Node
    zero: Node
    dtype: str
    axis: int | None
    block: int


def dequantized(node: object) -> Dequantized | None:
    """Take a ``dequantize`` apart; None for any other node."""
    if not isinstance(node, Node) or not is_op(node, DEQUANTIZE):
        return None
    codes, scale, zero = node.args[:3]
    assert isinstance(codes, Node)
    assert isinstance(scale, Node)
    assert isinstance(zero, Node)
    axis, rank = argument(node, "axis"), len(node.meta["val"].shape)
    return Dequantized(
        node, codes, scale, zero, str(argument(node, "dtype")),
        None if axis is None else int(axis) % rank, int(argument(node, "block_size")),
    )  # fmt: skip


def opset_needed(program: Program) -> int:
    """The smallest operator set version that can write the program's quantized values."""
    needed = 0
    for node in program.operators:
        if not is_op(node, QUANTIZE, DEQUANTIZE):
            continue
        kind, block = argument(node, "dtype"), argument(node, "block_size")
        if block or kind not in ("int8", "uint8", "int32"):
            needed = max(needed, BLOCK_OPSET)
        scale = argument(node, "scale")
        if dtype_of(scale.meta["val"]) is not torch.float32:
            needed = max(needed, _HALF_PRECISION_OPSET)
    return needed


# -- the three operators ----------------------------------------------------------------------


def _quantize(e: Emitter, node: Node) -> View:
    x, scale, zero = _nodes(node)
    kind = str(argument(node, "dtype"))
    axis, block = argument(node, "axis"), int(argument(node, "block_size"))
    if kind == "int32":
        raise UnsupportedError(
            "ONNX quantizes no computed value to int32",
            where=node,
            hint="quantize to 8 or 16 bits; int32 is for constant biases",
        )
    view, axis = _placed(e, x, axis)
    parameters = [_parameter(e, p, axis, block) for p in (scale, zero)]
    codes = e.op("QuantizeLinear", view.base, *parameters, **layout(axis, block))
    if kind in _HALVES:
        # As 8-bit integers they are what other operators can read; saturated to 4 bits.
        low, high, storage = INTEGERS[kind]
        codes = e.op("Clip", codes, e.constant(low, storage), e.constant(high, storage))
    return view.with_base(codes)


def _dequantize(e: Emitter, node: Node) -> View:
    q = dequantized(node)
    assert q is not None
    known = e.known(q.codes)
    if known is not None:
        dims = dims_of(node.meta["val"])
        if _misleads(q):
            return View(_by_definition_of_channels(e, q, known), dims, dims)
        missing = _missing_of_last_block(e, q, known)
        if missing:
            return View(_of_whole_blocks(e, q, known, missing), dims, dims)
        codes = stored(e, q.codes, known, q.dtype)
        view, axis = View(codes, dims, dims), q.axis
        kind = q.dtype
    else:
        view, axis = _placed(e, q.codes, q.axis)
        kind = ""
    parameters = [
        _parameter(e, q.scale, axis, q.block),
        _parameter(e, q.zero, axis, q.block, kind),
    ]
    if q.dtype == "int32":
        parameters.pop()  # ONNX knows no zero point here: it is 0
        _check_no_zero(e, q)
    if known is None and q.block and int(q.scale.meta["val"].shape[q.axis or 0]) == 1:
        return view.with_base(_by_rows(e, q, view.base, *parameters))
    result = e.op("DequantizeLinear", view.base, *parameters, **layout(axis, q.block))
    return view.with_base(result)


def _missing_of_last_block(e: Emitter, q: Dequantized, known: Tensor) -> int:
    """How many codes a constant's last block lacks, where that matters."""
    if not q.block or q.axis is None or e.style.integers != "standard":
        return 0
    return -known.shape[q.axis] % q.block


def _of_whole_blocks(e: Emitter, q: Dequantized, known: Tensor, missing: int) -> ir.Value:
    """A constant whose last block is short, filled up and cut again.

    The standard allows a short block; OpenVINO 2026.4 does not load one.
    """
    assert q.axis is not None
    rest = [*known.shape]
    rest[q.axis] = missing
    whole = torch.cat([known, known.new_zeros(rest)], q.axis)
    codes = stored(e, q.codes, whole, q.dtype, order=".whole")
    result = e.op(
        "DequantizeLinear",
        codes,
        _parameter(e, q.scale, q.axis, q.block),
        _parameter(e, q.zero, q.axis, q.block, q.dtype),
        **layout(q.axis, q.block),
    )
    bounds = ([0], [known.shape[q.axis]], [q.axis])
    cut: ir.Value = e.op("Slice", result, *(e.constant(b) for b in bounds))
    return cut


def _by_rows(
    e: Emitter, q: Dequantized, codes: ir.Value, scale: ir.Value, zero: ir.Value
) -> ir.Value:
    """Dequantize values with a scale for each row, in primitive operators.

    ONNX Runtime 1.32 makes MatMulIntegerToFloat of any DequantizeLinear before a MatMul, and then
    fails when it runs, because that kernel takes one scale for all rows.
    """
    dtype, storage = dtype_of(q.scale.meta["val"]), INTEGERS[q.dtype][2]
    difference = e.op("Sub", e.cast(codes, storage, dtype), e.cast(zero, storage, dtype))
    return e.op("Mul", difference, scale)


def _misleads(q: Dequantized) -> bool:
    """Whether ONNX Runtime would make a product of integers that it cannot run.

    Its MatMulIntegerToFloat takes scales of columns for a matrix on the right. It is also made of
    a stack of matrices, or of a matrix on the left, and then fails when it runs.
    """
    if q.axis is None or q.block or q.dtype not in ("int8", "uint8"):
        return False
    rank = q.node.meta["val"].dim()
    return any(is_op(u, *_MATMULS) and (rank > 2 or u.args[0] is q.node) for u in q.node.users)


def _by_definition_of_channels(e: Emitter, q: Dequantized, known: Tensor) -> ir.Value:
    """A constant with a scale for each channel, in primitive operators."""
    shape = [1] * known.dim()
    shape[q.axis or 0] = -1
    parameters = []
    for node in (q.scale, q.zero):
        tensor = e.known(node)
        parameters.append(
            e.value(node)
            if tensor is None
            else stored(e, node, tensor.reshape(shape), order=".spread")
        )
    result: ir.Value = _by_rows(e, q, stored(e, q.codes, known), *parameters)
    return result


def _check_no_zero(e: Emitter, q: Dequantized) -> None:
    zero = e.known(q.zero)
    if zero is None or bool(zero.any()):
        raise UnsupportedError(
            "ONNX has no zero point for int32", where=q.node, hint="use a zero point of 0"
        )


def _dynamic_quantize(e: Emitter, node: Node) -> list[Any]:
    x = node.args[0]
    assert isinstance(x, Node)
    kind, per_token = str(argument(node, "dtype")), bool(argument(node, "per_token"))
    view = e.view(x)
    if kind == "uint8" and not per_token and dtype_of(x.meta["val"]) is torch.float32:
        codes, scale, zero = e.ops(3, "DynamicQuantizeLinear", view.base)
        return [view.with_base(codes), scale, zero]
    if per_token and not view.keeps_rows:
        view = plain(e, x)
    return _by_definition(e, node, view, kind, per_token)


def _by_definition(e: Emitter, node: Node, view: View, kind: str, per_token: bool) -> list[Any]:
    """Dynamic quantization in primitive operators: per token, or to int8."""
    x, dtype = view.base, dtype_of(node_of(node.args[0]).meta["val"])
    smallest, largest, storage = INTEGERS[kind]
    zero_, one = e.constant(0.0, dtype), e.constant(1.0, dtype)
    axes = [e.constant([-1])] if per_token else []
    low = e.op("Min", e.op("ReduceMin", x, *axes, keepdims=int(per_token)), zero_)
    high = e.op("Max", e.op("ReduceMax", x, *axes, keepdims=int(per_token)), zero_)
    if kind == "uint8":
        span = e.op("Div", e.op("Sub", high, low), e.constant(float(largest), dtype))
    else:
        span = e.op("Div", e.op("Max", high, e.op("Neg", low)), e.constant(float(largest), dtype))
    scale = e.op("Where", e.op("Equal", span, zero_), one, span)
    limits = [e.constant(float(smallest), dtype), e.constant(float(largest), dtype)]
    real = e.op("Round", e.op("Div", x, scale))
    if kind == "uint8":
        zero = e.op("Clip", e.op("Round", e.op("Neg", e.op("Div", low, scale))), *limits)
        real = e.op("Add", real, zero)
    else:
        zero = e.op("Mul", scale, zero_)
    codes = e.cast(e.op("Clip", real, *limits), dtype, storage)
    stored_zero = e.cast(zero, dtype, storage)
    if not per_token:
        return [view.with_base(codes), scale, stored_zero]
    rows, shape = (*view.base_dims[:-1], 1), (*view.dims[:-1], 1)
    return [view.with_base(codes), View(scale, rows, shape), View(stored_zero, rows, shape)]


# -- operands ---------------------------------------------------------------------------------


def _nodes(node: Node) -> tuple[Node, Node, Node]:
    x, scale, zero = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(scale, Node)
    assert isinstance(zero, Node)
    return x, scale, zero


def _placed(e: Emitter, x: Node, axis: int | None) -> tuple[View, int | None]:
    """A view to quantize the base of, and where the axis is in that base."""
    view = e.view(x)
    if axis is None:
        return view, None
    rank = len(x.meta["val"].shape)
    if view.dims != view.base_dims or view.perm is not None:
        view = plain(e, x)
    return view, axis % rank


def plain(e: Emitter, x: Node) -> View:
    """A value as it stands in the program, whatever it is a view of."""
    dims = dims_of(x.meta["val"])
    return View(e.value(x), dims, dims)


def layout(axis: int | None, block: int) -> dict[str, Any]:
    """The attributes of QuantizeLinear and DequantizeLinear that say which elements share."""
    if axis is None:
        return {}
    return {"axis": axis, "block_size": block or None}


def _parameter(e: Emitter, node: Node, axis: int | None, block: int, kind: str = "") -> ir.Value:
    """A scale or zero point: a scalar where there is one for all."""
    known = e.known(node)
    if known is None:
        value = e.value(node)
        if axis is None and node.meta["val"].dim():
            dims = dims_of(node.meta["val"])
            value = e.materialize(View(value, dims, ()), like=node.meta["val"])
        return value
    return stored(e, node, known.reshape(()) if axis is None else known, kind)


def stored(e: Emitter, node: Node, tensor: Tensor, kind: str = "", order: str = "") -> ir.Value:
    """A constant of the program in the file, once for each way it is written.

    Args:
        e: the emitter.
        node: the constant.
        tensor: its values as they are to be written.
        kind: "int4" or "uint4" for two in one byte.
        order: what was done to the values, as part of the name: ".T".
    """
    kind = kind if kind in _HALVES else ""
    if not kind and not order and tensor.shape == node.meta["val"].shape:
        return e.value(node)
    key = ("stored", str(node.target), kind, order, tuple(tensor.shape))
    return e.cached(key, lambda: e.tensor(tensor, f"{node.target}{order}", kind or None))


QUANTIZING: Table = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    DYNAMIC: _dynamic_quantize,
}
