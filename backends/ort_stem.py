"""Neighboring pixels as channels of one, for convolutions of few channels.

    conv(x, W), x [N, C, .., X], stride s   ==   conv(x', W'), x' [N, m C, .., X / m], stride 1

along the last axis, where W' computes m / s neighboring results at once, as channels of its own:
[m / s * O, m C, .., k']. Most of W' is zero; still ONNX Runtime's kernel is two and a half times as
fast on it, because its fast form needs channels in fours (a picture has three), and works on 64
results at once. Channels last, neighbors lie side by side, so that both x' and the result are
only seen in another shape; from channels first, a transposition of m bytes at a time makes x'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import View
from planish.backends.ort_codes import channels_last, lies_last

if TYPE_CHECKING:
    import onnx_ir as ir

CHANNEL_STEP = 4  # input channels that the kernel multiplies at once


def pixels_to_merge(channels: int, size: object, results: object, stride: int) -> int | None:
    """How many neighbors to take as one; None where it cannot be done, or has no use.

    Args:
        channels: of the input.
        size: of its last axis.
        results: of the last axis of the result.
        stride: along it.
    """
    if channels % CHANNEL_STEP == 0 or not isinstance(size, int):
        return None
    count = next(m for m in (1, 2, 4) if channels * m % CHANNEL_STEP == 0)
    while count % stride:
        count += count
        if count > size:
            return None
    return count if size % count == 0 and results == size // stride else None


def merge_filter(
    weight: Tensor, stride: int, before: int, count: int, plane_major: bool
) -> tuple[Tensor, int, int]:
    """The filter W' on ``count`` merged neighbors.

    Args:
        weight: [O, C, .., k].
        stride: along the last axis.
        before: padding in front of the last axis.
        count: neighbors to merge, a multiple of ``stride``.
        plane_major: channels of x' are (channel, neighbor) and not (neighbor, channel).

    Returns:
        [count / stride * O, count * C, .., k'], and the padding before and after, in merged pixels.
    """
    outputs, channels, *middle, width = weight.shape
    results = count // stride
    first = -before // count
    last = ((results - 1) * stride - before + width - 1) // count
    shape = (results, outputs, count, channels, *middle, last - first + 1)
    merged = torch.zeros(shape, dtype=weight.dtype)
    for result in range(results):
        for tap in range(width):
            pixel = result * stride - before + tap
            merged[result, :, pixel % count, ..., pixel // count - first] = weight[..., tap]
    if plane_major:
        merged = merged.transpose(2, 3)
    goal = (results * outputs, count * channels, *middle, last - first + 1)
    return merged.reshape(goal).contiguous(), -first, last


def merged_image(e: Emitter, view: View, count: int) -> tuple[ir.Value, bool]:
    """The merged image with its channels last, and whether they are (channel, neighbor).

    Args:
        e: the emitter.
        view: codes, seen as [N, C, .., X].
        count: neighbors to merge.
    """
    batch, channels, *middle, width = view.shape
    columns = int(width) // count
    goal = (batch, *middle, columns, int(channels) * count)
    if lies_last(view):
        image = channels_last(e, view)
        return e.materialize(View(image, (batch, *middle, width, channels), goal)), False
    rows = 1
    for size in (*middle, columns):
        rows = rows * size
    split = (batch, channels, rows, count)
    turned = View(e.materialize(view), view.shape, split, (0, 2, 1, 3))
    image = e.materialize(turned)
    return e.materialize(View(image, turned.shape, goal)), True
