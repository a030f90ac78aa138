"""How units pass operators that treat every channel alike: arithmetic, norms, pooling, softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from planish.ir.ops import argument, aten, op_name
from planish.passes.prune.labels import Labels, shape_of

Rule = Callable[[Node, Labels], None]
RULES: dict[Any, Rule] = {}

UNARY = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.type_as.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.softplus.default,
    aten.mish.default,
    aten.celu.default,
    aten.selu.default,
    aten.bernoulli.p,
)


def rule(*targets: OpOverload) -> Callable[[Rule], Rule]:
    """Register how units pass some operators."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES
            RULES[target] = function
        return function

    return register


def tensors(node: Node) -> list[Node]:
    """The operands that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def carry(node: Node, operand: Node, axes: dict[int, int], reason: str, labels: Labels) -> None:
    """Operand's axes become the result's, index by index; its others cannot be cut."""
    for axis, out in axes.items():
        labels.same((operand, axis), (node, out))
    pin_others(node, operand, axes.keys(), reason, labels)
    pin_others(node, node, axes.values(), reason, labels)


def pin_others(reader: Node, value: Node, kept: Iterable[int], reason: str, labels: Labels) -> None:
    """Pin all axes of a value but some."""
    kept = set(kept)
    for axis in labels.labelled(value):
        if axis not in kept:
            labels.pin(value, axis, reader, reason)


def rank(node: Node) -> int:
    """How many axes a tensor value has."""
    shape = shape_of(node)
    return 0 if shape is None else len(shape)


def unknown(node: Node, labels: Labels) -> None:
    """What is said of an operator without a rule."""
    reason = f"no rule says how units pass {op_name(node.target)}"
    for value in (*tensors(node), node):
        labels.pin_value(value, node, reason)


def pointwise(node: Node, labels: Labels) -> None:
    """Operands are broadcast to the result's shape."""
    out = shape_of(node)
    if out is None:
        unknown(node, labels)
        return
    for operand in tensors(node)[: 1 if node.target is aten.type_as.default else None]:
        shape = shape_of(operand)
        assert shape is not None
        shift = len(out) - len(shape)
        for axis, size in enumerate(shape):
            if isinstance(size, int) and size != 1 and size == out[axis + shift]:
                labels.same((operand, axis), (node, axis + shift))
            else:
                labels.pin(operand, axis, node, "it is broadcast along its units")


for _target in UNARY:
    RULES[_target] = pointwise


def is_pointwise(target: object) -> bool:
    """Whether torch says that an operator works element by element."""
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags


def axes_of(node: Node, given: Any, count: int) -> list[int]:  # noqa: ANN401 - a number, a list or None
    """Axes named in an argument, counted from 0; all for None or an empty list."""
    if given is None or given == []:
        return list(range(count))
    return [d % count for d in ([given] if isinstance(given, int) else given)]


# -- over an axis -----------------------------------------------------------------------------


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.cumsum.default,
    aten.sort.default,
    aten.flip.default,
    aten.roll.default,
    aten.glu.default,
)
def _along(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    if shape_of(node) is None or node.target is aten.glu.default:
        unknown(node, labels)
        return
    name = "dims" if node.target in (aten.flip.default, aten.roll.default) else "dim"
    over = axes_of(node, argument(node, name), rank(operand))
    axes = {i: i for i in range(rank(operand)) if i not in over}
    carry(node, operand, axes, f"{op_name(node.target)} runs over its units", labels)


@rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.var.dim,
    aten.std.correction,
    aten.linalg_vector_norm.default,
    aten.argmax.default,
    aten.logsumexp.default,
    aten.any.dim,
    aten.prod.dim_int,
)
def _reduce(node: Node, labels: Labels) -> None:
    operand, keep = tensors(node)[0], bool(argument(node, "keepdim"))
    over = axes_of(node, argument(node, "dim"), rank(operand))
    left = [i for i in range(rank(operand)) if i not in over]
    axes = {axis: (axis if keep else i) for i, axis in enumerate(left)}
    carry(node, operand, axes, f"{op_name(node.target)} mixes its units", labels)


# -- norms ------------------------------------------------------------------------------------


@rule(aten.batch_norm.default, aten.instance_norm.default)
def _batch_norm(node: Node, labels: Labels) -> None:
    operand = tensors(node)[0]
    batch = node.target is aten.batch_norm.default
    axes = {i: i for i in range(rank(operand)) if batch or i < 2}
    carry(node, operand, axes, "an instance norm runs over it", labels)
    if batch and argument(node, "training"):
        unknown(node, labels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        given = argument(node, name)
        if isinstance(given, Node):
            labels.same((operand, 1), (given, 0))


@rule(aten.group_norm.default)
def _group_norm(node: Node, labels: Labels) -> None:
    operand, groups = tensors(node)[0], argument(node, "num_groups")
    carry(node, operand, {0: 0, 1: 1}, "a group norm runs over it", labels)
    shape = shape_of(operand)
    assert shape is not None
    if not isinstance(shape[1], int):
        return
    channel = np.arange(shape[1], dtype=np.int64)
    of_group = channel // (shape[1] // groups) * (shape[1] // groups)
    labels.tie((operand, 1), channel, (operand, 1), of_group)
    if groups == 1:
        labels.pin(operand, 1, node, "a group norm of one group runs over its units")
    for name in ("weight", "bias"):
        given = argument(node, name)
        if isinstance(given, Node):
            labels.same((operand, 1), (given, 0))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(node: Node, labels: Labels) -> None:
    operand = node.args[0]
    assert isinstance(operand, Node)
    over = len(argument(node, "normalized_shape"))
    axes = {i: i for i in range(rank(operand) - over)}
    reason = f"{op_name(node.target)} runs over its units"
    carry(node, operand, axes, reason, labels)
    for each in tensors(node)[1:]:
        labels.pin_value(each, node, reason)


# -- pictures ---------------------------------------------------------------------------------


def _windows(node: Node, labels: Labels) -> None:
    operand, name = tensors(node)[0], op_name(node.target)
    if shape_of(node) is None:
        unknown(node, labels)
        return
    over = next((int(d) for d in "123" if f"{d}d" in name), 0)
    leading = {i: i for i in range(rank(operand) - over)} if over else {0: 0, 1: 1}
    carry(node, operand, leading, f"{name} moves over it", labels)


for _name in (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d reflection_pad1d "
    "reflection_pad2d replication_pad2d upsample_nearest1d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d"
).split():
    for _overload in getattr(aten, _name).overloads():
        RULES[getattr(getattr(aten, _name), _overload)] = _windows


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(node: Node, labels: Labels) -> None:
    operand, pad = tensors(node)[0], argument(node, "pad")
    count = rank(operand)
    padded = {count - 1 - i // 2 for i, amount in enumerate(pad) if amount != 0}
    axes = {i: i for i in range(count) if i not in padded}
    carry(node, operand, axes, "it is padded along its units", labels)
