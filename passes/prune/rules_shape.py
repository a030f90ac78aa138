"""How units pass operators that move, join, cut out or copy: none of them mixes units."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op, op_name
from planish.passes.prune.labels import Labels, shape_of, sizes_of
from planish.passes.prune.rules_pointwise import (
    RULES,
    carry,
    pin_others,
    rank,
    rule,
    tensors,
    unknown,
)

SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.split.sizes,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default)
def _permute(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    carry(node, operand, {axis: i for i, axis in enumerate(order(node))}, "", labels)


def order(node: Node) -> list[int]:
    """For each axis of a permutation's result, the axis of its operand."""
    count = rank(node)
    if is_op(node, aten.permute.default):
        return [int(d) % count for d in argument(node, "dims")]
    axes = list(range(count))
    if count > 1:
        a, b = (0, 1) if is_op(node, aten.t.default) else (-2, -1)
        if is_op(node, aten.transpose.int):
            a, b = argument(node, "dim0"), argument(node, "dim1")
        axes[a], axes[b] = axes[b], axes[a]
    return axes


@rule(aten.expand.default, aten.expand_as.default)
def _expand(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    shape, out = shape_of(operand), shape_of(node)
    assert shape is not None
    assert out is not None
    shift = len(out) - len(shape)
    for axis, size in enumerate(shape):
        if size == 1:
            labels.pin(operand, axis, node, "it is copied along its units")
        else:
            labels.same((operand, axis), (node, axis + shift))
    if is_op(node, aten.expand_as.default):
        for axis in range(len(out)):
            labels.same((node, axis), (tensors(node)[-1], axis))


@rule(aten.repeat.default)
def _repeat(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    shape, out = sizes_of(operand), sizes_of(node)
    shift = len(out) - len(shape)
    for axis, size in enumerate(shape):
        many = out[axis + shift]
        if size == 1 or not isinstance(size, int) or not isinstance(many, int):
            labels.pin(operand, axis, node, "it is copied along its units")
        else:
            index = np.arange(many, dtype=np.int64)
            labels.tie((node, axis + shift), index, (operand, axis), index % size)


@rule(aten.repeat_interleave.self_int)
def _interleave(node: Node, labels: Labels) -> None:
    operand, dim = tensors(node)[0], argument(node, "dim")
    if dim is None:
        unknown(node, labels)
        return
    dim %= rank(operand)
    for axis in range(rank(operand)):
        if axis != dim:
            labels.same((operand, axis), (node, axis))
    many = sizes_of(node)[dim]
    if not isinstance(many, int):
        unknown(node, labels)
        return
    index = np.arange(many, dtype=np.int64)
    labels.tie((node, dim), index, (operand, dim), index // int(argument(node, "repeats")))


@rule(aten.cat.default)
def _cat(node: Node, labels: Labels) -> None:
    dim = argument(node, "dim") % rank(node)
    start, parts = 0, argument(node, "tensors")
    fixed = all(isinstance(sizes_of(operand)[dim], int) for operand in parts)
    for operand in parts:
        for axis in range(rank(operand)):
            if axis != dim:
                labels.same((operand, axis), (node, axis))
        if not fixed:
            for value in (operand, node):
                labels.pin(value, dim, node, "it is joined along an axis of dynamic size")
            continue
        size = int(sizes_of(operand)[dim])
        index = np.arange(size, dtype=np.int64)
        labels.tie((operand, dim), index, (node, dim), index + start)
        start += size


@rule(aten.stack.default)
def _stack(node: Node, labels: Labels) -> None:
    dim = argument(node, "dim") % rank(node)
    labels.pin(node, dim, node, "its parts are stacked along its units")
    for operand in argument(node, "tensors"):
        for axis in range(rank(operand)):
            labels.same((operand, axis), (node, axis + (axis >= dim)))


@rule(aten.select.int)
def _select(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    dim = argument(node, "dim") % rank(operand)
    axes = {a: a - (a > dim) for a in range(rank(operand)) if a != dim}
    carry(node, operand, axes, "one of its units is picked by its number", labels)


@rule(aten.slice.Tensor)
def _slice(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    dim = argument(node, "dim") % rank(operand)
    for axis in range(rank(operand)):
        if axis != dim:
            labels.same((operand, axis), (node, axis))
    bounds = slice_bounds(node)
    if bounds is None:
        for value in (operand, node):
            labels.pin(value, dim, node, "a slice along its units has dynamic bounds or a step")
        return
    index = np.arange(bounds[1] - bounds[0], dtype=np.int64)
    labels.tie((node, dim), index, (operand, dim), index + bounds[0])


def slice_bounds(node: Node) -> tuple[int, int] | None:
    """First index and the one behind the last; None where not fixed, or there is a step."""
    operand = tensors(node)[0]
    size = sizes_of(operand)[argument(node, "dim") % rank(operand)]
    given = argument(node, "start"), argument(node, "end")
    fixed = all(g is None or isinstance(g, int) for g in given)
    if not isinstance(size, int) or not fixed or argument(node, "step") != 1:
        return None
    start, end, _ = slice(*given).indices(size)
    return start, max(start, end)


@rule(*SPLITS)
def _split(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    dim = argument(node, "dim") % rank(operand)
    pieces = [tuple(v.shape) for v in node.meta["val"]]
    fixed = all(isinstance(shape[dim], int) for shape in pieces)
    starts = np.cumsum([0, *(shape[dim] for shape in pieces)] if fixed else [0])
    for piece in node.users:
        if not is_op(piece, operator.getitem):
            labels.pin_value(operand, node, "its pieces are handed on together")
            continue
        for axis in range(rank(operand)):
            if axis != dim:
                labels.same((operand, axis), (piece, axis))
        if not fixed:
            for value in (operand, piece):
                labels.pin(value, dim, node, "it is split along an axis of dynamic size")
            continue
        number: Any = piece.args[1]
        index = np.arange(pieces[number][dim], dtype=np.int64)
        labels.tie((piece, dim), index, (operand, dim), index + starts[number])


@rule(aten.unbind.int)
def _unbind(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    dim = argument(node, "dim") % rank(operand)
    labels.pin(operand, dim, node, "its units are picked one by one")
    for piece in node.users:
        for axis in range(rank(operand)):
            if axis != dim:
                labels.same((operand, axis), (piece, axis - (axis > dim)))


def getitem(node: Node, labels: Labels) -> None:
    """A piece is tied by the operator that made it."""
    made = node.args[0]
    assert isinstance(made, Node)
    if made.target in (*SPLITS, aten.unbind.int):
        RULES[made.target](made, labels)
    elif isinstance(node.meta.get("val"), Tensor):
        unknown(node, labels)
        for value in tensors(made):
            labels.pin_value(value, made, f"no rule says how units pass {op_name(made.target)}")


@rule(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def _pixels(node: Node, labels: Labels) -> None:
    operand, channel = tensors(node)[0], rank(node) - 3
    shuffles = is_op(node, aten.pixel_shuffle.default)
    many, few = (operand, node) if shuffles else (node, operand)
    reason = "pixels are shuffled along it"
    for value in (many, few):
        pin_others(node, value, range(channel + 1), reason, labels)
    for axis in range(channel):
        labels.same((operand, axis), (node, axis))
    size, units = sizes_of(many)[channel], sizes_of(few)[channel]
    index = np.arange(int(size), dtype=np.int64)
    labels.tie((many, channel), index, (few, channel), index // (int(size) // int(units)))


@rule(aten.index.Tensor)
def _index(node: Node, labels: Labels) -> None:
    operand, given = node.args[0], argument(node, "indices")
    assert isinstance(operand, Node)
    named = [i for i, each in enumerate(given) if each is not None]
    for each in tensors(node)[1:]:
        labels.pin_value(each, node, "its values pick others")
    if named != list(range(named[0], named[-1] + 1)):
        unknown(node, labels)
        return
    added = rank(node) - rank(operand) + len(named)
    axes = {i: i for i in range(named[0])}
    axes |= {i: i - len(named) + added for i in range(named[-1] + 1, rank(operand))}
    carry(node, operand, axes, "it is picked by numbers along its units", labels)


@rule(aten.index_select.default)
def _index_select(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    dim = argument(node, "dim") % rank(operand)
    axes = {i: i for i in range(rank(operand)) if i != dim}
    carry(node, operand, axes, "it is picked by numbers along its units", labels)
