"""Where an axis goes: values followed through operators that only move elements.

A fold may look past ``view``, ``transpose``, ``permute`` and their like. A scalar passes all of
them; a vector along one axis passes those that keep that axis whole, and comes out on another
axis. Nothing is edited here.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node

from planish.ir.ops import argument, is_op, op_name

aten = torch.ops.aten

_SAME = frozenset(
    {aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default}
)
_PERMUTING = frozenset(
    {
        aten.transpose.int,
        aten.permute.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.swapaxes.default,
        aten.t.default,
        aten.mT.default,
        aten.numpy_T.default,
    }
)
_REGROUPING = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.reshape_as.default,
        aten.view_as.default,
    }
)
_MEASURING = frozenset(
    {
        aten.sym_size.int,
        aten.sym_numel.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
    }
)

Axis = int | None  # None: every element alike, which needs no axis


def value(node: Node) -> Tensor:
    """The fake tensor that is a node's type."""
    return node.meta["val"]  # type: ignore[no-any-return]


def sizes(node: Node) -> tuple[Any, ...]:
    """A value's sizes as ints and symbolic expressions, which compare without adding guards."""
    shape: Any = value(node).shape  # torch declares ints only
    return tuple(d.node.expr if isinstance(d, SymInt) else d for d in shape)


def same_type(a: Node, b: Node) -> bool:
    """Whether two values have the same element type and sizes."""
    return value(a).dtype == value(b).dtype and sizes(a) == sizes(b)


def describe(node: Node) -> str:
    """A value in a reason: ``aten.relu``, or ``input x``, or ``constant w``."""
    kinds = {"placeholder": "input", "get_attr": "constant", "output": "result"}
    return (
        f"{kinds[node.op]} {node.name}"
        if node.op in kinds
        else f"{node.name} ({op_name(node.target)})"
    )


def only_moves(node: Node) -> bool:
    """Whether an operator returns the elements of its first argument, each once, moved or not."""
    if is_op(node, aten.dropout.default, aten.feature_dropout.default):
        return argument(node, "train") is False
    return is_op(node, *_SAME, *_PERMUTING, *_REGROUPING)


def axis_before(node: Node, axis: Axis) -> Axis:
    """The axis of ``node``'s operand that became its ``axis``; None: it was not kept whole."""
    return None if axis is None else _origins(node).get(axis)


def axis_after(node: Node, axis: Axis) -> Axis:
    """The axis of ``node`` that its operand's ``axis`` became; None: it was not kept whole."""
    return next((after for after, before in _origins(node).items() if before == axis), None)


def _origins(node: Node) -> dict[int, int]:
    """Output axis -> operand axis, for the axes that are kept whole."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    if is_op(node, *_PERMUTING):
        # Sizes 2, 3, 4, ... tell the axes apart, whatever the operator's arguments look like.
        probe = torch.empty(tuple(range(2, 2 + value(operand).dim())), device="meta")
        moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return {after: size - 2 for after, size in enumerate(moved.shape)}
    before, after = _places(sizes(operand)), _places(sizes(node))
    return {after[place]: before[place] for place in after.keys() & before.keys()}


def _places(shape: tuple[Any, ...]) -> dict[tuple[Any, Any], int]:
    """(size, stride in elements) -> axis. Axes of size 1 have no place of their own."""
    places, stride = {}, sympy.Integer(1)
    for axis in reversed(range(len(shape))):
        if shape[axis] != 1:
            places[sympy.sympify(shape[axis]), stride] = axis
        stride = sympy.expand(stride * shape[axis])
    return places


def producer(operand: Node, axis: Axis) -> tuple[Node, Axis]:
    """What makes ``operand``, past operators that only move elements.

    Returns:
        The operator, placeholder or constant, and the axis there that ``axis`` comes from. The
        axis is -1 where it does not come from one axis.
    """
    while only_moves(operand):
        if axis is not None:
            before = axis_before(operand, axis)
            axis = -1 if before is None else before
        operand = operand.args[0]  # type: ignore[assignment]
    return operand, axis


def value_users(node: Node) -> list[Node]:
    """The users that read a value's elements, and not only its sizes, which no fold changes."""
    return [user for user in node.users if not _measures(user, node)]


def _measures(user: Node, node: Node) -> bool:
    if is_op(user, aten.reshape_as.default, aten.view_as.default):
        return user.args[0] is not node
    return is_op(user, *_MEASURING)


def second_reader(made: Node, reader: Node) -> str | None:
    """Why the way from ``made`` down to ``reader`` is not private; None where it is."""
    node = made
    while node is not reader:
        users = value_users(node)
        if len(users) != 1:
            return f"{describe(node)} has {len(users)} users"
        node = users[0]
    return None


def readers(made: Node, axis: Axis) -> list[tuple[Node, Node, Axis]]:
    """Who uses a value, past operators that only move elements.

    Returns:
        (reader, the operand it reads, where ``axis`` is in that operand) for each reader.
    """
    found = []
    for user in value_users(made):
        if not only_moves(user):
            found.append((user, made, axis))
        elif axis is None:
            found.extend(readers(user, None))
        else:
            after = axis_after(user, axis)
            found.extend(readers(user, -1 if after is None else after))
    return found
