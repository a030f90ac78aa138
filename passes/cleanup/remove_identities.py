"""Remove operators that return their operand.

Rewrite:
    f(x) -> x    for f in dropout in evaluation mode, alias, detach, clone, contiguous; a cast to
                 the type, a reshape, expand or reduction to the shape, or a slice to the size that
                 x has; permute to the same order, cat of one, pad by nothing, pooling of one
    x + 0, x - 0, x * 1, x / 1, x ** 1, x & True, x | False  -> x    and with swapped operands;
                 expand(x) where the neutral operand is the longer one
    -(-x), not not x -> x;   relu(relu(x)) -> relu(x);   index_select(x, d, 0..n-1) -> x
    where(True, a, b) -> a;  masked_fill(x, False, v) -> x
    attention(q, k, v, mask=True everywhere) -> attention(q, k, v)
    g(expand(x), y) -> g(x, y)  for g elementwise, if g broadcasts x to the same shape itself
Shapes:    any; sizes with symbols must be equal as formulas, for every legal size.
Requires:  element type, device and shape of f(x) are those of x: ``i64 + 0.0`` is not ``i64``.
Contract:  exact, bit by bit but for one case: ``-0.0 + 0.0`` is ``0.0``, and is ``-0.0`` after the
           rewrite. The two are equal; only a division by them could tell them apart. Strides are
           not values: a ``view`` that relied on a removed copy becomes a ``reshape``.
Cost:      one look at each node: linear.
Refuses:   dropout in training mode; a neutral operand whose removal changes type or shape; a copy
           that keeps the caller from holding the memory of an input, a constant or another output;
           a change of strides that some operator reads; ``channels_last`` for TorchScript, whose
           kernels run faster on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from planish.ir.ops import ELEMENTWISE_BINARY, is_op, node_of
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.cleanup._identities import IDENTITIES, Call
from planish.passes.cleanup._memory import Memory
from planish.passes.cleanup._sizes import (
    Size,
    bound,
    same_shape,
    same_size,
    same_sizes,
    shape_of,
    size_arguments,
    static,
    tensor_of,
)
from planish.passes.cleanup._uniform import uniform

aten = torch.ops.aten

_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)
_ATTENTION = aten.scaled_dot_product_attention.default
_BROADCASTING = ELEMENTWISE_BINARY | {
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
}


def broadcast_shape(shapes: Sequence[tuple[Size, ...]]) -> tuple[Size, ...] | None:
    """The shape operands of these shapes broadcast to; None where a symbol leaves it open."""
    rank = max(map(len, shapes))
    result: list[Size] = []
    for axis in range(rank):
        wide: Size = 1
        for shape in shapes:
            size = shape[axis - rank + len(shape)] if axis >= rank - len(shape) else 1
            if static(size) == 1:
                continue
            if static(wide) != 1 and not same_size(wide, size):
                return None
            wide = size
        result.append(wide)
    return tuple(result)


class DropIdentity(Rule):
    """``f(x) -> x``."""

    name = "DropIdentity"
    roots = frozenset(IDENTITIES)

    def __init__(self, memory: Memory, *, keeps_channels_last: bool):
        self.memory = memory
        self.keeps_channels_last = keeps_channels_last

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: an identity, memory the caller may hold, strides nobody reads."""
        if tensor_of(node) is None:
            return None
        new = IDENTITIES[node.target](Call(node, bound(node), program))
        if new is None:
            return None
        if isinstance(new, str):
            return self.refuse(node, new)
        if self.keeps_channels_last and node.kwargs.get("memory_format") in _CHANNELS_LAST:
            return self.refuse(node, "the target's convolutions run faster on channels_last")
        sizes: list[Any] | None = None
        if not same_shape(node, new):
            sizes = size_arguments(shape_of(node), program, node)
            if sizes is None:
                return self.refuse(node, "it broadcasts to sizes that no operator has computed")
        objection = self.memory.objection(node, new)
        if objection:
            return self.refuse(node, objection)
        return Match(node, {"new": new, "sizes": sizes})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Let the users read the operand, broadcast where the operator broadcast it."""
        new = match["new"]
        if match["sizes"] is not None:
            new = rewriter.call(aten.expand.default, (new, match["sizes"]), like=match.root)
        self.memory.replace(match.root, new, rewriter)


class DropTrueMask(Rule):
    """``attention(q, k, v, mask) -> attention(q, k, v)`` where the mask hides nothing."""

    name = "DropTrueMask"
    roots = frozenset({_ATTENTION})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: a mask of True, or an additive mask of 0, everywhere."""
        mask = tensor_of(bound(node)[3])
        if mask is None:
            return None
        hides_nothing = mask.dtype is torch.bool
        is_so = uniform(bound(node)[3], program) == hides_nothing
        return Match(node, {}) if is_so else None

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Leave the mask out."""
        _set_arguments(match.root, {3: None}, rewriter)


class DropExpand(Rule):
    """``g(expand(x), y) -> g(x, y)`` where g broadcasts x to the same shape itself."""

    name = "DropExpand"
    roots = frozenset(_BROADCASTING | {_ATTENTION})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: an expanded operand, and a result whose shape the other operands give."""
        args = bound(node)
        positions = [3] if node.target is _ATTENTION else range(len(args))
        for position in positions:
            operand = args[position]
            if not is_op(operand, aten.expand.default) or _sways_type(operand, args):
                continue
            shapes = self._shapes(node, args, {position: node_of(operand.args[0])})
            if shapes is None:
                continue
            found = broadcast_shape(shapes)
            wanted = self._wanted(node, args)
            if found is not None and wanted is not None and same_sizes(found, wanted):
                return Match(node, {"position": position, "new": operand.args[0]})
        return None

    def _shapes(
        self, node: Node, args: list[Any], swap: dict[int, Node]
    ) -> list[tuple[Size, ...]] | None:
        """Shapes of what broadcasts, with one operand exchanged."""
        if node.target is _ATTENTION:
            (mask,) = swap.values()
            scores = self._wanted(node, args)
            return None if scores is None else [shape_of(mask), scores]
        operands = [swap.get(i, a) for i, a in enumerate(args) if isinstance(a, Node)]
        return [shape_of(n) for n in operands if tensor_of(n) is not None]

    def _wanted(self, node: Node, args: list[Any]) -> tuple[Size, ...] | None:
        """The shape broadcasting has to reach."""
        if node.target is not _ATTENTION:
            return shape_of(node)
        query, key = shape_of(args[0]), shape_of(args[1])
        return (*query[:-1], key[-2]) if len(query) == len(key) else None

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Read what was expanded."""
        _set_arguments(match.root, {match["position"]: match["new"]}, rewriter)


def _sways_type(expanded: Node, args: list[Any]) -> bool:
    """Whether an operand takes part in type promotion only because it was expanded from rank 0."""
    tensors = [t for t in map(tensor_of, args) if t is not None]
    return not shape_of(expanded.args[0]) and len({t.dtype for t in tensors}) > 1  # type: ignore[arg-type]


def _set_arguments(node: Node, values: dict[int, Node | None], rewriter: Rewriter) -> None:
    """Exchange arguments by their position in the schema, wherever they were given."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, value in values.items():
        if position < len(args):
            args[position] = value
        else:
            kwargs[names[position]] = value
    rewriter.set_args(node, args, kwargs)


@dataclass(frozen=True, kw_only=True)
class RemoveIdentities(Pass):
    """Remove operators that return their operand; see the module's docstring."""

    name: ClassVar[str] = "remove-identities"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply the rules until none fires."""
        keeps_channels_last = context.target == "torchscript"
        rules = (
            DropIdentity(Memory(program), keeps_channels_last=keeps_channels_last),
            DropTrueMask(),
            DropExpand(),
        )
        return self.apply_rules(program, context, rules)
