"""ONNX form of ``embedding_bag``: a product with the matrix of which index lies in which bag.

    A[b, i] = 1 if offsets[b] <= i < offsets[b + 1];   sum: A E[ids];   mean: A E[ids] / (A 1)

torch's own translation is a nest of If operators that crashes ONNX Runtime 1.32 while it loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_fallback import unsupported
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of
from planish.ir.ops import argument

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_SUM, _MEAN = 0, 1


def _embedding_bag(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    weight, ids = node.args[0], argument(node, "indices")
    mode = int(argument(node, "mode"))
    if mode not in (_SUM, _MEAN):
        raise unsupported(node, "bags are reduced by sum or mean only")
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise unsupported(node, "only the first result of a bag has an ONNX form")
    assert isinstance(weight, Node)
    dtype = dtype_of(weight.meta["val"])
    count = dims_of(ids.meta["val"])[0]
    inside = _membership(e, node, count)
    padding = argument(node, "padding_idx") if _has(node, "padding_idx") else None
    indices = e.operand(ids, torch.int64)
    if padding is not None and int(padding) >= 0:
        real = e.op("Not", e.op("Equal", indices, e.constant(int(padding))))
        inside = e.op("And", inside, real)
    matrix = e.cast(inside, torch.bool, dtype)
    scale = argument(node, "per_sample_weights")
    weighted = matrix if scale is None else e.op("Mul", matrix, e.value(scale))
    rows = e.op("Gather", e.value(weight), indices, axis=0)
    result = e.op("MatMul", weighted, rows)
    if mode == _MEAN:
        sizes = e.op("ReduceSum", matrix, e.constant([1]), keepdims=1)
        # An empty bag is zero, not zero by zero.
        result = e.op("Div", result, e.op("Max", sizes, e.constant(1.0, dtype)))
    return [result, None, None, None]


def _has(node: Node, name: str) -> bool:
    return any(a.name == name for a in node.target._schema.arguments)  # type: ignore[union-attr]


def _membership(e: Emitter, node: Node, count: Any) -> ir.Value:  # noqa: ANN401
    """Bool [bags, indices]: which bag each index lies in."""
    offsets = argument(node, "offsets")
    value = e.operand(offsets, torch.int64)
    bags = dims_of(offsets.meta["val"])
    if argument(node, "include_last_offset"):
        starts = e.op("Slice", value, e.constant([0]), e.constant([-1]), e.constant([0]))
        ends = e.op("Slice", value, e.constant([1]), e.constant([2**63 - 1]), e.constant([0]))
        bags = (bags[0] - 1,)
    else:
        starts = value
        rest = e.op("Slice", value, e.constant([1]), e.constant([2**63 - 1]), e.constant([0]))
        ends = e.op("Concat", rest, e.size(count), axis=0)
    column = (*bags, 1)
    starts, ends = (e.materialize(View(v, bags, column)) for v in (starts, ends))
    last = e.op("Squeeze", e.size(count), e.constant([0]))
    places = e.op("Range", e.constant(0), last, e.constant(1))
    return e.op("And", e.op("GreaterOrEqual", places, starts), e.op("Less", places, ends))


BAGS: Table = {
    aten.embedding_bag.default: _embedding_bag,
    aten.embedding_bag.padding_idx: _embedding_bag,
}
