"""ONNX forms of operators that move elements without changing them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dim, Dims, dim_of, dims_of, product
from planish.backends.onnx_file import onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of, rank_of, source_of
from planish.ir.ops import argument

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_FAR = 2**31 - 1  # torch writes "to the end" as the largest int64 or int32
_INT64_MAX = 2**63 - 1


def _axis(node: Node, axis: int) -> int:
    """A non-negative axis of the first operand."""
    rank = max(1, rank_of(source_of(node)))
    return axis % rank


# -- same elements in the same order ----------------------------------------------------------


def reshape(e: Emitter, node: Node) -> View:
    """Any operator that only renames axes: the result's type holds the new sizes."""
    return reshaped(e, e.view(source_of(node)), dims_of(node.meta["val"]))


def reshaped(e: Emitter, view: View, dims: Dims) -> View:
    """A view with other sizes; a pending permutation is written out first."""
    if view.shape == dims:
        return view
    if view.perm is None:
        return View(view.base, view.base_dims, dims)
    return View(e.materialize(view), view.shape, dims)


def _identity(e: Emitter, node: Node) -> View | None:
    """Operators that return their first operand's values."""
    if node.target in _DROPOUTS and argument(node, "train"):
        return None
    return e.view(source_of(node))


def _permuted(view: View, order: Sequence[int]) -> View:
    perm = tuple(order) if view.perm is None else tuple(view.perm[p] for p in order)
    if perm == tuple(range(len(perm))):
        return View(view.base, view.base_dims, view.dims)
    return View(view.base, view.base_dims, view.dims, perm)


def _permute(e: Emitter, node: Node) -> View:
    rank = rank_of(node)
    return _permuted(e.view(source_of(node)), [int(p) % rank for p in argument(node, "dims")])


def _transpose(e: Emitter, node: Node) -> View:
    order = list(range(rank_of(node)))
    if len(order) < 2:
        return e.view(source_of(node))
    a, b = (0, 1) if node.target is aten.t.default else (int(x) for x in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return _permuted(e.view(source_of(node)), order)


def _numpy_transpose(e: Emitter, node: Node) -> View:
    return _permuted(e.view(source_of(node)), list(reversed(range(rank_of(node)))))


def _axis_list(given: int | Sequence[int], rank: int) -> list[int]:
    return [a % rank for a in ([given] if isinstance(given, int) else given)]


def _movedim(e: Emitter, node: Node) -> View:
    rank = rank_of(node)
    sources = _axis_list(argument(node, "source"), rank)
    goals = _axis_list(argument(node, "destination"), rank)
    order = [-1] * rank
    for source, goal in zip(sources, goals, strict=True):
        order[goal] = source
    rest = iter(a for a in range(rank) if a not in sources)
    return _permuted(e.view(source_of(node)), [next(rest) if a < 0 else a for a in order])


# -- parts ------------------------------------------------------------------------------------


def _slice(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source = source_of(node)
    axis = _axis(node, argument(node, "dim"))
    start, end, step = (argument(node, n) for n in ("start", "end", "step"))
    dims = dims_of(source.meta["val"])
    if dims_of(node.meta["val"]) == dims and step == 1 and start in (None, 0):
        return e.view(source)
    far = end is None or (isinstance(end, int) and end >= _FAR)
    return e.op(
        "Slice",
        e.value(source),
        e.size_of(0 if start is None else start),
        e.size_of(_INT64_MAX if far else end),
        e.constant([axis]),
        e.constant([step]),
    )


def _select(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    axis, index = _axis(node, node.args[1]), node.args[2]  # type: ignore[arg-type]
    position = e.value(index) if isinstance(index, Node) else e.constant(index)
    return e.op("Gather", e.value(source_of(node)), position, axis=axis)


def _pieces(e: Emitter, node: Node) -> list[Any]:
    """``split``, ``chunk`` and ``split_with_sizes``: the results' types hold the sizes."""
    axis = _axis(node, argument(node, "dim"))
    parts: Sequence[Tensor] = node.meta["val"]
    lengths: Dims = tuple(dim_of(p.shape[axis]) for p in parts)
    view = e.view(source_of(node))
    if len(parts) == 1:
        return [view]
    last = view.keeps_rows and axis == len(view.dims) - 1
    whole = view.base if last else e.materialize(view, like=source_of(node).meta["val"])
    outputs = e.ops(len(parts), "Split", whole, e.sizes(lengths), axis=-1 if last else axis)
    if not last:
        return list(outputs)
    return [
        View(value, (*view.base_dims[:-1], length), dims_of(part))
        for value, length, part in zip(outputs, lengths, parts, strict=True)
    ]


def _unbind(e: Emitter, node: Node) -> list[Any]:
    axis = _axis(node, argument(node, "dim"))
    parts: Sequence[Tensor] = node.meta["val"]
    view = e.view(source_of(node))
    packed = _unbind_packed(e, view, axis, len(parts))
    if packed is not None:
        return packed
    whole = e.materialize(view, like=source_of(node).meta["val"])
    if len(parts) == 1:
        pieces = [whole]
    else:
        pieces = e.ops(len(parts), "Split", whole, e.constant([1] * len(parts)), axis=axis)
    dims = dims_of(source_of(node).meta["val"])
    thin = (*dims[:axis], 1, *dims[axis + 1 :])
    return [View(p, thin, dims_of(part)) for p, part in zip(pieces, parts, strict=True)]


def _unbind_packed(e: Emitter, view: View, axis: int, count: int) -> list[View] | None:
    """Take ``[rows, 3 * features]`` apart along its last axis, before any permutation.

    This is how query, key and value leave a joint projection: reshape to [B, S, 3, H, D],
    permute, unbind.
    """
    if not view.base_dims or view.dims == view.base_dims:
        return None
    inner = axis if view.perm is None else view.perm[axis]
    width = view.base_dims[-1]
    tail = product(view.dims[inner:])
    if not isinstance(width, int) or tail != width or view.dims[inner] != count:
        return None
    part = width // count
    pieces = e.ops(count, "Split", view.base, e.constant([part] * count), axis=-1)
    dims = (*view.dims[:inner], *view.dims[inner + 1 :])
    base_dims = (*view.base_dims[:-1], part)
    views = [View(piece, base_dims, dims) for piece in pieces]
    if view.perm is None:
        return views
    order = [p - (p > inner) for p in view.perm if p != inner]
    return [_permuted(v, order) for v in views]


def _getitem(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    held = e.held(source_of(node))
    assert isinstance(held, list)
    return held[int(node.args[1])]  # type: ignore[arg-type]


# -- joining and repeating --------------------------------------------------------------------


def _cat(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    tensors = [t for t in node.args[0] if isinstance(t, Node)]  # type: ignore[union-attr]
    # torch skips empty one-dimensional tensors whatever the shape of the others.
    rank = rank_of(node)
    tensors = [t for t in tensors if rank_of(t) == rank]
    dtype = dtype_of(node.meta["val"])
    axis = int(argument(node, "dim")) % rank
    if len(tensors) == 1:
        return e.view(tensors[0])
    return e.op("Concat", *[e.operand(t, dtype) for t in tensors], axis=axis)


def _stack(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    rank, dtype = rank_of(node), dtype_of(node.meta["val"])
    axis = int(argument(node, "dim")) % rank
    parts = []
    for tensor in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(tensor, Node)
        dims = dims_of(tensor.meta["val"])
        view = reshaped(e, e.view(tensor), (*dims[:axis], 1, *dims[axis:]))
        value = e.materialize(view, like=tensor.meta["val"])
        parts.append(e.cast(value, dtype_of(tensor.meta["val"]), dtype))
    return e.op("Concat", *parts, axis=axis)


def _expand(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, goal = source_of(node), dims_of(node.meta["val"])
    if dims_of(source.meta["val"]) == goal:
        return e.view(source)
    return e.op("Expand", e.value(source), e.sizes(goal))


def _repeat(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, repeats = source_of(node), list(node.args[1])  # type: ignore[arg-type]  # by the operator's schema
    dims = dims_of(source.meta["val"])
    padded = (*[1] * (len(repeats) - len(dims)), *dims)
    view = reshaped(e, e.view(source), padded)
    value = e.materialize(view, like=source.meta["val"])
    counts = [r if isinstance(r, int) else None for r in repeats]
    if all(c is not None for c in counts):
        return e.op("Tile", value, e.constant(counts))
    return e.op("Tile", value, e.op("Concat", *[e.size_of(r) for r in repeats], axis=0))


def _flip(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    axes = [_axis(node, int(a)) for a in argument(node, "dims")]
    ones = [-1] * len(axes)
    lowest = [-_INT64_MAX] * len(axes)
    return e.op(
        "Slice", e.value(source_of(node)), e.constant(ones), e.constant(lowest),
        e.constant(axes), e.constant(ones),
    )  # fmt: skip


def _roll(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    shifts, axes = argument(node, "shifts"), argument(node, "dims")
    source = source_of(node)
    if not axes or not all(isinstance(s, int) for s in shifts):
        return None
    value = e.value(source)
    for shift, axis in zip(shifts, axes, strict=True):
        axis %= rank_of(source)
        size = dim_of(source.meta["val"].shape[axis])
        if shift == 0 or (isinstance(size, int) and shift % size == 0):
            continue
        # roll by s: the last s elements come first.
        cut, where = e.constant([-shift]), e.constant([axis])
        head = e.op("Slice", value, cut, e.constant([_INT64_MAX]), where)
        tail = e.op("Slice", value, e.constant([0]), cut, where)
        value = e.op("Concat", head, tail, axis=axis)
    return value


# -- new tensors ------------------------------------------------------------------------------


def _full(fill: Any) -> Callable[[Emitter, Node], Any]:  # noqa: ANN401
    """Tensors of one value; their shape and dtype are those of the result."""

    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        value = argument(node, "fill_value") if fill is None else fill
        dims, dtype = dims_of(node.meta["val"]), node.meta["val"].dtype
        scalar = e.operand(value, dtype)
        if not dims:
            return View(scalar, (), ())
        return e.op("Expand", scalar, e.sizes(dims))

    return translate


def _arange(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return None
    start = argument(node, "start") if "start" in names else 0
    step = argument(node, "step") if "step" in names else 1
    limits = [e.operand(x, torch.int64) for x in (start, argument(node, "end"), step)]
    return e.cast(e.op("Range", *limits), torch.int64, dtype)


def _scalar_tensor(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    return View(e.operand(node.args[0], node.meta["val"].dtype), (), ())


def _triangle(upper: int) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        offset = argument(node, "diagonal")
        source = e.value(source_of(node))
        if dtype_of(node.meta["val"]) is torch.bool:
            # ONNX runtimes have no boolean kernel.
            part = e.op("Cast", source, to=onnx_dtype(torch.int32))
            part = e.op("Trilu", part, e.constant(offset), upper=upper)
            return e.op("Cast", part, to=onnx_dtype(torch.bool))
        return e.op("Trilu", source, e.constant(offset), upper=upper)

    return translate


def padding_pairs(node: Node) -> list[tuple[Dim, Dim]]:
    """(before, after) for each axis of the operand, from torch's last-axis-first list."""
    flat = list(argument(node, "pad"))
    pairs: list[tuple[Any, Any]] = [(0, 0)] * rank_of(source_of(node))
    for i in range(len(flat) // 2):
        pairs[-1 - i] = (flat[2 * i], flat[2 * i + 1])
    return pairs


def _pad(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    mode = argument(node, "mode") if node.target is aten.pad.default else "constant"
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode == "circular" and e.opset < 19:
        return None
    pairs = padding_pairs(node)
    source, dtype = source_of(node), dtype_of(node.meta["val"])
    flat = [p[0] for p in pairs] + [p[1] for p in pairs]
    if all(isinstance(p, int) for p in flat):
        pads = e.constant(flat)
    else:
        pads = e.op("Concat", *[e.size_of(p) for p in flat], axis=0)
    fill = argument(node, "value") if mode == "constant" else None
    constant = e.constant(fill or 0, dtype) if mode == "constant" else None
    return e.op("Pad", e.value(source), pads, constant, mode=modes[mode])


_RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.reshape_as.default,
    aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.ravel.default,
)  # fmt: skip
_IDENTITIES = (
    *_DROPOUTS, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.detach_.default, aten.resolve_conj.default, aten.resolve_neg.default,
)  # fmt: skip

SHAPES: Table = {
    **dict.fromkeys(_RESHAPES, reshape),
    **dict.fromkeys(_IDENTITIES, _identity),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.numpy_T.default: _numpy_transpose,
    aten.movedim.int: _movedim,
    aten.movedim.intlist: _movedim,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _pieces,
    aten.split.sizes: _pieces,
    aten.split_with_sizes.default: _pieces,
    aten.chunk.default: _pieces,
    aten.unbind.int: _unbind,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.repeat.default: _repeat,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.full.default: _full(None),
    aten.full_like.default: _full(None),
    aten.new_full.default: _full(None),
    aten.zeros.default: _full(0),
    aten.zeros_like.default: _full(0),
    aten.new_zeros.default: _full(0),
    aten.ones.default: _full(1),
    aten.ones_like.default: _full(1),
    aten.new_ones.default: _full(1),
    aten.scalar_tensor.default: _scalar_tensor,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.tril.default: _triangle(0),
    aten.triu.default: _triangle(1),
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
}
