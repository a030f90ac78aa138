"""How units pass operators that sum over an axis: linears, products, convolutions, embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.passes.prune.labels import Labels, shape_of, sizes_of
from planish.passes.prune.rules_pointwise import pin_others, pointwise, rank, rule

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Contraction:
    """The axes an operator sums over: of what it reads, and of what it multiplies that by."""

    value: Node
    axis: int
    weight: Node
    weight_axis: int


def contraction(node: Node) -> Contraction | None:
    """What an operator sums over; None where it does not, or each channel by itself."""
    if is_op(node, aten.linear.default):
        value, weight = node.args[:2]
    elif is_op(node, *PRODUCTS, aten.addmm.default):
        value, weight = node.args[-2:]
        if rank(weight) >= 2 and rank(value) >= 1:  # type: ignore[arg-type]  # operands of a call are what its schema says
            axis = rank(weight) - 2  # type: ignore[arg-type]  # operands of a call are what its schema says
            return Contraction(value, rank(value) - 1, weight, axis)  # type: ignore[arg-type]  # operands of a call are what its schema says
        return None
    elif is_op(node, *CONVOLUTIONS, *TRANSPOSED):
        value, weight = node.args[:2]
        if is_depthwise(node):
            return None
        axis = 0 if is_op(node, *TRANSPOSED) else 1
        return Contraction(value, channel_axis(node), weight, axis)  # type: ignore[arg-type]  # operands of a call are what its schema says
    elif is_op(node, aten.scaled_dot_product_attention.default):
        value, weight = node.args[:2]
    else:
        return None
    last = rank(value) - 1, rank(weight) - 1  # type: ignore[arg-type]  # operands of a call are what its schema says
    return Contraction(value, last[0], weight, last[1])  # type: ignore[arg-type]  # operands of a call are what its schema says


def channel_axis(node: Node) -> int:
    """The axis of channels in what a convolution reads."""
    return rank(node.args[0]) - rank(node.args[1]) + 1  # type: ignore[arg-type]  # operands of a call are what its schema says


def is_depthwise(node: Node) -> bool:
    """Whether a convolution has a group for every channel it reads."""
    shape = shape_of(node.args[0])  # type: ignore[arg-type]  # operands of a call are what its schema says
    assert shape is not None
    groups = int(argument(node, "groups"))
    return groups != 1 and groups == shape[channel_axis(node)]


@rule(aten.linear.default)
def _linear(node: Node, labels: Labels) -> None:
    value, weight = node.args[:2]
    assert isinstance(value, Node)
    assert isinstance(weight, Node)
    last, out = rank(value) - 1, rank(node) - 1
    for axis in range(last):
        labels.same((value, axis), (node, axis))
    labels.same((value, last), (weight, rank(weight) - 1))
    bias = argument(node, "bias")
    if rank(weight) == 2:
        labels.same((weight, 0), (node, out))
        if isinstance(bias, Node):
            labels.same((bias, 0), (node, out))


@rule(*PRODUCTS)
def _product(node: Node, labels: Labels) -> None:
    a, b = node.args[:2]
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    if rank(a) < 2 or rank(b) < 2:
        for value in (a, b, node):
            labels.pin_value(value, node, "a product with a vector")
        return
    labels.same((a, rank(a) - 1), (b, rank(b) - 2))
    labels.same((a, rank(a) - 2), (node, rank(node) - 2))
    labels.same((b, rank(b) - 1), (node, rank(node) - 1))
    out = shape_of(node)
    assert out is not None
    for operand in (a, b):
        shape, shift = shape_of(operand), rank(node) - rank(operand)
        assert shape is not None
        for axis, size in enumerate(shape[:-2]):
            if isinstance(size, int) and size != 1 and size == out[axis + shift]:
                labels.same((operand, axis), (node, axis + shift))
            else:
                labels.pin(operand, axis, node, "it is broadcast along its units")


@rule(aten.addmm.default)
def _addmm(node: Node, labels: Labels) -> None:
    bias, a, b = node.args[:3]
    assert isinstance(bias, Node)
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    labels.same((a, 1), (b, 0))
    labels.same((a, 0), (node, 0))
    labels.same((b, 1), (node, 1))
    shape, out, shift = shape_of(bias), shape_of(node), 2 - rank(bias)
    assert shape is not None
    assert out is not None
    for axis, size in enumerate(shape):
        if size == out[axis + shift] != 1:
            labels.same((bias, axis), (node, axis + shift))


@rule(*CONVOLUTIONS, *TRANSPOSED)
def _convolution(node: Node, labels: Labels) -> None:
    value, weight = node.args[:2]
    assert isinstance(value, Node)
    assert isinstance(weight, Node)
    channel, transposed = channel_axis(node), is_op(node, *TRANSPOSED)
    for each, kept in ((value, channel + 1), (node, channel + 1), (weight, 2)):
        pin_others(node, each, range(kept), "a convolution moves over it", labels)
    if channel:
        labels.same((value, 0), (node, 0))
    bias, groups = argument(node, "bias"), argument(node, "groups")
    if isinstance(bias, Node):
        labels.same((bias, 0), (node, channel))
    rows, columns = (1, 0) if transposed else (0, 1)
    if groups == 1:
        labels.same((value, channel), (weight, columns))
        labels.same((node, channel), (weight, rows))
        return
    inputs, outputs = shape_of(value), shape_of(node)
    assert inputs is not None
    assert outputs is not None
    if transposed:
        for each in (value, node, weight):
            labels.pin_value(each, node, "a transposed convolution in groups")
        return
    into, out = int(inputs[channel]), int(outputs[channel])
    labels.same((node, channel), (weight, 0))
    of_out = np.arange(out, dtype=np.int64)
    if is_depthwise(node):
        labels.tie((node, channel), of_out, (value, channel), of_out // (out // into))
        return
    # Every group loses the same places.
    of_in = np.arange(into, dtype=np.int64)
    labels.tie((value, channel), of_in, (weight, 1), of_in % (into // groups))
    labels.tie((node, channel), of_out, (node, channel), of_out % (out // groups))


@rule(aten.embedding.default)
def _embedding(node: Node, labels: Labels) -> None:
    weight, indices = node.args[:2]
    assert isinstance(weight, Node)
    assert isinstance(indices, Node)
    labels.same((weight, 1), (node, rank(node) - 1))
    labels.pin(weight, 0, node, "which rows are read is known only at run time")
    for axis in range(rank(indices)):
        labels.same((indices, axis), (node, axis))


@rule(aten.scaled_dot_product_attention.default)
def _attention(node: Node, labels: Labels) -> None:
    q, k, v = node.args[:3]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    count = rank(node)
    if any(rank(x) != count for x in (q, k, v)):
        for value in (q, k, v, node):
            labels.pin_value(value, node, "an attention over operands of several ranks")
        return
    labels.same((q, count - 1), (k, count - 1))
    labels.same((v, count - 1), (node, count - 1))
    labels.same((q, count - 2), (node, count - 2))
    if argument(node, "is_causal"):
        for value in (q, node):
            labels.pin(value, count - 2, node, "a causal mask counts its units")
    for value in (k, v):
        labels.pin(value, count - 2, node, "a softmax runs over it")
    for axis in range(count - 2):
        sizes = [sizes_of(x)[axis] for x in (q, k, v)]
        if not all(isinstance(s, int) for s in sizes):
            for value in (q, k, v, node):
                labels.pin(value, axis, node, "an axis of dynamic size for another operand")
            continue
        grouped = axis == count - 3 and bool(argument(node, "enable_gqa"))
        of_q = np.arange(int(sizes[0]), dtype=np.int64)
        for value, size in ((node, sizes_of(node)[axis]), (k, sizes[1]), (v, sizes[2])):
            if size == sizes[0]:
                labels.same((q, axis), (value, axis))
            elif grouped and int(sizes[0]) % int(size) == 0:
                labels.tie((q, axis), of_q, (value, axis), of_q // (sizes[0] // size))
            else:
                labels.pin(q, axis, node, "it is broadcast along its units")
                labels.pin(value, axis, node, "it is broadcast along its units")
    _mask(node, labels)


def _mask(node: Node, labels: Labels) -> None:
    """The mask is broadcast to [..., heads, queries, keys]."""
    mask, out = argument(node, "attn_mask"), shape_of(node)
    if not isinstance(mask, Node):
        return
    shape, shift = shape_of(mask), rank(node) - rank(mask)
    assert shape is not None
    assert out is not None
    for axis, size in enumerate(shape[:-1]):
        if size == out[axis + shift] and isinstance(size, int) and size != 1:
            labels.same((mask, axis), (node, axis + shift))
    labels.pin(mask, rank(mask) - 1, node, "a softmax runs over it")


__all__ = ["CONVOLUTIONS", "Contraction", "channel_axis", "contraction", "pointwise"]
