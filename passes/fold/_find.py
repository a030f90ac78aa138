"""Which layer a value comes from or goes to, and why not."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, is_op
from planish.ir.program import Program
from planish.passes.fold._axes import (
    Axis,
    describe,
    producer,
    readers,
    second_reader,
    sizes,
    value,
)
from planish.passes.fold._layers import (
    CONVOLUTION,
    CONVOLUTIONS,
    LINEAR,
    NORM,
    NORMS,
    TRANSPOSED,
    Layer,
    aten,
)


class Elsewhere(str):
    """The reason where there is no layer at all: a rule with many roots need not report it."""


def read_layer(node: Node, program: Program) -> Layer | str | None:
    """A node as a ``Layer``; a reason where its numbers are not constant; None for others."""
    if is_op(node, aten.linear.default, *NORMS):
        spatial, transposed, groups = 0, False, 1
    elif is_op(node, aten.convolution.default):
        spatial = len(argument(node, "stride"))
        transposed, groups = argument(node, "transposed"), argument(node, "groups")
    elif is_op(node, *CONVOLUTIONS, *TRANSPOSED):
        transposed, groups = node.target in TRANSPOSED, argument(node, "groups")
        spatial = (TRANSPOSED if transposed else CONVOLUTIONS)[node.target]
    else:
        return None
    numbers = _numbers_of(node, program)
    if isinstance(numbers, str):
        return numbers
    weight, bias = numbers
    if node.target not in NORMS and (weight is None or weight.dim() < 2):
        return f"the weight of {describe(node)} is no matrix"
    rank = value(node).dim()
    if node.target in NORMS:
        return _read_norm(node, weight, bias, rank)
    assert weight is not None
    if is_op(node, aten.linear.default):
        return Layer(node, LINEAR, rank - 1, weight.shape[0], weight, bias)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    axis = rank - spatial - 1  # an unbatched input has one axis less
    return Layer(node, CONVOLUTION, axis, channels, weight, bias, groups, transposed)


def _numbers_of(node: Node, program: Program) -> tuple[Tensor | None, Tensor | None] | str:
    found: list[Tensor | None] = []
    for role in ("weight", "bias"):
        if role == "bias" and is_op(node, aten.rms_norm.default):
            found.append(None)
            continue
        source = argument(node, role)
        tensor = program.constant(source)
        if source is not None and tensor is None:
            return f"the {role} of {describe(node)} is computed, not constant"
        if tensor is not None and not tensor.is_floating_point():
            return f"the {role} of {describe(node)} is {tensor.dtype}, not floating point"
        found.append(tensor)
    return found[0], found[1]


def _read_norm(node: Node, weight: Tensor | None, bias: Tensor | None, rank: int) -> Layer | str:
    if is_op(node, aten.layer_norm.default, aten.rms_norm.default):
        count = len(argument(node, "normalized_shape"))
        if count != 1:
            return f"{describe(node)} has a weight over {count} axes, not one per channel"
    axis = NORMS[node.target] % rank
    channels = sizes(node)[axis]
    if not isinstance(channels, int):
        return f"the number of channels of {describe(node)} is dynamic"
    return Layer(node, NORM, axis, channels, weight, bias)


def layer_before(
    reader: Node, operand: Node, axis: Axis, program: Program, *, kinds: tuple[str, ...]
) -> Layer | str:
    """The layer that ``operand`` of ``reader`` comes from, through a private chain of moves.

    Args:
        reader: the operator to be folded into that layer.
        operand: what it reads.
        axis: the axis of ``operand`` it acts on per channel; None if it acts on all alike.
        program: the program.
        kinds: which layers will do.

    Returns:
        The layer, whose channels are on that axis, or a reason.
    """
    made, at = producer(operand, axis)
    layer = read_layer(made, program)
    if isinstance(layer, str):
        return layer
    if layer is None or layer.kind not in kinds:
        return Elsewhere(f"it comes from {describe(made)}, which is no {' or '.join(kinds)}")
    if at == -1:
        return f"the channels of {describe(made)} are regrouped before it"
    if at is not None and at != layer.axis:
        return f"it acts on axis {at} of {describe(made)}, whose channels are axis {layer.axis}"
    return second_reader(made, reader) or layer


def layers_after(node: Node, axis: Axis, program: Program) -> list[Layer] | str:
    """The linears and convolutions that read a value, possibly moved; a reason if others do.

    Args:
        node: the operator to be folded into them.
        axis: the axis it acts on per channel; None if it acts on all alike.
        program: the program.
    """
    found: list[Layer] = []
    others: list[str] = []
    for reader, _, at in readers(node, axis):
        layer = _consumer(reader, at, program)
        if isinstance(layer, Layer):
            found.append(layer)
        else:
            others.append(layer)
    near = found or any(not isinstance(reason, Elsewhere) for reason in others)
    if others:
        return str(others[0]) if near else others[0]
    return found or Elsewhere("nothing reads it")


def _consumer(reader: Node, at: Axis, program: Program) -> Layer | str:
    # What it reads is its operand: the other arguments of a layer are constants.
    layer = read_layer(reader, program)
    if isinstance(layer, str):
        return layer
    if layer is None or layer.kind == NORM:
        reason = f"it is read by {describe(reader)}, which is no {LINEAR} or {CONVOLUTION}"
        return Elsewhere(reason)
    if at == -1:
        return f"the channels are regrouped before {describe(reader)}"
    if at is not None and at != layer.axis:
        return f"it acts on axis {at} of {describe(reader)}, whose channels are axis {layer.axis}"
    return layer
