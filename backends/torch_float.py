"""Float layers in oneDNN's kernels: weights in its own layout, what follows fused into the kernel.

    act(conv2d(x, W) + b)      ->  mkldnn::_convolution_pointwise(x, pack(W), b, act)
    act(conv2d(x, W) + b + y)  ->  mkldnn::_convolution_pointwise.binary(x, y, pack(W), b, act)
    act(linear(x, W) + b)      ->  mkldnn::_linear_pointwise(x, pack(W), b, act)

torch brings a plain weight into the kernel's layout in every run; packed, that is done once, when
the file is loaded. Pictures go through in channels-last order, in which the kernels are fastest.

oneDNN's relu makes 0 of NaN, where torch's hands it on; nothing else differs but the last bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from planish.backends.torch_lowering import Lowering, Table, tensor_of
from planish.ir.ops import argument, aten, is_op, node_of

mkldnn = torch.ops.mkldnn
# With fewer rows than this a product reads its weight once and waits for memory: no layout helps.
FEWEST_ROWS = 8


class PostOp(NamedTuple):
    """An activation in the words of oneDNN."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


NO_POST_OP = PostOp()
_PLAIN = {
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.silu.default: "swish",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
}


def post_op(node: Node) -> PostOp | None:
    """An activation as oneDNN calls it; None for what it does not know."""
    if node.target in _PLAIN:
        return PostOp(_PLAIN[node.target])
    if is_op(node, aten.gelu.default):
        return PostOp("gelu", (), str(argument(node, "approximate")))
    if is_op(node, aten.leaky_relu.default):
        return PostOp("leaky_relu", (float(argument(node, "negative_slope")),))
    if is_op(node, aten.relu6.default):
        return PostOp("hardtanh", (0.0, 6.0))
    if is_op(node, aten.hardtanh.default):
        return _clamp(argument(node, "min_val"), argument(node, "max_val"))
    if is_op(node, aten.clamp.default):
        return _clamp(argument(node, "min"), argument(node, "max"))
    return None


def _clamp(low: object, high: object) -> PostOp | None:
    """None for open or computed bounds, and for crossed ones, which oneDNN refuses."""
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low > high:
        return None
    return PostOp("hardtanh", (float(low), float(high)))


# -- convolutions -----------------------------------------------------------------------------


def convolution(low: Lowering, node: Node) -> tuple[Any, ...] | None:
    """Operands of a float convolution that oneDNN takes: x, packed weight, bias and the rest.

    None where the kernel does not take it: other ranks and types, or a computed weight.
    """
    weight, x = low.program.constant(node.args[1]), tensor_of(node.args[0])
    if low.exportable or weight is None or x is None or not is_op(node, aten.conv2d.default):
        return None
    if x.dim() != 4 or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return None
    stride, padding, dilation = (list(argument(node, n)) for n in ("stride", "padding", "dilation"))
    if max(weight.shape[2:]) > 1 and list(weight.shape[2:]) == stride:
        return None  # patches: 14 ms in this kernel and 2 in torch's own, for 224 px cut by 14
    pairs = [values * 2 if len(values) == 1 else values for values in (padding, stride, dilation)]
    groups = int(argument(node, "groups"))
    packed = low.pack(
        (tuple(map(tuple, pairs)), groups),
        mkldnn._reorder_convolution_weight.default,
        low.value(node.args[1]),
        *pairs,
        groups,
        None,
    )
    bias = low.value(argument(node, "bias"))
    return channels_last(low, node_of(node.args[0])), packed, bias, *pairs, groups


def channels_last(low: Lowering, node: Node) -> Node:
    """A picture with its channels innermost; costs nothing where it lies so already."""
    made: Node = low.cached(
        ("channels last", node),
        lambda: low.call(
            aten.contiguous.default, low.value(node), memory_format=torch.channels_last
        ),
    )
    return made


def _conv(low: Lowering, node: Node) -> Node | None:
    return _conv_with(low, node, NO_POST_OP)


def _conv_with(low: Lowering, node: Node, post: PostOp) -> Node | None:
    operands = convolution(low, node)
    if operands is None:
        return None
    return low.call(
        mkldnn._convolution_pointwise.default,
        *operands,
        post.name,
        list(post.scalars),
        post.algorithm,
    )


def _sum_with(low: Lowering, node: Node, post: PostOp | None) -> Node | None:
    """A convolution and what is added to it, with an activation after."""
    if argument(node, "alpha") != 1 or not all(isinstance(a, Node) for a in node.args[:2]):
        return None
    if post is not None and (post.name != "relu"):
        return None
    first, second = node_of(node.args[0]), node_of(node.args[1])
    for conv, other in ((second, first), (first, second)):
        if not is_op(conv, aten.conv2d.default) or not low.alone(conv):
            continue
        if tensor_of(other) is None or tuple(other.meta["val"].shape) != tuple(
            conv.meta["val"].shape
        ):
            continue
        operands = convolution(low, conv)
        if operands is None or other.meta["val"].dtype != torch.float32:
            continue
        x, *rest = operands
        unary = post.name if post is not None else None
        return low.call(
            mkldnn._convolution_pointwise.binary,
            x,
            channels_last(low, other),
            *rest,
            "add",
            None,
            unary,
            [],
            None,
        )
    return None


# -- linear layers ----------------------------------------------------------------------------


def _linear(low: Lowering, node: Node) -> Node | None:
    return _linear_with(low, node, NO_POST_OP)


def _linear_with(low: Lowering, node: Node, post: PostOp) -> Node | None:
    weight, x = low.program.constant(node.args[1]), tensor_of(node.args[0])
    if low.exportable or weight is None or x is None or x.dim() < 2:
        return None
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.dim() != 2:
        return None
    if not weight.numel():
        return None
    if rows(low, node_of(node.args[0])) < FEWEST_ROWS:
        return None
    packed = low.pack(None, mkldnn._reorder_linear_weight.default, low.value(node.args[1]), None)
    return low.call(
        mkldnn._linear_pointwise.default,
        low.value(node.args[0]),
        packed,
        low.value(argument(node, "bias")),
        post.name,
        list(post.scalars),
        post.algorithm,
    )


def rows(low: Lowering, x: Node) -> int:
    """How many vectors a layer is given in the sample."""
    count = 1
    for size in low.shape(x)[:-1]:
        count *= size
    return count


# -- activations ------------------------------------------------------------------------------


def _activation(low: Lowering, node: Node) -> Node | None:
    """Into the kernel that makes its operand, where nobody else reads that."""
    post, before = post_op(node), node.args[0]
    if post is None or not isinstance(before, Node) or not low.alone(before):
        return None
    if is_op(before, aten.conv2d.default):
        return _conv_with(low, before, post)
    if is_op(before, aten.linear.default):
        return _linear_with(low, before, post)
    if is_op(before, aten.add.Tensor):
        return _sum_with(low, before, post)
    return None


FLOAT: Table = {
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.add.Tensor: lambda low, node: _sum_with(low, node, None),
    **dict.fromkeys(
        (
            *_PLAIN,
            aten.gelu.default,
            aten.leaky_relu.default,
            aten.relu6.default,
            aten.hardtanh.default,
            aten.clamp.default,
        ),
        _activation,
    ),
}
