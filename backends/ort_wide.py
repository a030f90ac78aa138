"""Convolutions with more weights than a core's cache holds, in pieces of their output channels.

    conv(x, W)   ->   concat(conv(x, W[:h]), conv(x, W[h:])) along channels

ONNX Runtime cuts the pixels of a convolution into at least five tasks even on one thread, and each
task reads all weights. Where they exceed the second-level cache, each task fetches them from
farther away; a piece that fits is fetched once. The result is the same to the bit: channels do not
know of each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.fx import Node

import planish.ir.operators  # noqa: F401 - registers torch.ops.planish
from planish.ir.ops import argument

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of weights in a piece: of the 2 MiB that a server's core has, what pixels leave over. In
# ONNX Runtime 1.32 on such a machine (AVX-512 VNNI) 3x3 filters of 512 channels at 7x7 run 1.13
# times as fast in two pieces as whole, and no faster in four.
PIECE_BYTES = 5 * 2**18
CHANNEL_BLOCK = 64  # output channels that the kernel computes at once


def is_wide(weight: object, groups: int) -> bool:
    """Whether a filter's codes are more than one piece.

    Args:
        weight: the filter [O, C / groups, ..] of a convolution, one byte for each weight.
        groups: of the convolution.
    """
    if not isinstance(weight, Node) or groups != 1:
        return False
    shape = tuple(weight.meta["val"].shape)
    if not all(isinstance(n, int) for n in shape):
        return False
    return bool(math.prod(shape) > PIECE_BYTES and shape[0] > CHANNEL_BLOCK)


def is_wide_convolution(node: Node) -> bool:
    """Whether a convolution of integers has a filter of more than one piece."""
    from planish.backends.onnx_quantize import dequantized

    if dequantized(node.args[0]) is None or dequantized(argument(node, "weight")) is None:
        return False
    return is_wide(argument(node, "weight"), int(argument(node, "groups")))


def pieces(codes: Tensor) -> list[slice]:
    """The output channels of each piece of a filter [O, C, ..], in order.

    All but the last have a multiple of the kernel's block of channels.
    """
    outputs = len(codes)
    count = -(-codes.numel() // PIECE_BYTES)
    step = -(-outputs // (count * CHANNEL_BLOCK)) * CHANNEL_BLOCK
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
