"""ONNX forms of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from planish.backends.onnx_dims import dim_of, dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_padding import without_padding
from planish.backends.onnx_view import Table, View, rank_of, source_of
from planish.ir.ops import argument, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten


def per_axis(value: int | Sequence[int], count: int) -> list[int]:
    """One number for each axis, where one may be given for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def with_batch(e: Emitter, node: Node, spatial: int) -> tuple[ir.Value, bool]:
    """The operand with a batch axis: torch takes images without one."""
    source = source_of(node)
    if rank_of(source) == spatial + 2:
        return e.value(source), False
    dims = dims_of(source.meta["val"])
    return e.materialize(View(e.value(source), dims, (1, *dims))), True


def without_batch(node: Node, value: ir.Value, added: bool) -> ir.Value | View:
    """The result without the batch axis that was added."""
    if not added:
        return value
    dims = dims_of(node.meta["val"])
    return View(value, (1, *dims), dims)


def _conv(e: Emitter, node: Node) -> ir.Value | View | None:
    weight, bias = node_of(node.args[1]), argument(node, "bias")
    spatial = rank_of(weight) - 2
    padding = argument(node, "padding")
    dilation = per_axis(argument(node, "dilation"), spatial)
    sizes = [dim_of(s) for s in weight.meta["val"].shape[2:]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    if padding == "same":
        # torch puts the odd element after.
        totals = [d * (int(k) - 1) for d, k in zip(dilation, sizes, strict=True)]
        pads = [t // 2 for t in totals] + [t - t // 2 for t in totals]
    else:
        pads = per_axis(0 if padding == "valid" else padding, spatial) * 2
    unpadded = without_padding(e, node)
    if unpadded is not None and len(unpadded[1]) == spatial:
        (x, pairs), added = unpadded, False
        pads = [
            p + q for p, q in zip(pads, [p[0] for p in pairs] + [p[1] for p in pairs], strict=True)
        ]
    else:
        x, added = with_batch(e, node, spatial)
    result = e.op(
        "Conv", x, e.value(weight), e.value(bias) if bias is not None else None,
        kernel_shape=sizes, strides=per_axis(argument(node, "stride"), spatial), pads=pads,
        dilations=dilation, group=int(argument(node, "groups")),
    )  # fmt: skip
    return without_batch(node, result, added)


def _conv_transpose(e: Emitter, node: Node) -> ir.Value | View:
    weight, bias = node_of(node.args[1]), argument(node, "bias")
    spatial = rank_of(weight) - 2
    x, added = with_batch(e, node, spatial)
    result = e.op(
        "ConvTranspose", x, e.value(weight), e.value(bias) if bias is not None else None,
        kernel_shape=[int(s) for s in weight.meta["val"].shape[2:]],
        strides=per_axis(argument(node, "stride"), spatial),
        pads=per_axis(argument(node, "padding"), spatial) * 2,
        output_padding=per_axis(argument(node, "output_padding"), spatial),
        dilations=per_axis(argument(node, "dilation"), spatial),
        group=int(argument(node, "groups")),
    )  # fmt: skip
    return without_batch(node, result, added)


CONVOLUTIONS: Table = {
    **dict.fromkeys(
        (
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
            aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
        ),
        _conv,
    ),
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
}  # fmt: skip
