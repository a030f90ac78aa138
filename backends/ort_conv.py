"""Convolutions as QLinearConv of ONNX Runtime, with channels last.

    quantize(clamp(conv(dq(x), dq(W), dq(b))))  ->  QLinearConv(x, W, b)

Its kernel reads and writes [N, .., C]; on x86 it is fast where weights are int8 with a zero point
of 0, input channels come in fours (or each channel has a filter of its own, with channels in
sixteens), and output channels number at least 16. What the program pads in front of it the kernel
pads as it goes. A convolution of few channels, such as the first of a network, is fed neighboring
pixels as channels of one: see ``ort_stem``.

A convolution whose result somebody needs as real numbers has no such form: QLinearConv rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_padding import image_padding
from planish.backends.onnx_quantize import Dequantized, dequantized, stored
from planish.backends.onnx_view import View
from planish.backends.ort_codes import (
    MICROSOFT,
    CodeMaker,
    Codes,
    Grid,
    channels_last,
    codes_of,
    from_last,
    grid_of,
    make_codes,
    parameters,
    seen_first,
)
from planish.backends.ort_stem import merge_filter, merged_image, pixels_to_merge
from planish.backends.ort_wide import is_wide, pieces
from planish.ir.ops import argument, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

# Rounding a bias to int32 changes a sum by half of this unit, which has to be the product's own.
_SAME_UNIT = 1e-5


@dataclass(frozen=True)
class Filter:
    """The constant operands of an integer convolution.

    Attributes:
        codes: [O, C / groups, ..], int8 or uint8.
        scale: [O], or [] for one.
        zero: of all channels.
        bias: int32 [O] in units of the input's scale times ``scale``; None for none.
        names: of the program's constants: codes, scale, bias.
    """

    codes: Tensor
    scale: Tensor
    zero: int
    bias: Tensor | None
    names: tuple[Node, Node, Node | None]


@dataclass(frozen=True)
class Geometry:
    """How a filter moves: one number per spatial axis; pads are pairs (before, after)."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    groups: int


def _convolution(e: Emitter, node: Node, grid: Grid) -> View | None:
    x, weight = node_of(node.args[0]), argument(node, "weight")
    given, spatial = codes_of(e, x), weight.meta["val"].dim() - 2
    if given is None or len(node.users) != 1 or given.grid.dtype != grid.dtype:
        return None
    if len(x.meta["val"].shape) != spatial + 2:
        return None  # an image without a batch
    filter_ = read_filter(e, node, given.grid)
    if filter_ is None:
        return None
    given, geometry = _without_padding(e, x, given, read_geometry(node, spatial))
    dims = dims_of(node.meta["val"])
    count = _pixels(e, given, filter_, geometry, dims)
    if count is not None:
        return _merged(e, given, filter_, geometry, grid, dims, count)
    image = channels_last(e, given.view)
    if e.style.wide == "split" and is_wide(weight, geometry.groups):
        return seen_first(_in_pieces(e, image, given.grid, filter_, geometry, grid), dims)
    constants = _constants(e, filter_)
    return seen_first(_emit(e, image, given.grid, constants, filter_, geometry, grid), dims)


@dataclass(frozen=True)
class Constants:
    """A filter in the file."""

    codes: ir.Value
    scale: ir.Value
    bias: ir.Value | None


def _constants(e: Emitter, filter_: Filter, part: slice | None = None) -> Constants:
    """A filter in the file, or some of its output channels."""

    def some(tensor: Tensor, node: Node) -> ir.Value:
        if part is None or not tensor.dim():
            return stored(e, node, tensor)
        return stored(e, node, tensor[part].contiguous(), order=f".{part.start}-{part.stop}")

    codes, scale, bias = filter_.names
    return Constants(
        some(filter_.codes, codes),
        some(filter_.scale, scale),
        None if filter_.bias is None or bias is None else some(filter_.bias, bias),
    )


def _in_pieces(
    e: Emitter,
    image: ir.Value,
    source: Grid,
    filter_: Filter,
    geometry: Geometry,
    goal: Grid,
) -> ir.Value:
    """The convolution on some of its output channels at a time."""
    parts = [
        _emit(e, image, source, _constants(e, filter_, part), filter_, geometry, goal)
        for part in pieces(filter_.codes)
    ]
    return e.op("Concat", *parts, axis=-1)


def _emit(
    e: Emitter,
    image: ir.Value,
    source: Grid,
    constants: Constants,
    filter_: Filter,
    geometry: Geometry,
    goal: Grid,
) -> ir.Value:
    """Append the QLinearConv itself; ``image`` is [N, .., C]."""
    pads = [before for before, _ in geometry.pads] + [after for _, after in geometry.pads]
    # One zero point for all channels: the kernel reads each of several anew on every run.
    zero = e.constant(filter_.zero, filter_.codes.dtype)
    return e.op(
        "QLinearConv", image, *parameters(e, source), constants.codes, constants.scale, zero,
        *parameters(e, goal), constants.bias,
        domain=MICROSOFT, channels_last=1, kernel_shape=list(filter_.codes.shape[2:]), pads=pads,
        strides=list(geometry.strides), dilations=list(geometry.dilations), group=geometry.groups,
    )  # fmt: skip


# -- few channels -----------------------------------------------------------------------------


def _pixels(
    e: Emitter, given: Codes, filter_: Filter, geometry: Geometry, dims: Dims
) -> int | None:
    """How many pixels of the input to take as one; None for the plain form."""
    if e.style.stem != "merged" or geometry.groups != 1 or geometry.dilations[-1] != 1:
        return None
    size, channels = given.view.shape[-1], int(filter_.codes.shape[1])
    if filter_.zero or not all(isinstance(d, int) for d in given.view.shape[1:]):
        return None
    return pixels_to_merge(channels, size, dims[-1], geometry.strides[-1])


def _merged(
    e: Emitter,
    given: Codes,
    filter_: Filter,
    geometry: Geometry,
    grid: Grid,
    dims: Dims,
    count: int,
) -> View:
    """The convolution on merged pixels."""
    image, plane_major = merged_image(e, given.view, count)
    stride = geometry.strides[-1]
    codes, before, after = merge_filter(
        filter_.codes, stride, geometry.pads[-1][0], count, plane_major
    )
    times = count // stride

    def repeated(tensor: Tensor, node: Node) -> ir.Value:
        if not tensor.dim():
            return stored(e, node, tensor)
        return stored(e, node, tensor.repeat(times), order=f".x{times}")

    order = f".merged{count}{'p' if plane_major else ''}"
    constants = Constants(
        stored(e, filter_.names[0], codes, order=order),
        repeated(filter_.scale, filter_.names[1]),
        None if filter_.bias is None else repeated(filter_.bias, node_of(filter_.names[2])),
    )
    wide = Filter(codes, filter_.scale, filter_.zero, filter_.bias, filter_.names)
    strides = (*geometry.strides[:-1], 1)
    pads = (*geometry.pads[:-1], (before, after))
    moved = Geometry(strides, pads, geometry.dilations, 1)
    result = _emit(e, image, given.grid, constants, wide, moved, grid)
    batch, outputs, *middle, width = dims
    last = (batch, *middle, width, outputs)
    packed = (batch, *middle, int(width) // times, int(outputs) * times)
    return View(result, packed, last, from_last(len(dims)))


# -- operands ---------------------------------------------------------------------------------


def read_filter(e: Emitter, node: Node, source: Grid) -> Filter | None:
    """The constant operands of a convolution, where its kernel can take them.

    Args:
        e: the emitter.
        node: the convolution.
        source: the grid of its input.
    """
    weight = dequantized(argument(node, "weight"))
    if weight is None or weight.block or weight.axis not in (None, 0):
        return None
    codes, scale, zero = (e.known(n) for n in (weight.codes, weight.scale, weight.zero))
    if codes is None or scale is None or zero is None or codes.dtype not in _BYTES:
        return None
    if source.dtype == "int8" and codes.dtype is not torch.int8:
        return None
    if bool((zero != zero.reshape(-1)[0]).any()):
        return None  # the kernel knows one zero point for all channels
    scale = scale.reshape(()) if weight.axis is None else scale
    bias_node = argument(node, "bias")
    if bias_node is None:
        names = (weight.codes, weight.scale, None)
        return Filter(codes, scale, int(zero.reshape(-1)[0]), None, names)
    bias = dequantized(bias_node)
    added = None if bias is None else _bias_codes(e, bias, source.scale * scale)
    if bias is None or added is None:
        return None
    names_ = (weight.codes, weight.scale, bias.codes)
    return Filter(codes, scale, int(zero.reshape(-1)[0]), added, names_)


_BYTES = (torch.int8, torch.uint8)


def _bias_codes(e: Emitter, bias: Dequantized, unit: Tensor) -> Tensor | None:
    """An int32 bias, if it is in units of the products."""
    codes, scale = e.known(bias.codes), e.known(bias.scale)
    if bias.dtype != "int32" or codes is None or scale is None:
        return None
    zero = e.known(bias.zero)
    if zero is None or bool(zero.any()):
        return None
    near = torch.isclose(scale, unit.expand_as(scale), rtol=_SAME_UNIT, atol=0)
    return codes if bool(near.all()) else None


def read_geometry(node: Node, spatial: int) -> Geometry:
    """How the filter of a convolution moves."""
    padding = argument(node, "padding")
    strides, dilations = (_each(argument(node, n), spatial) for n in ("stride", "dilation"))
    if padding == "same":
        sizes = argument(node, "weight").meta["val"].shape[2:]
        totals = [d * (int(k) - 1) for d, k in zip(dilations, sizes, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in totals)  # torch puts the odd one after
    else:
        widths = _each(0 if padding == "valid" else padding, spatial)
        pads = tuple((w, w) for w in widths)
    return Geometry(strides, pads, dilations, int(argument(node, "groups")))


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else [int(v) for v in value]
    return tuple(values * count if len(values) == 1 else values)


# -- padding ----------------------------------------------------------------------------------


def _without_padding(
    e: Emitter, x: Node, given: Codes, geometry: Geometry
) -> tuple[Codes, Geometry]:
    """What the input's codes were padded from, and a geometry that pads instead."""
    quantize = x.args[0]
    padded = quantize.args[0] if isinstance(quantize, Node) and quantize.args else None
    pairs = image_padding(padded)
    if pairs is None or not isinstance(quantize, Node) or not isinstance(padded, Node):
        return given, geometry
    source = node_of(padded.args[0])
    grid = grid_of(e, quantize)
    if grid is None or not grid.same(given.grid):
        return given, geometry
    view = make_codes(e, source, grid) or _quantized(e, source, grid)
    joined = tuple(
        (a + before, b + after)
        for (a, b), (before, after) in zip(pairs, geometry.pads, strict=True)
    )
    moved = Geometry(geometry.strides, joined, geometry.dilations, geometry.groups)
    return Codes(view, grid), moved


def _quantized(e: Emitter, source: Node, grid: Grid) -> View:
    """QuantizeLinear of what the program pads first: zero has the same code before and after."""
    view = e.view(source)

    def make() -> ir.Value:
        return e.op("QuantizeLinear", view.base, *parameters(e, grid))

    return view.with_base(e.cached(("quantized", view.base, grid), make))


CONVOLUTIONS: dict[Any, CodeMaker] = dict.fromkeys(
    (
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    ),
    _convolution,
)  # fmt: skip
