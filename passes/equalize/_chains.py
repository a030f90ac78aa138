"""Two layers with an activation between them, as ``equalize-layers`` sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op, op_name
from planish.ir.program import Program
from planish.passes.fold._axes import describe, value_users

_CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default})
_CLAMPS = frozenset({aten.hardtanh.default, aten.relu6.default, aten.clamp.default})


@dataclass(frozen=True)
class Chain:
    """Two layers of which the second alone reads the first.

    Attributes:
        first: a convolution or linear.
        second: likewise; it may be depthwise.
        activation: between them; None for none.
        clamped: whether that is a clamp from 0 to ``bound``.
        bound: of the clamp.
        depthwise: whether each channel of the second reads one channel of the first.
        spatial: how many axes follow the channels.
    """

    first: Node
    second: Node
    activation: Node | None
    clamped: bool
    bound: float
    depthwise: bool
    spatial: int

    def columns(self, scale: Tensor, weight: Tensor) -> Tensor:
        """A scale [C] in a shape that multiplies the inputs of the second layer's weight."""
        shape = [1] * weight.dim()
        shape[0 if self.depthwise else 1] = -1
        return scale.reshape(shape)


def reads_weight(node: Node) -> bool:
    """Whether a node is a convolution or linear."""
    return is_op(node, aten.linear.default) or node.target in _CONVOLUTIONS


def find_chain(first: Node, program: Program) -> Chain | str | None:
    """The chain that begins at a layer; a sentence why not; None where no layer follows."""
    way, activation, clamped, bound = first, None, False, 0.0
    while True:
        users = value_users(way)
        if len(users) != 1:
            return f"{describe(way)} has {len(users)} users" if _layer_near(users) else None
        user = users[0]
        if user.op != "call_function":
            return None
        if reads_weight(user):
            break
        if is_op(user, aten.pad.default):
            mode, value = argument(user, "mode"), argument(user, "value")
            if mode != "constant" or value not in (None, 0, 0.0):
                return f"{describe(user)} pads with something else than zeros"
            if any(argument(user, "pad")[2 * _CONVOLUTIONS.get(first.target, 0) :]):
                return f"{describe(user)} pads the channels"
        elif activation is None and user.target in _HOMOGENEOUS:
            activation = user
        elif activation is None and user.target in _CLAMPS:
            limits = _limits(user)
            if limits is None or limits[0] != 0:
                return f"{describe(user)} is no clamp from 0"
            activation, clamped, bound = user, True, limits[1]
        elif _layer_near(value_users(user)):
            return f"a scale does not pass {op_name(user.target)}"
        else:
            return None
        way = user
    return _checked(first, user, way, activation, program, clamped=clamped, bound=bound)


def _checked(
    first: Node,
    second: Node,
    operand: Node,
    activation: Node | None,
    program: Program,
    *,
    clamped: bool,
    bound: float,
) -> Chain | str:
    if second.args[0] is not operand:
        return f"{describe(second)} reads it as its weight"
    if _CONVOLUTIONS.get(first.target, 0) != _CONVOLUTIONS.get(second.target, 0):
        return "its channels change their axis on the way"
    for layer in (first, second):
        for role in ("weight", "bias"):
            source = argument(layer, role)
            if source is None:
                continue
            if program.constant(source) is None:
                return f"the {role} of {layer.name} is not a constant in floating point"
            if len(source.users) != 1:
                return f"the {role} of {layer.name} is read {len(source.users)} times"
    depthwise = False
    if second.target in _CONVOLUTIONS:
        groups = int(argument(second, "groups"))
        weight = program.constant(argument(second, "weight"))
        assert weight is not None  # looked above
        depthwise = groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups
        if groups > 1 and not depthwise:
            return f"{describe(second)} has {groups} groups of several channels"
    return Chain(
        first, second, activation, clamped, bound, depthwise, _CONVOLUTIONS.get(first.target, 0)
    )


def _limits(node: Node) -> tuple[float, float] | None:
    """The bounds of a clamp, where both are numbers."""
    if is_op(node, aten.relu6.default):
        return 0.0, 6.0
    names = ("min_val", "max_val") if is_op(node, aten.hardtanh.default) else ("min", "max")
    low, high = (argument(node, name) for name in names)
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return float(low), float(high)
    return None


def _layer_near(users: list[Node]) -> bool:
    """Whether one of some users is a layer, so that a reason is of interest."""
    return any(reads_weight(user) for user in users)
