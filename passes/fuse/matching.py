"""What the passes of this family use to look at nodes.

A matcher walks from a root towards the leaves of an expression and collects the nodes in between
in ``seen``. Those die with the rewrite, so ``outside_user`` must find that nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op, op_name
from planish.ir.program import Program
from planish.ir.tensortype import dim_text

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)

_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})

# These return the values of their first argument; dropouts do in evaluation mode.
SAME_VALUES = (
    CASTS
    | _DROPOUTS
    | {
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    }
)

VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.dim,
        aten.unsqueeze.default,
    }
)

_POWERS: dict[Any, float] = {
    aten.square.default: 2.0,
    aten.sqrt.default: 0.5,
    aten.rsqrt.default: -0.5,
    aten.reciprocal.default: -1.0,
}

_FULL = frozenset({aten.full.default, aten.scalar_tensor.default})


def tensor_of(node: object) -> Tensor | None:
    """The (fake) tensor that stands for a node's value; None for numbers and tuples."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def shape_of(node: object) -> tuple[int | str, ...] | None:
    """Sizes as ints or texts, so that comparing them records no guard on a symbol."""
    value = tensor_of(node)
    return None if value is None else tuple(dim_text(size, {}) for size in value.shape)


def dtype_of(node: object) -> torch.dtype | None:
    """Element type of a tensor node; None for anything else."""
    value = tensor_of(node)
    return None if value is None else value.dtype


def is_identity(node: Any) -> bool:  # noqa: ANN401 - nodes or numbers
    """Whether a node returns its first argument's values in the same dtype and shape."""
    if is_op(node, aten.mul.Tensor, aten.div.Tensor):
        if isinstance(node.args[1], Node) or node.args[1] != 1:
            return False
    elif not is_op(node, *SAME_VALUES):
        return False
    if node.target in _DROPOUTS and argument(node, "train") and argument(node, "p"):
        return False
    return dtype_of(node) == dtype_of(node.args[0]) and shape_of(node) == shape_of(node.args[0])


def skip(node: Any, seen: list[Node] | None = None) -> Any:  # noqa: ANN401 - nodes or numbers
    """The first value towards the leaves that is not an identity."""
    while is_identity(node):
        if seen is not None:
            seen.append(node)
        node = node.args[0]
    return node


def is_widening(node: object) -> bool:
    """Whether a node casts floats to a wider float dtype, which changes no value."""
    if not is_op(node, *CASTS):
        return False
    assert isinstance(node, Node)
    before, after = dtype_of(node.args[0]), dtype_of(node)
    if before is None or after is None:
        return False
    return (
        before.is_floating_point
        and after.is_floating_point
        and torch.promote_types(before, after) == after
    )


def origin(node: Any) -> Any:  # noqa: ANN401 - nodes or numbers
    """The value behind identities and widening casts: two nodes with one origin are equal."""
    while is_identity(node) or is_widening(node):
        node = node.args[0]
    return node


def only_user(node: Node) -> Node | None:
    """The operator that alone reads this node, if there is exactly one."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.op == "call_function" else None


def last_identity(node: Node) -> Node:
    """The end of the chain of identities that alone read this node; itself where there is none."""
    while (user := only_user(node)) is not None and is_identity(user):
        node = user
    return node


def outside_user(seen: Iterable[Node], root: Node) -> Node | None:
    """The first collected node that somebody outside the match reads; None if there is none.

    Args:
        seen: interior nodes of a match.
        root: the node the rewrite replaces; who reads it does not matter.
    """
    interior = [node for node in seen if node is not root]
    inside = {*interior, root}
    return next((n for n in interior if any(user not in inside for user in n.users)), None)


def has_other_user(node: Node, what: str) -> str:
    """The reason every pass gives for such a node."""
    return f"{what} ({op_name(node.target)}) has another user, so it would be computed twice"


def scalar_of(value: object, program: Program) -> float | None:
    """A number, or the number in a constant with one element or a filled tensor; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    value = skip(value)
    constant = program.constant(value)
    if constant is not None:
        single = constant.numel() == 1 and constant.dim() == 0 and not constant.is_complex()
        return float(constant.item()) if single else None
    if is_op(value, *_FULL) and shape_of(value) == ():
        assert isinstance(value, Node)
        return scalar_of(value.args[-1], program)
    if is_op(value, *CASTS) and shape_of(value) == ():
        assert isinstance(value, Node)
        floats = (dtype_of(value) or torch.bool).is_floating_point
        return scalar_of(value.args[0], program) if floats else None
    return None


class Scaled(NamedTuple):
    """``factor * value``, one multiplication or division by a number."""

    value: Node
    factor: float


def scaled(node: object, program: Program) -> Scaled | None:
    """Read ``value * number``, ``number * value``, ``value / number`` or ``-value``."""
    if not isinstance(node, Node):
        return None
    if is_op(node, aten.neg.default):
        return Scaled(node.args[0], -1.0)  # type: ignore[arg-type]
    if not is_op(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return None
    left, right = node.args[0], argument(node, "other")
    number = scalar_of(right, program)
    if number is not None and isinstance(left, Node):
        if is_op(node, aten.mul.Tensor, aten.mul.Scalar):
            return Scaled(left, number)
        return Scaled(left, 1.0 / number) if number else None
    number = scalar_of(left, program)
    if number is not None and isinstance(right, Node) and is_op(node, aten.mul.Tensor):
        return Scaled(right, number)
    return None


def sides(node: Node) -> tuple[tuple[Any, Any], ...]:
    """Both orders of a commutative call's operands."""
    left, right = node.args[0], argument(node, "other")
    return ((left, right), (right, left))


def plain_sum(node: object) -> bool:
    """Whether a node adds two tensors with ``alpha=1``."""
    if not is_op(node, aten.add.Tensor):
        return False
    assert isinstance(node, Node)
    return bool(argument(node, "alpha") == 1)


def power_of(node: object) -> float | None:
    """The number ``p`` where a node computes ``x ** p``; ``x`` is its first argument."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is aten.pow.Tensor_Scalar:
        return float(argument(node, "exponent"))
    if node.target is aten.mul.Tensor and node.args[0] is argument(node, "other"):
        return 2.0
    return _POWERS.get(node.target)


def path(first: Node, stop: Node) -> Iterator[Node]:
    """The nodes from ``first`` up to the one before ``stop``, along single users."""
    while first is not stop:
        yield first
        first = next(iter(first.users))


def normal_dims(dims: Any, rank: int) -> tuple[int, ...]:  # noqa: ANN401 - int, list or None
    """Reduced dimensions counted from the front, in rising order; none or [] means all of them."""
    listed: Collection[int] = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return tuple(sorted(d % rank for d in listed))
