"""Zeros that the program pads in front of a convolution, left to the convolution.

    conv(pad(x), pads=p)                 ->  Conv(x, pads=p + pad)
    conv(dq(q(pad(x))), pads=p)          ->  Conv(dq(q(x)), pads=p + pad)

Zero is zero on every grid, so padding and rounding may change places. aten's convolutions pad
alike on both sides, ONNX's each side by its own width; runtimes that look for integers right in
front of a convolution find them only so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import DEQUANTIZE, QUANTIZE, stored
from planish.backends.onnx_shapes import padding_pairs
from planish.ir.ops import argument, is_op, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

PADS = (aten.pad.default, aten.constant_pad_nd.default)
Pairs = list[tuple[int, int]]


def zero_padding(node: object) -> Pairs | None:
    """How much an operator pads with zeros, for each axis; None for any other operator."""
    if not isinstance(node, Node) or not is_op(node, *PADS):
        return None
    if is_op(node, aten.pad.default) and argument(node, "mode") != "constant":
        return None
    if argument(node, "value") not in (None, 0):
        return None
    pairs = padding_pairs(node)
    sizes = [size for pair in pairs for size in pair]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return None
    return [(int(before), int(after)) for before, after in pairs]


def image_padding(node: object) -> Pairs | None:
    """The padding of an image's spatial axes, where batch and channels are not padded."""
    pairs = zero_padding(node)
    if pairs is None or len(pairs) < 3 or any(pairs[0]) or any(pairs[1]):
        return None
    return pairs[2:]


def without_padding(e: Emitter, node: Node) -> tuple[ir.Value, Pairs] | None:
    """The operand of a convolution before it was padded, and by how much it was.

    Args:
        e: the emitter.
        node: the convolution.

    Returns:
        None where it was not padded with zeros along spatial axes only.
    """
    x = node.args[0]
    assert isinstance(x, Node)
    pairs = image_padding(x)
    if pairs is not None:
        return e.value(node_of(x.args[0])), pairs
    codes = x.args[0] if _per_tensor(x, DEQUANTIZE) else None
    if not isinstance(codes, Node) or not _per_tensor(codes, QUANTIZE):
        return None
    padded = node_of(codes.args[0])
    pairs = image_padding(padded)
    if pairs is None or codes.args[1:3] != x.args[1:3]:
        return None
    source = node_of(padded.args[0])
    if _per_tensor(source, DEQUANTIZE) and _same(e, source, x):
        return e.value(source), pairs
    nodes = [node_of(n) for n in x.args[1:3]]
    known = [k for k in map(e.known, nodes) if k is not None]
    if len(known) != len(nodes):
        return None
    grid = [stored(e, n, k.reshape(())) for n, k in zip(nodes, known, strict=True)]

    def make() -> ir.Value:
        e.at(x)  # these are its operators, wherever they are written
        result = e.op("DequantizeLinear", e.op("QuantizeLinear", e.value(source), *grid), *grid)
        e.at(node)
        return result

    return e.cached(("unpadded", source, *x.args[1:3]), make), pairs


def _per_tensor(node: Node, operator: object) -> bool:
    return is_op(node, operator) and argument(node, "axis") is None


def _same(e: Emitter, a: Node, b: Node) -> bool:
    """Whether two pairs write numbers alike."""
    if argument(a, "dtype") != argument(b, "dtype"):
        return False
    for mine, theirs in zip(a.args[1:3], b.args[1:3], strict=True):
        known = (e.known(mine), e.known(theirs))
        if mine is not theirs and (
            known[0] is None or known[1] is None or not bool((known[0] == known[1]).all())
        ):
            return False
    return True
