"""Rules on chains that keep the order of elements, or permute axes: reshapes, permutes, expands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from planish.ir.ops import is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.cleanup._memory import Memory
from planish.passes.cleanup._sizes import Size, bound, same_sizes, shape_of, static

aten = torch.ops.aten

_SIZED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
RESHAPES = _SIZED | {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.ravel.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
}
PERMUTES = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.swapaxes.default,
        aten.t.default,
        aten.mT.default,
        aten.numpy_T.default,
        aten.movedim.int,
        aten.movedim.intlist,
    }
)
COPIES = frozenset(
    {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}
)


class Plan(NamedTuple):
    """An operator and its arguments after the first."""

    target: Any
    args: tuple[Any, ...]


def plan_reshape(
    before: Sequence[Size], after: Sequence[Size], given: Sequence[Any] | None = None
) -> Plan | None:
    """The simplest operator that brings a shape into another with as many elements.

    Args:
        before: the shape to start from; not equal to ``after``.
        after: the shape to reach.
        given: sizes some reshape to ``after`` was given, nodes included.

    Returns:
        None where the sizes would have to be computed by new operators.
    """
    for axis, size in enumerate(after):
        if static(size) == 1 and same_sizes((*after[:axis], *after[axis + 1 :]), tuple(before)):
            return Plan(aten.unsqueeze.default, (axis,))
    for axis, size in enumerate(before):
        if static(size) == 1 and same_sizes((*before[:axis], *before[axis + 1 :]), tuple(after)):
            return Plan(aten.squeeze.dim, (axis,))
    sizes = plain_sizes(after, given)
    return None if sizes is None else Plan(aten.reshape.default, (sizes,))


def plain_sizes(shape: Sequence[Size], given: Sequence[Any] | None = None) -> list[Any] | None:
    """Size arguments for a shape: numbers, -1 for the only symbolic one, else what was given.

    With a size of 0 the -1 would be ambiguous, so it is not used there.
    """
    numbers = [static(size) for size in shape]
    if numbers.count(None) == 0:
        return numbers
    if numbers.count(None) == 1 and 0 not in numbers:
        return [-1 if number is None else number for number in numbers]
    if given is None or len(given) != len(shape):
        return None
    return [g if number is None else number for g, number in zip(given, numbers, strict=True)]


def compose(outer: Sequence[int], inner: Sequence[int]) -> list[int]:
    """The permutation that does ``inner`` and then ``outer``: axis i reads ``inner[outer[i]]``."""
    return [inner[axis] for axis in outer]


def permutation(node: Node) -> list[int]:
    """For each axis of the result, which axis of the operand it is."""
    args, rank = bound(node), len(shape_of(node))
    axes = list(range(rank))
    if is_op(node, aten.permute.default):
        return [int(d) % rank for d in args[1]]
    if is_op(node, aten.transpose.int, aten.swapaxes.default):
        first, second = (args[1] % rank, args[2] % rank) if rank else (0, 0)
        return [{first: second, second: first}.get(axis, axis) for axis in axes]
    if is_op(node, aten.t.default, aten.numpy_T.default):
        return axes[::-1]
    if is_op(node, aten.mT.default):
        return [*axes[:-2], axes[-1], axes[-2]]
    sources = [d % rank for d in (args[1] if isinstance(args[1], (list, tuple)) else [args[1]])]
    targets = [d % rank for d in (args[2] if isinstance(args[2], (list, tuple)) else [args[2]])]
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(axis for axis in axes if axis not in sources)
    return [moved[axis] if axis in moved else next(rest) for axis in axes]


def past_copies(node: Any) -> Any:  # noqa: ANN401 - an argument
    """What a value is a copy of."""
    while isinstance(node, Node) and node.target in COPIES:
        node = node.args[0]
    return node


def is_shared(node: Node, by: Node) -> bool:
    """Whether anybody but ``by`` reads a value, itself or through copies of it."""
    return any(
        user is not by and (user.target not in COPIES or is_shared(user, by)) for user in node.users
    )


class MergeReshapes(Rule):
    """``reshape(reshape(x)) -> reshape(x)``, for all that keep the order of elements."""

    name = "MergeReshapes"
    roots = RESHAPES

    def __init__(self, memory: Memory):
        self.memory = memory

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: a chain, its first part read by nobody else, sizes that are at hand."""
        inner = past_copies(node.args[0])
        if not isinstance(inner, Node) or inner.target not in RESHAPES:
            return None
        source = inner.args[0]
        assert isinstance(source, Node)
        before, after = shape_of(source), shape_of(node)
        parts: dict[str, Any] = {"source": source, "plan": None}
        if not same_sizes(before, after):
            if is_shared(inner, node):
                return self.refuse(node, f"{inner.name} has other users and would have to stay")
            given: Any = node.args[1] if node.target in _SIZED else None
            parts["plan"] = plan_reshape(before, after, given)
            if parts["plan"] is None:
                return self.refuse(node, "several of its sizes are known only at run time")
        objection = self.memory.objection(node, source, moves=True)
        return self.refuse(node, objection) if objection else Match(node, parts)

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One reshape, or none."""
        node, new, plan = match.root, match["source"], match["plan"]
        if plan is not None:
            new = rewriter.call(plan.target, (new, *plan.args), like=node)
        self.memory.replace(node, new, rewriter)


class NumberSizes(Rule):
    """``reshape(x, [sym_size(y, 0), 12, -1]) -> reshape(x, [-1, 12, 64])``."""

    name = "NumberSizes"
    roots = _SIZED

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: some size is read from an operator, and need not be."""
        given: Any = node.args[1]
        sizes = plain_sizes(shape_of(node), given)
        if sizes is None or _reads(sizes) >= _reads(given):
            return None
        return Match(node, {"sizes": sizes})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Write numbers."""
        rewriter.set_args(match.root, (match.root.args[0], match["sizes"]))


def _reads(sizes: Sequence[Any]) -> int:
    """How many sizes are computed at run time."""
    return sum(isinstance(size, Node) for size in sizes)


class MergePermutes(Rule):
    """``permute(permute(x, p), q) -> permute(x, p[q])``; ``x`` where the axes come back."""

    name = "MergePermutes"
    roots = PERMUTES

    def __init__(self, memory: Memory):
        self.memory = memory

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: a chain, its first part read by nobody else unless the axes come back."""
        inner = past_copies(node.args[0])
        if not isinstance(inner, Node) or inner.target not in PERMUTES:
            return None
        order = compose(permutation(node), permutation(inner))
        is_back = order == list(range(len(order)))
        if not is_back and is_shared(inner, node):
            return self.refuse(node, f"{inner.name} has other users and would have to stay")
        objection = self.memory.objection(node, inner, moves=node.args[0] is not inner)
        if objection:
            return self.refuse(node, objection)
        return Match(node, {"source": inner.args[0], "order": order})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One permutation, or none."""
        order, new = match["order"], match["source"]
        moved = [axis for axis, origin in enumerate(order) if axis != origin]
        if len(moved) == 2:
            new = rewriter.call(aten.transpose.int, (new, *moved), like=match.root)
        elif moved:
            new = rewriter.call(aten.permute.default, (new, order), like=match.root)
        self.memory.replace(match.root, new, rewriter)
