"""ONNX forms of indexing: gathers and scatters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of, rank_of, source_of
from planish.ir.ops import argument

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten


def _index(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """``x[i, :, j]`` with tensors of positions; masks are left to torch's translation."""
    source = source_of(node)
    given = list(node.args[1])  # type: ignore[arg-type]
    axes = [axis for axis, index in enumerate(given) if index is not None]
    indices = [given[axis] for axis in axes]
    if any(dtype_of(i.meta["val"]) in (torch.bool, torch.uint8) for i in indices):
        return None
    if len(axes) == 1:
        places = e.operand(indices[0], torch.int64)
        return e.op("Gather", e.value(source), places, axis=axes[0])
    return _gather_nd(e, node, axes, indices)


def _gather_nd(e: Emitter, node: Node, axes: list[int], indices: list[Node]) -> Any:  # noqa: ANN401
    source = source_of(node)
    rank, out = rank_of(source), dims_of(node.meta["val"])
    spread = max(rank_of(i) for i in indices)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    first = axes[0] if adjacent else 0
    common: Dims = out[first : first + spread]
    places = [_one_column(e, index, common) for index in indices]
    stacked = e.op("Concat", *places, axis=-1)
    x = e.value(source)
    rest = [a for a in range(rank) if a not in axes]
    if axes != list(range(len(axes))):
        x = e.op("Transpose", x, perm=[*axes, *rest])
    found = e.op("GatherND", x, stacked)
    if first == 0:
        return found
    # The indexed axes stand where the first of them was.
    order = [*range(spread, spread + first), *range(spread), *range(spread + first, len(out))]
    dims = tuple(out[order.index(a)] for a in range(len(out)))
    return View(found, dims, dims, tuple(order))


def _one_column(e: Emitter, index: Node, common: Dims) -> ir.Value:
    """Positions broadcast to the common shape, with a last axis of 1."""
    dims = dims_of(index.meta["val"])
    value = e.operand(index, torch.int64)
    if dims != common:
        value = e.op("Expand", value, e.sizes(common))
    return e.materialize(View(value, common, (*common, 1)))


def _index_select(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, axis, index = source_of(node), int(node.args[1]), node.args[2]  # type: ignore[arg-type]  # by the operator's schema
    if not rank_of(source):
        return None
    places = e.operand(index, torch.int64)
    return e.op("Gather", e.value(source), places, axis=axis % rank_of(source))


def _gather(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, axis, index = source_of(node), int(node.args[1]), node.args[2]  # type: ignore[arg-type]  # by the operator's schema
    assert isinstance(index, Node)
    if not rank_of(source) or not rank_of(index):
        return None
    places = e.operand(index, torch.int64)
    return e.op("GatherElements", e.value(source), places, axis=axis % rank_of(source))


def _scatter(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, axis, index, update = node.args[:4]
    assert isinstance(source, Node)
    assert isinstance(index, Node)
    if not rank_of(source) or not rank_of(index):
        return None
    dtype = dtype_of(node.meta["val"])
    places = e.operand(index, torch.int64)
    if isinstance(update, Node):
        values = e.operand(update, dtype)
        if dims_of(update.meta["val"]) != dims_of(index.meta["val"]):
            return None  # torch reads only the corner that the indices cover
    else:
        values = e.op("Expand", e.constant(update, dtype), e.sizes(dims_of(index.meta["val"])))
    reduction = "add" if node.target is aten.scatter_add.default else "none"
    return e.op(
        "ScatterElements", e.value(source), places, values,
        axis=int(axis) % rank_of(source), reduction=reduction,  # type: ignore[arg-type]  # by the operator's schema
    )  # fmt: skip


def _diff(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """Differences of neighbors; for bool, whether they differ."""
    source = source_of(node)
    if argument(node, "n") != 1:
        return None
    rank, dtype = rank_of(source), dtype_of(node.meta["val"])
    axis = int(argument(node, "dim")) % rank
    parts = [argument(node, "prepend"), source, argument(node, "append")]
    values = [e.operand(p, dtype) for p in parts if p is not None]
    x = values[0] if len(values) == 1 else e.op("Concat", *values, axis=axis)
    one, where = e.constant([1]), e.constant([axis])
    later = e.op("Slice", x, one, e.constant([2**63 - 1]), where)
    sooner = e.op("Slice", x, e.constant([0]), e.constant([-1]), where)
    return e.op("Xor" if dtype is torch.bool else "Sub", later, sooner)


INDEXING: Table = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter_add.default: _scatter,
    aten.diff.default: _diff,
}
