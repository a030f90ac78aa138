"""Rules on pieces of tensors: slices of slices, cat of cats, split and cat that undo each other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from planish.ir.ops import is_op, node_of
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.cleanup._memory import Memory
from planish.passes.cleanup._sizes import bound, same_size, same_type, shape_of, static

aten = torch.ops.aten

_END = 2**63 - 1
_CATS = (aten.cat.default, aten.concat.default)
_SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.unbind.int,
        aten.unsafe_split.Tensor,
        aten.unsafe_chunk.default,
    }
)


class Slice(NamedTuple):
    """Entries ``start, start + step, ...`` below ``end``; ``end`` may lie past the axis."""

    start: int
    end: int
    step: int


def compose_slices(inner: Slice, outer: Slice) -> Slice:
    """The one slice that takes ``outer`` of ``inner``, whatever the length of the axis is."""
    end = min(inner.end, inner.start + inner.step * outer.end)
    return Slice(inner.start + inner.step * outer.start, min(end, _END), inner.step * outer.step)


def as_slice(node: Node) -> tuple[int, Slice] | None:
    """The axis and the numbers of a slice; None where they are not known before the run."""
    source, dim, start, end, step = bound(node)
    shape = shape_of(source)
    size = static(shape[dim])
    first = _from_front(0 if start is None else start, size)
    last = _from_front(_END if end is None else end, size)
    if first is None or last is None or not isinstance(step, int):
        return None
    return dim % len(shape), Slice(first, last, step)


def _from_front(position: object, size: int | None) -> int | None:
    """A position counted from the front of an axis; None where that takes an unknown size."""
    if not isinstance(position, int):
        return None
    if position >= 0:
        return position
    return None if size is None else max(0, position + size)


class MergeSlices(Rule):
    """``x[a:b:s][c:d:t] -> x[a + s*c : min(b, a + s*d) : s*t]`` along one axis."""

    name = "MergeSlices"
    roots = frozenset({aten.slice.Tensor})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: a slice of a slice on one axis, by numbers, read by nobody else."""
        inner = node.args[0]
        if not isinstance(inner, Node) or not is_op(inner, aten.slice.Tensor):
            return None
        axis = bound(node)[1] % len(shape_of(inner))
        if axis != bound(inner)[1] % len(shape_of(inner)):
            return None
        first, second = as_slice(inner), as_slice(node)
        if first is None or second is None:
            return self.refuse(node, "a bound is known only at run time")
        if len(inner.users) > 1:
            return self.refuse(node, f"{inner.name} has other users and would have to stay")
        merged = compose_slices(first[1], second[1])
        return Match(node, {"source": inner.args[0], "args": (axis, *merged)})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One slice."""
        new = rewriter.call(aten.slice.Tensor, (match["source"], *match["args"]), like=match.root)
        rewriter.replace(match.root, new)


class MergeCats(Rule):
    """``cat(a, cat(b, c)) -> cat(a, b, c)`` along one axis."""

    name = "MergeCats"
    roots = frozenset(_CATS)

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: an operand is a cat on the same axis, of one type, read by nobody else."""
        axis = _axis(node)
        inner = [n for n in bound(node)[0] if is_op(n, *_CATS) and _axis(n) == axis]
        if not inner:
            return None
        for cat in inner:
            if list(cat.users) != [node]:
                return self.refuse(node, f"{cat.name} has other users and would have to stay")
            if any(n.meta["val"].dtype != node.meta["val"].dtype for n in bound(cat)[0]):
                return self.refuse(node, f"{cat.name} changes the type of its operands")
        flat = [p for n in bound(node)[0] for p in (bound(n)[0] if n in inner else [n])]
        return Match(node, {"operands": flat, "axis": axis})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One cat."""
        rewriter.set_args(match.root, (match["operands"], match["axis"]), {})


def _axis(node: Node) -> int:
    """The axis of a cat, counted from the front."""
    return int(bound(node)[1]) % max(1, len(shape_of(node)))


class DropSplitCat(Rule):
    """``cat(split(x)) -> x``, ``stack(unbind(x)) -> x``, ``cat(x[:k], x[k:]) -> x``."""

    name = "DropSplitCat"
    roots = frozenset({*_CATS, aten.stack.default})

    def __init__(self, memory: Memory):
        self.memory = memory

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: all the pieces of one tensor, in order, on one axis."""
        pieces = bound(node)[0]
        whole = _whole_split(node, pieces) or _whole_slices(node, pieces)
        if whole is None or not same_type(node, whole):
            return None
        objection = self.memory.objection(node, whole)
        return self.refuse(node, objection) if objection else Match(node, {"whole": whole})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Read what was cut."""
        self.memory.replace(match.root, match["whole"], rewriter)


def _whole_split(node: Node, pieces: Sequence[Any]) -> Node | None:
    """What all pieces were split from, if they are all there is of it."""
    split = pieces[0].args[0] if is_op(pieces[0], operator.getitem) else None
    if not isinstance(split, Node) or split.target not in _SPLITS:
        return None
    if len(pieces) != len(split.meta["val"]):
        return None
    if any(not is_op(p, operator.getitem) or p.args != (split, i) for i, p in enumerate(pieces)):
        return None
    # Unbinding drops the axis that stacking brings back, and splitting keeps the one cat joins.
    if is_op(node, aten.stack.default) != is_op(split, aten.unbind.int):
        return None
    source = split.args[0]
    assert isinstance(source, Node)
    dim = bound(split)[1 if is_op(split, aten.unbind.int) else 2]
    return source if dim % len(shape_of(source)) == _axis(node) else None


def _whole_slices(node: Node, pieces: Sequence[Any]) -> Node | None:
    """What all pieces were sliced from, if they follow each other and leave nothing out."""
    if is_op(node, aten.stack.default) or not is_op(pieces[0], aten.slice.Tensor):
        return None
    source, at = node_of(pieces[0].args[0]), 0
    for piece in pieces:
        cut = as_slice(piece) if is_op(piece, aten.slice.Tensor) else None
        if cut is None or piece.args[0] is not source:
            return None
        axis, (start, end, step) = cut
        if axis != _axis(node) or start != at or step != 1 or end < start:
            return None
        at = end
    size = static(shape_of(source)[_axis(node)])
    return source if at >= (_END if size is None else size) else None


class DropCatSplit(Rule):
    """``split(cat(a, b), [len(a), len(b)]) -> a, b``."""

    name = "DropCatSplit"
    roots = frozenset({operator.getitem})

    def __init__(self, memory: Memory):
        self.memory = memory

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: the pieces are the operands, in number, axis and every size."""
        split, index = node.args
        if not isinstance(split, Node) or split.target not in _SPLITS - {aten.unbind.int}:
            return None
        cat = split.args[0]
        if not isinstance(cat, Node) or not is_op(cat, *_CATS):
            return None
        operands, dim = bound(cat)[0], bound(split)[2]
        if len(operands) != len(split.meta["val"]) or dim % len(shape_of(cat)) != _axis(cat):
            return None
        axis = _axis(cat)
        for piece, joined in zip(split.meta["val"], operands, strict=True):
            if piece.dim() != len(shape_of(joined)):
                return None
            if not same_size(piece.shape[axis], shape_of(joined)[axis]):
                return None
        operand = operands[index]
        if not same_type(node, operand):
            return self.refuse(node, "the cat changes the type of this operand")
        objection = self.memory.objection(node, operand)
        return self.refuse(node, objection) if objection else Match(node, {"operand": operand})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Read the operand."""
        self.memory.replace(match.root, match["operand"], rewriter)
