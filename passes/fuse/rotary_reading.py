"""Read a rotation of features: halves or pairs taken apart, one negated, put together again."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.passes.fuse.matching import VIEWS, origin, scaled, shape_of, skip

_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


class Half(NamedTuple):
    """The "first", "second", "even" or "odd" half of the features of ``x``."""

    x: Any
    which: str


class Rotation(NamedTuple):
    """``rotate(x)``, or its negative where ``forward`` is false."""

    x: Any
    interleaved: bool
    forward: bool


def rotation(node: Any, program: Program, seen: list[Node]) -> Rotation | None:  # noqa: ANN401
    """Read ``cat([-second, first])``, or ``stack([-odd, even])`` with the last axes merged.

    Args:
        node: what may be a rotation.
        program: gives the constants.
        seen: collects the nodes between ``node`` and ``x``.
    """
    node = skip(node, seen)
    whole = shape_of(node)
    if is_op(node, *VIEWS):
        seen.append(node)
        node = skip(node.args[0], seen)
        joined = is_op(node, aten.stack.default) and _is_last(node, extra=1)
        if not joined or not _pairs(node, whole):
            return None
    elif not is_op(node, aten.cat.default) or not _is_last(node):
        return None
    seen.append(node)
    if len(node.args[0]) != 2:
        return None
    signs, halves = [], []
    for operand in node.args[0]:
        operand = skip(operand, seen)
        negated = scaled(operand, program)
        if negated is not None and negated.factor == -1.0:
            seen.append(operand)
            operand = negated.value
        signs.append(negated is not None)
        halves.append(half(operand, seen))
    return _joined(signs, halves, is_op(node, aten.stack.default))


def _joined(signs: list[bool], halves: list[Half | None], interleaved: bool) -> Rotation | None:
    left, right = halves
    if left is None or right is None or origin(left.x) is not origin(right.x):
        return None
    wanted = ("odd", "even") if interleaved else ("second", "first")
    if (left.which, right.which) != wanted or signs[0] == signs[1]:
        return None
    return Rotation(left.x, interleaved, signs[0])


def half(node: Any, seen: list[Node]) -> Half | None:  # noqa: ANN401
    """Which half of which tensor a slice, a chunk or a selection takes."""
    node = skip(node, seen)
    if is_op(node, aten.slice.Tensor):
        seen.append(node)
        return _slice(node)
    if is_op(node, operator.getitem):
        seen.append(node)
        parts, index = skip(node.args[0], seen), node.args[1]
        if not isinstance(index, int):
            return None
        if is_op(parts, *_SPLITS):
            seen.append(parts)
            return _chunk(parts, index)
        if not is_op(parts, aten.unbind.int):
            return None
        return _of_pair(parts, index, seen)
    if is_op(node, aten.select.int):
        return _of_pair(node, argument(node, "index"), seen)
    return None


def _slice(node: Node) -> Half | None:
    x = node.args[0]
    size = (shape_of(x) or (None,))[-1]
    if not isinstance(size, int) or size % 2 or not _is_last(node, of=x):
        return None
    start, end = argument(node, "start") or 0, argument(node, "end")
    step = argument(node, "step")
    if not isinstance(start, int) or not (end is None or isinstance(end, int)):
        return None
    start = start + size if start < 0 else start
    end = size if end is None else min(end + size if end < 0 else end, size)
    kinds = {
        (0, size // 2, 1): "first",
        (size // 2, size, 1): "second",
        (0, size, 2): "even",
        (1, size, 2): "odd",
    }
    which = kinds.get((start, end, step))
    return Half(x, which) if which else None


def _chunk(node: Node, index: int) -> Half | None:
    x, parts = node.args[0], node.meta["val"]
    size = (shape_of(x) or (None,))[-1]
    if not isinstance(size, int) or size % 2 or not _is_last(node, of=x):
        return None
    if len(parts) != 2 or parts[0].shape[-1] != size // 2:
        return None
    return Half(x, "second" if index else "first")


def _of_pair(node: Node, index: int, seen: list[Node]) -> Half | None:
    """One of each pair, where a view ``[..., D] -> [..., D/2, 2]`` made the pairs visible."""
    pairs = skip(node.args[0])
    seen.append(node)
    if not is_op(pairs, *VIEWS) or not _is_last(node, of=pairs):
        return None
    x = pairs.args[0]
    if not _pairs(pairs, shape_of(x)):
        return None
    seen.append(pairs)
    return Half(x, "odd" if index % 2 else "even")


def _pairs(node: Node, whole: tuple[int | str, ...] | None) -> bool:
    """Whether a node has the shape ``[..., D/2, 2]`` for a whole of ``[..., D]``."""
    shape = shape_of(node)
    if not shape or not whole or not isinstance(whole[-1], int):
        return False
    return shape == (*whole[:-1], whole[-1] // 2, 2)


def _is_last(node: Node, of: Any = None, extra: int = 0) -> bool:  # noqa: ANN401
    """Whether a node works along the last dimension of ``of``, its first operand by default."""
    operand = node.args[0][0] if of is None else of  # type: ignore[index]
    rank = len(shape_of(operand) or ()) + extra
    return rank > 0 and argument(node, "dim") % rank == rank - 1
