"""Where channels can be scaled: a value, the products that read it, and what makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op, node_of
from planish.ir.program import Program
from planish.passes.fold._axes import axis_after, only_moves, producer, value_users
from planish.passes.rounding.targets import Weight

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_VALUE_OPERAND: dict[Any, int] = {aten.addmm.default: 1}


@dataclass(frozen=True)
class Site:
    """A value with channels along its last axis.

    Attributes:
        root: the value.
        products: what multiplies it by constants, in program order.
        weights: of each of them.
        inner: users of the value that lead to these products only.
        outer: its other users.
        maker: the norm or linear whose own numbers can take a scale of the value; None for none.
    """

    root: Node
    products: tuple[Node, ...]
    weights: tuple[Weight, ...]
    inner: tuple[Node, ...]
    outer: tuple[Node, ...]
    maker: Node | None

    @property
    def cost(self) -> int:
        """How many operators a scale adds."""
        return int(bool(self.outer) or self.maker is None)

    def columns(self) -> Tensor:
        """All weights as ``[sum O, I]``."""
        return torch.cat([weight.rows().float() for weight in self.weights])


def find_sites(program: Program, weights: Sequence[Weight]) -> list[Site]:
    """Every value that products with these weights read, in program order.

    A weight that several products read is left out: they would have to agree on a scale.
    """
    by_reader = {w.readers[0]: w for w in weights if len(w.readers) == 1 and not w.is_convolution}
    roots: dict[Node, None] = {}
    for reader in by_reader:
        roots[_root(reader)] = None
    order = {node: i for i, node in enumerate(program.nodes)}
    found = []
    for root in sorted(roots, key=order.__getitem__):
        inner, outer, products = [], [], []
        for user in root.users:
            reached = _reached(user, root, by_reader)
            if reached:
                inner.append(user)
                products.extend(reached)
            else:
                outer.append(user)
        products.sort(key=order.__getitem__)
        if products and root.op == "call_function":
            own = tuple(by_reader[p] for p in products)
            maker = _maker(root)
            found.append(
                Site(root, tuple(products), own, tuple(inner), _values(outer, root), maker)
            )
    return found


def _values(users: list[Node], root: Node) -> tuple[Node, ...]:
    """Users that read the numbers, not only sizes."""
    reading = set(value_users(root))
    return tuple(user for user in users if user in reading)


def _root(reader: Node) -> Node:
    """The value behind the operand of a product, past operators that only move elements."""
    operand = reader.args[_VALUE_OPERAND.get(reader.target, 0)]
    assert isinstance(operand, Node)
    root, axis = producer(operand, operand.meta["val"].dim() - 1)
    return root if axis == root.meta["val"].dim() - 1 else operand


def _reached(user: Node, value: Node, by_reader: Mapping[Node, Weight]) -> list[Node]:
    """The products a user leads to, if it leads to nothing else; else nothing."""
    if user in by_reader:
        reads = sum(v is value for v in user.all_input_nodes)
        is_operand = user.args[_VALUE_OPERAND.get(user.target, 0)] is value
        return [user] if is_operand and reads == 1 else []
    if not only_moves(user):
        return []
    last = user.meta["val"].dim() - 1
    if axis_after(user, value.meta["val"].dim() - 1) != last:
        return []
    found = []
    for further in user.users:
        reached = _reached(further, user, by_reader)
        if not reached:
            return []
        found.extend(reached)
    return found


# -- what makes a value ---------------------------------------------------------------------------


def _maker(root: Node) -> Node | None:
    """The norm or linear that can take the inverse scale, whatever else reads ``root``."""
    if is_op(root, *NORMS):
        return root if len(argument(root, "normalized_shape")) == 1 else None
    if is_op(root, aten.linear.default):
        return root
    if is_op(root, aten.relu.default):
        return _linear(root.args[0])
    if is_op(root, aten.mul.Tensor):
        # A gated unit: act(gate) * up; the gate's side is no place for a scale.
        for side, other in (root.args[:2], root.args[1::-1]):
            linear = _linear(side)
            # A square would take the scale twice.
            if linear is not None and side is not other and _shape(side) == _shape(other):
                return linear
    return _value_projection(root)


def _linear(value: object) -> Node | None:
    """A linear that a single operator reads."""
    if not isinstance(value, Node) or not is_op(value, aten.linear.default):
        return None
    return value if len(value.users) == 1 else None


def _shape(value: object) -> tuple[str, ...]:
    """Sizes as text, which compares symbolic ones without adding guards."""
    if not isinstance(value, Node):
        return ()
    return tuple(str(size) for size in value.meta["val"].shape)


def _value_projection(root: Node) -> Node | None:
    """The linear that makes the values of an attention whose heads ``root`` holds side by side.

    Attention mixes tokens, never channels: channel j of head h of its result is made of channel j
    of head h of its values.
    """
    way, width = root, _shape(root)[-1]
    joined = _alone(way, aten.reshape.default, aten.view.default, aten.flatten.using_ints)
    if joined is None:
        return None
    way = joined
    while is_op(way, aten.contiguous.default, aten.clone.default):
        way = node_of(way.args[0])
    heads = _swapped(way)
    if not is_op(heads, aten.scaled_dot_product_attention.default) or len(heads.users) != 1:
        return None
    values = heads.args[2]
    if not isinstance(values, Node) or len(values.users) != 1:
        return None
    split = _swapped(values)
    if split is None or len(split.users) != 1 or _shape(split)[-2:] != _shape(way)[-2:]:
        return None
    linear = _alone(split, aten.view.default, aten.reshape.default, aten.unflatten.int)
    if linear is None or _shape(linear)[-1] != width or len(_shape(linear)) != 3:
        return None
    return _linear(linear)


def _alone(node: Node, *targets: object) -> Node | None:
    """The operand of one of these operators, which nothing else reads."""
    if not is_op(node, *targets):
        return None
    operand = node.args[0]
    return operand if isinstance(operand, Node) and len(operand.users) == 1 else None


def _swapped(node: object) -> Node | None:
    """The operand of a transpose of axes 1 and 2 of four."""
    if not isinstance(node, Node) or node.meta["val"].dim() != 4:
        return None
    axes: tuple[Any, ...] = node.args[1:3]
    if is_op(node, aten.transpose.int) and {int(a) % 4 for a in axes} == {1, 2}:
        return node_of(node.args[0])
    if is_op(node, aten.permute.default) and list(axes[0]) == [0, 2, 1, 3]:
        return node_of(node.args[0])
    return None
