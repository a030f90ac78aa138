"""Forms of quantized values that runtimes of standard files read as the same numbers.

    q(cat(dq int8, dq int8))  ->  q(cat(dq uint8, dq uint8)) - 128   codes are 128 higher inside
    dq [K] @ W                ->  dq [1, K] @ W, summed over its one row

Both are exact. OpenVINO 2026.4 takes int8 codes that it joins for uint8, and gives the product of
a vector of codes an axis more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_file import onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_linear_codes import weight_in_out
from planish.backends.onnx_quantize import DEQUANTIZE, QUANTIZE, dequantized
from planish.backends.onnx_view import Table, View
from planish.backends.ort_codes import Grid, grid_of
from planish.ir.ops import argument, aten, is_op, is_view, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

_SIGN = 128
_JOINS = (aten.cat.default, aten.stack.default)


# -- joined codes -----------------------------------------------------------------------------


def _join(e: Emitter, node: Node) -> ir.Value | None:
    """Join int8 codes as uint8."""
    dims, axis = dims_of(node.meta["val"]), int(argument(node, "dim")) % node.meta["val"].dim()
    stacks = is_op(node, aten.stack.default)
    tensors = [node_of(t) for t in node.args[0]]  # type: ignore[union-attr] # a list of nodes
    tensors = [t for t in tensors if t.meta["val"].dim() == len(dims) - stacks]
    if len(tensors) < 2 or not any(_is_signed(e, t) for t in tensors):
        return None
    parts = []
    for tensor in tensors:
        value = _unsigned(e, tensor) if _is_signed(e, tensor) else e.value(tensor)
        sizes = dims_of(tensor.meta["val"])
        if stacks:
            view = View(value, sizes, (*sizes[:axis], 1, *sizes[axis:]))
            value = e.materialize(view, like=tensor.meta["val"])
        parts.append(value)
    return e.op("Concat", *parts, axis=axis)


def _is_signed(e: Emitter, node: Node) -> bool:
    """Whether a value was rounded to int8 codes on one grid."""
    codes = node.args[0] if is_op(node, DEQUANTIZE) else None
    if not isinstance(codes, Node) or not is_op(codes, QUANTIZE):
        return False
    grid, before = grid_of(e, node), grid_of(e, codes)
    return grid is not None and before is not None and before.same(grid) and grid.dtype == "int8"


def _unsigned(e: Emitter, node: Node) -> ir.Value:
    """The same value, rounded to uint8 codes."""
    source, grid = node_of(node_of(node.args[0]).args[0]), grid_of(e, node)
    assert grid is not None

    def make() -> View:
        view, parameters = e.view(source), _higher(e, grid)
        codes = e.op("QuantizeLinear", view.base, *parameters)
        return view.with_base(e.op("DequantizeLinear", codes, *parameters))

    return e.materialize(e.cached(("unsigned", node), make), like=node.meta["val"])


def _higher(e: Emitter, grid: Grid) -> list[ir.Value]:
    """Scale and zero point of the same numbers in uint8."""
    zero = e.constant(grid.zero + _SIGN, torch.uint8)
    return [e.constant(grid.scale, torch.float32), zero]


def _quantize(e: Emitter, node: Node) -> View | None:
    """Round what was joined to uint8 first: its readers compute on int8, as they are meant to."""
    grid, source = grid_of(e, node), node_of(node.args[0])
    if grid is None or grid.dtype != "int8":
        return None
    joined = source
    while joined.op == "call_function" and is_view(joined.target):
        joined = node_of(joined.args[0])
    if not is_op(joined, *_JOINS):
        return None
    view = e.view(source)
    codes = e.op("QuantizeLinear", view.base, *_higher(e, grid))
    wide = e.cast(codes, torch.uint8, torch.int32)
    lower = e.op("Sub", wide, e.constant(_SIGN, torch.int32))
    return view.with_base(e.op("Cast", lower, to=onnx_dtype(torch.int8)))


# -- products of vectors ----------------------------------------------------------------------


def _linear(e: Emitter, node: Node) -> ir.Value | None:
    """A layer on one vector of codes, as a matrix of one row."""
    x, bias = node_of(node.args[0]), argument(node, "bias")
    if dequantized(x) is None or x.meta["val"].dim() != 1:
        return None
    matrix = weight_in_out(e, node_of(node.args[1]), 0)
    if matrix is None:
        return None
    result = _without(e, e.op("MatMul", _matrix(e, x, 0), matrix), [0])
    return result if bias is None else e.op("Sum", result, e.value(bias))


def _matmul(e: Emitter, node: Node) -> ir.Value | None:
    """A product of codes in which a vector stands, as a product of matrices."""
    a, b = node_of(node.args[0]), node_of(node.args[1])
    if dequantized(a) is None or dequantized(b) is None:
        return None
    left, right = (n.meta["val"].dim() == 1 for n in (a, b))
    if not left and not right:
        return None
    columns = None if right else weight_in_out(e, b, 1)
    first = _matrix(e, a, 0) if left else e.value(a)
    second = _matrix(e, b, 1) if right else e.value(b) if columns is None else columns
    return _without(e, e.op("MatMul", first, second), [-2] * left + [-1] * right)


def _matrix(e: Emitter, x: Node, axis: int) -> ir.Value:
    """A vector as a matrix of one row (axis 0), or of one column."""
    (size,) = dims_of(x.meta["val"])
    goal = (1, size) if axis == 0 else (size, 1)
    return e.materialize(View(e.value(x), (size,), goal), like=x.meta["val"])


def _without(e: Emitter, value: ir.Value, axes: list[int]) -> ir.Value:
    """Drop axes of one element: a Squeeze is lost where scales of columns pass it."""
    return e.op("ReduceSum", value, e.constant(axes), keepdims=0)


PORTABLE: Table = {
    QUANTIZE: _quantize,
    aten.cat.default: _join,
    aten.stack.default: _join,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
}
