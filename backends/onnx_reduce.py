"""ONNX forms of reductions, scans and searches along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of, product
from planish.backends.onnx_file import onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import DYNAMIC, QUANTIZE
from planish.backends.onnx_view import Table, View, dtype_of, rank_of, source_of
from planish.ir.ops import argument, is_op

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_SEARCHES = ("ReduceMax", "ReduceMin")


def _has(node: Node, name: str) -> bool:
    return any(a.name == name for a in node.target._schema.arguments)  # type: ignore[union-attr]


def _axes(node: Node) -> list[int]:
    """The reduced axes; all of them where none is given."""
    rank = rank_of(source_of(node))
    dim = argument(node, "dim") if _has(node, "dim") else None
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    given = [dim] if isinstance(dim, int) else list(dim)
    return sorted({int(a) % max(rank, 1) for a in given})


def _keeps(node: Node) -> int:
    return int(bool(argument(node, "keepdim"))) if _has(node, "keepdim") else 0


def _first_value(node: Node) -> Any:  # noqa: ANN401
    value = node.meta["val"]
    return value[0] if isinstance(value, (list, tuple)) else value


def reduce_axes(e: Emitter, node: Node, name: str, x: ir.Value) -> ir.Value:
    """An ONNX reduction over the node's axes."""
    axes = _axes(node)
    if not axes:
        return x  # a scalar reduces to itself
    if name in _SEARCHES and _rounds(e) and _first_value(node).is_floating_point():
        return _apart(e, node, name, x)
    return e.op(name, x, e.constant(axes), keepdims=_keeps(node))


def _rounds(e: Emitter) -> bool:
    """Whether this is a standard file with values that are rounded to codes."""
    if e.style.integers != "standard":
        return False
    return e.cached(
        ("rounds",), lambda: any(is_op(n, QUANTIZE, DYNAMIC) for n in e.program.operators)
    )


def _apart(e: Emitter, node: Node, name: str, x: ir.Value) -> ir.Value:
    """A largest or smallest number, with an operator between it and what rounds it.

    OpenVINO 2026.4 takes what rounds the result into the operator itself, and then compares
    numbers that are rounded already.
    """
    source = source_of(node)
    like, axes = _first_value(node), _axes(node)
    out, sizes = dims_of(like), dims_of(source.meta["val"])
    first, last = axes[0], axes[-1]
    if axes == list(range(first, last + 1)):  # neighbors are one axis
        seen: Dims = (1, *sizes[:first], product(sizes[first : last + 1]), *sizes[last + 1 :])
        axes = [first]
    else:
        seen = (1, *sizes)
    x = e.materialize(View(x, sizes, seen), like=source.meta["val"])
    axes = [axis + 1 for axis in axes]
    others: Dims = tuple(1 if axis in axes else size for axis, size in enumerate(seen))
    result = e.op(name, x, e.constant(axes), keepdims=1)
    e.describe(result, like, others)
    return e.materialize(View(result, others, out), like=like)


def _reduction(name: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        dtype = dtype_of(_first_value(node))
        source = source_of(node)
        if not rank_of(source):
            return View(e.operand(source, dtype), (), ())
        if dtype is torch.bool:
            return None
        return reduce_axes(e, node, name, e.operand(source, dtype))

    return translate


def _boolean(name: str) -> Callable[[Emitter, Node], Any]:
    """``any`` and ``all`` through the largest and smallest of 0 and 1."""

    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        source = source_of(node)
        truth = e.operand(source, torch.bool)
        if not rank_of(source):
            return View(truth, (), ())
        number = e.op("Cast", truth, to=onnx_dtype(torch.int32))
        return e.op("Cast", reduce_axes(e, node, name, number), to=onnx_dtype(torch.bool))

    return translate


def _variance(root: bool) -> Callable[[Emitter, Node], Any]:
    """``var`` and ``std``: mean of squared differences, with the correction of the count."""

    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        source, dtype = source_of(node), dtype_of(node.meta["val"])
        axes = _axes(node)
        count = 1
        for axis in axes:
            size = dims_of(source.meta["val"])[axis]
            if not isinstance(size, int):
                return None
            count *= size
        if _has(node, "correction"):
            given = argument(node, "correction")
            correction = 1 if given is None else given
        else:
            correction = int(bool(argument(node, "unbiased")))
        if count - correction <= 0:
            return None
        x = e.operand(source, dtype)
        vector = e.constant(axes)
        centered = e.op("Sub", x, e.op("ReduceMean", x, vector, keepdims=1))
        square = e.op("Mul", centered, centered)
        result = e.op("ReduceMean", square, vector, keepdims=_keeps(node))
        if correction:
            result = e.op("Mul", result, e.constant(count / (count - correction), dtype))
        return e.op("Sqrt", result) if root else result

    return translate


def _vector_norm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    order = argument(node, "ord") if _has(node, "ord") else argument(node, "p")
    names = {1: "ReduceL1", 2: "ReduceL2", None: "ReduceL2"}
    if order not in names or (_has(node, "dtype") and argument(node, "dtype") is not None):
        return None
    x = e.operand(source_of(node), dtype_of(node.meta["val"]))
    return reduce_axes(e, node, names[order], x)


def _extreme(reduce: str, search: str) -> Callable[[Emitter, Node], Any]:
    """``max`` and ``min`` along one axis: values and positions."""

    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        source = source_of(node)
        if not rank_of(source) or dtype_of(source.meta["val"]) is torch.bool:
            return None
        x = e.value(source)
        values = reduce_axes(e, node, reduce, x)
        places = e.op(search, x, axis=_axes(node)[0], keepdims=_keeps(node))
        return [values, places]

    return translate


def _search(name: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        source = source_of(node)
        rank = rank_of(source)
        if not rank or dtype_of(source.meta["val"]) is torch.bool:
            return None
        axis = argument(node, "dim")
        if axis is None:
            dims = dims_of(source.meta["val"])
            flat = e.op("Reshape", e.value(source), e.constant([-1]))
            found = e.op(name, flat, axis=0, keepdims=0)
            return View(found, (), dims_of(node.meta["val"])) if dims else found
        return e.op(name, e.value(source), axis=int(axis) % rank, keepdims=_keeps(node))

    return translate


def _cumsum(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, dtype = source_of(node), dtype_of(node.meta["val"])
    if not rank_of(source):
        return View(e.operand(source, dtype), (), ())
    axis = int(argument(node, "dim")) % rank_of(source)
    return e.op("CumSum", e.operand(source, dtype), e.constant(axis))


def _topk(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source = source_of(node)
    if not rank_of(source):
        return None
    count = argument(node, "k")
    amount = e.size_of(count)
    axis = int(argument(node, "dim")) % rank_of(source)
    return e.ops(
        2, "TopK", e.value(source), amount, axis=axis,
        largest=int(argument(node, "largest")), sorted=int(argument(node, "sorted")),
    )  # fmt: skip


def _logsumexp(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    x = e.operand(source_of(node), dtype_of(node.meta["val"]))
    return reduce_axes(e, node, "ReduceLogSumExp", x)


REDUCTIONS: Table = {
    aten.mean.dim: _reduction("ReduceMean"),
    aten.mean.default: _reduction("ReduceMean"),
    aten.sum.dim_IntList: _reduction("ReduceSum"),
    aten.sum.default: _reduction("ReduceSum"),
    aten.prod.dim_int: _reduction("ReduceProd"),
    aten.prod.default: _reduction("ReduceProd"),
    aten.amax.default: _reduction("ReduceMax"),
    aten.amin.default: _reduction("ReduceMin"),
    aten.max.default: _reduction("ReduceMax"),
    aten.min.default: _reduction("ReduceMin"),
    aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    aten.argmax.default: _search("ArgMax"),
    aten.argmin.default: _search("ArgMin"),
    aten.any.default: _boolean("ReduceMax"),
    aten.any.dim: _boolean("ReduceMax"),
    aten.all.default: _boolean("ReduceMin"),
    aten.all.dim: _boolean("ReduceMin"),
    aten.var.correction: _variance(root=False),
    aten.var.dim: _variance(root=False),
    aten.var.default: _variance(root=False),
    aten.std.correction: _variance(root=True),
    aten.std.dim: _variance(root=True),
    aten.std.default: _variance(root=True),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.norm.ScalarOpt_dim: _vector_norm,
    aten.logsumexp.default: _logsumexp,
    aten.cumsum.default: _cumsum,
    aten.topk.default: _topk,
}
