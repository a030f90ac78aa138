"""Recover rotary position embedding from slices, negation, concatenation and products.

Rewrite:
    x * cos + rotate(x) * sin  ->  planish::rotary_embedding(x, cos, sin, interleaved)
    rotate(x) = [-x2, x1] for the halves x = [x1, x2];  interleaved: (a, b) -> (-b, a) in each pair
Shapes:       x: [..., D], D even and static;  cos, sin: broadcast to x, usually [B, 1, T, D]
Requires:     cos and sin no larger than x and of its dtype; nothing in between read elsewhere.
Contract:     exact: the operator computes the same expression.
Cost:         7 operators become one.
Failures:     none; what does not fit is refused.
Source:       Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
              eq. 34 (interleaved); Black et al., "GPT-NeoX-20B", 2022, sec. 2.1 (halves).
The pure function is ``planish.ir.operators.rotary_embedding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Node

from planish.ir.ops import aten, is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fuse.matching import (
    dtype_of,
    has_other_user,
    origin,
    outside_user,
    plain_sum,
    shape_of,
    sides,
    skip,
)
from planish.passes.fuse.rotary_reading import Rotation, rotation


class _Turn(NamedTuple):
    rotated: Rotation
    sin: Any
    seen: list[Node]


class RotaryEmbedding(Rule):
    """One operator for ``x * cos + rotate(x) * sin``."""

    name = "rotary-embedding"
    roots = frozenset({aten.add.Tensor})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Find the product with a rotation, then the other product with the same tensor."""
        if not plain_sum(node):
            return None
        for straight, turned in sides(node):
            turn = _turn(turned, program)
            if turn is not None:
                return self._guarded(node, straight, turn)
        return None

    def _guarded(self, node: Node, straight: Any, turn: _Turn) -> Match | Refusal:  # noqa: ANN401
        x, seen = turn.rotated.x, turn.seen
        straight = skip(straight, seen)
        if not is_op(straight, aten.mul.Tensor):
            return self.refuse(node, "a rotation is added to something that is not a product")
        seen.append(straight)
        cos = next((b for a, b in sides(straight) if origin(a) is origin(x)), None)
        if not isinstance(cos, Node):
            return self.refuse(node, "what is rotated is not what is multiplied by the cosine")
        if not turn.rotated.forward:
            return self.refuse(node, "the rotation is by the opposite angle")
        if shape_of(node) != shape_of(x):
            return self.refuse(node, "cos or sin is larger than what it rotates")
        if {dtype_of(node), dtype_of(cos), dtype_of(turn.sin)} != {dtype_of(x)}:
            return self.refuse(node, "cos or sin has another dtype than what it rotates")
        reader = outside_user(seen, node)
        if reader is not None:
            return self.refuse(node, has_other_user(reader, "an intermediate result"))
        interleaved = turn.rotated.interleaved
        return Match(node, {"args": [x, cos, turn.sin], "interleaved": interleaved, "seen": seen})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One operator in place of the sum."""
        target = torch.ops.planish.rotary_embedding.default
        args = [*match["args"], match["interleaved"]]
        new = rewriter.call(target, args, like=[match.root, *match["seen"]])
        rewriter.replace(match.root, new)


def _turn(node: Any, program: Program) -> _Turn | None:  # noqa: ANN401
    """Read ``rotate(x) * sin`` in either order."""
    outer: list[Node] = []
    node = skip(node, outer)
    if not is_op(node, aten.mul.Tensor):
        return None
    for rotated, sin in sides(node):
        seen = [*outer, node]
        found = rotation(rotated, program, seen)
        if found is not None and isinstance(sin, Node):
            return _Turn(found, sin, seen)
    return None


@dataclass(frozen=True, kw_only=True)
class RecoverRotary(Pass):
    """Recover rotary position embedding as one operator."""

    name: ClassVar[str] = "recover-rotary"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Su et al., RoFormer, 2021, equation 34",
        "Black et al., GPT-NeoX-20B, 2022, section 2.1",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Recover every rotary embedding."""
        return self.apply_rules(program, context, [RotaryEmbedding()])
