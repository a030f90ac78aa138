"""The rule on index tensors that count through whole axes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from planish.ir.ops import is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.cleanup._memory import Memory
from planish.passes.cleanup._reshapes import COPIES, RESHAPES
from planish.passes.cleanup._sizes import Size, bound, same_shape, same_size, shape_of, static

aten = torch.ops.aten


class IndexIsReshape(Rule):
    """``x[arange(n)[:, None], arange(m)] -> x``, with the axes of size 1 the indices bring.

    This is how masks of attention are traced: batch index and key index, broadcast.
    """

    name = "IndexIsReshape"
    roots = frozenset({aten.index.Tensor})

    def __init__(self, memory: Memory):
        self.memory = memory

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: every axis is read from 0 to its end, and the axes keep their order."""
        source, indices = bound(node)
        shape, rank = shape_of(source), len(shape_of(node))
        if len(indices) != len(shape) or any(index is None for index in indices):
            return None
        axes = [
            whole_range_axis(index, size, program, rank)
            for index, size in zip(indices, shape, strict=True)
        ]
        kept = [axis for axis in axes if axis is not None]
        if len(kept) < len(axes) or kept != sorted(set(kept)):
            return None
        objection = self.memory.objection(node, source, moves=True)
        if objection:
            return self.refuse(node, objection)
        return Match(node, {"source": source, "new": sorted(set(range(rank)) - set(kept))})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """The tensor itself, with new axes."""
        new = match["source"]
        for axis in match["new"]:
            new = rewriter.call(aten.unsqueeze.default, (new, axis), like=match.root)
        self.memory.replace(match.root, new, rewriter)


def whole_range_axis(index: Node, size: Size, program: Program, rank: int) -> int | None:
    """The axis of the result along which an index counts from 0 to the end of a source axis.

    Args:
        index: an index tensor that varies along one axis only.
        size: of the source axis.
        program: gives the constants.
        rank: of the result, which indices broadcast to from the right.
    """
    own = shape_of(index)
    long = [axis for axis, n in enumerate(own) if static(n) != 1]
    if len(long) != 1 or not same_size(own[long[0]], size):
        return None
    origin: Any = index
    while _keeps_all(origin):
        origin = origin.args[0]
    held = program.constant(origin)
    if held is not None:
        counts = torch.equal(held.flatten(), torch.arange(held.numel(), dtype=held.dtype))
    else:
        counts = is_op(origin, aten.arange.default) or (
            is_op(origin, aten.arange.start, aten.arange.start_step)
            and bool(origin.args[0] == 0)
            and origin.args[2:] in ((), (1,))
        )
    # An arange of floats would not be an index; one of integers counts 0, 1, 2, ...
    return long[0] - len(own) + rank if counts else None


def _keeps_all(node: Node) -> bool:
    """Whether a value holds all elements of its first operand, in order."""
    if is_op(node, aten.slice.Tensor):
        return isinstance(node.args[0], Node) and same_shape(node, node.args[0])
    return node.target in RESHAPES or node.target in COPIES
