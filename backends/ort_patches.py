"""Convolutions of integers whose windows touch but do not overlap: products of patches.

A vision transformer begins with one: kernel and stride are the size of a patch. Where its result
stays real (what reads integers is a QLinearConv, see ``ort_conv``), the runtime has no kernel for
it; the codes of each patch in a row, it is a product like any other.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from planish.backends.onnx_conv import per_axis
from planish.backends.onnx_dims import Dims, dims_of, product
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import dequantized
from planish.backends.onnx_view import Table, View, dtype_of
from planish.backends.ort_matmul import Left, Product, Right, as_right, bias_of, scalars
from planish.ir.ops import argument, aten

_EIGHT_BITS = ("int8", "uint8")


def _convolution(e: Emitter, node: Node) -> View | None:
    x, bias = dequantized(node.args[0]), argument(node, "bias")
    if x is None or x.axis is not None or x.dtype not in _EIGHT_BITS:
        return None
    grid = _grid(node)
    right = _right(e, node.args[1])
    if grid is None or right is None or dtype_of(node.meta["val"]) is not torch.float32:
        return None
    b, channels, down, high, across, wide = grid
    patches = e.materialize(
        View(e.value(x.codes), dims_of(x.codes.meta["val"]), grid, (0, 2, 4, 1, 3, 5))
    )
    apart: Dims = (b, down, across, channels, high, wide)
    flat: Dims = (b * down * across, product((channels, high, wide)))
    rows = View(patches, apart, flat)
    left = Left(e.materialize(rows), rows, *scalars(e, x))
    name = "" if bias is None else f"{bias.name}.real"
    columns = right.codes.shape[1]
    value = Product(left, right, bias_of(e, bias), name, 0, columns).emit(e)
    dims: Dims = (flat[0], columns)
    e.describe(value, node.meta["val"], dims)
    return View(value, dims, (b, down, across, columns), (0, 3, 1, 2))


def _grid(node: Node) -> Dims | None:
    """The image as ``[B, C, rows of patches, height, columns of patches, width]``."""
    image, weight = (n.meta["val"] for n in node.args[:2] if isinstance(n, Node))
    stride = per_axis(argument(node, "stride"), 2)
    plain = (
        per_axis(argument(node, "padding"), 2) == [0, 0]
        and per_axis(argument(node, "dilation"), 2) == [1, 1]
        and int(argument(node, "groups")) == 1
    )
    if not plain or image.dim() != 4 or stride != [int(s) for s in weight.shape[2:]]:
        return None
    b, channels, height, width = dims_of(image)
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    if height % stride[0] or width % stride[1]:
        return None
    return (b, channels, height // stride[0], stride[0], width // stride[1], stride[1])


def _right(e: Emitter, weight: object) -> Right | None:
    """The weight as ``[pixels of a patch, out]``."""
    q = dequantized(weight)
    if q is None or q.block or q.axis not in (None, 0) or q.dtype not in _EIGHT_BITS:
        return None
    known, scale, zero = (e.known(n) for n in (q.codes, q.scale, q.zero))
    if known is None or scale is None or zero is None:
        return None
    return as_right(q, known.flatten(1).t(), scale, zero, ".T")


ORT_PATCHES: Table = {aten.conv2d.default: _convolution}
