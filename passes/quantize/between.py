"""The operators between products that can stay in integers; ``regions`` says where they do."""

from __future__ import annotations

import operator

from torch.fx import Node

from planish.ir.ops import argument, aten, is_op

# Right behind a product they leave nothing to do: a zero point of 0 is the clamp.
CLAMPS = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
    }
)

# They choose among values, so what they read and what they give share one scale.
MOVERS = frozenset(
    {
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.cat.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.slice.Tensor,
        aten.select.int,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.constant_pad_nd.default,
        aten.pad.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest2d.default,
        aten.pixel_shuffle.default,
        aten.channel_shuffle.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        operator.getitem,
    }
)

# They make new values, with scales of their own.
OTHERS = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.mean.dim,
        aten.sigmoid.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.silu.default,
        aten.tanh.default,
        aten.leaky_relu.default,
        aten.upsample_bilinear2d.vec,
    }
)

# Of the movers, those that give a list; its items come by getitem.
LISTS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})


def obstacle(node: Node) -> str | None:
    """Say what an integer kernel cannot do about a call."""
    if is_op(node, aten.add.Tensor, aten.sub.Tensor) and argument(node, "alpha") != 1:
        return "its alpha is not 1"
    if is_op(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor) and not isinstance(
        argument(node, "other"), Node
    ):
        return "one of its operands is a plain number"
    if is_op(node, aten.constant_pad_nd.default) and argument(node, "value") != 0:
        return "it pads with something else than 0"
    if is_op(node, aten.pad.default) and (
        argument(node, "mode") == "constant" and argument(node, "value")
    ):
        return "it pads with something else than 0"
    if is_op(node, aten.mean.dim) and argument(node, "dtype") is not None:
        return "it computes in another dtype"
    return None
