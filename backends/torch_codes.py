"""Quantize and dequantize of any granularity in operators of plain torch.

    per tensor, uint8        quantize_per_tensor, and torch's own dequantize (TorchScript only)
    anything else            round(x / s) + z, saturated; (q - z) * s
    a constant               its codes stay in the file (4-bit ones two to a byte) and become real
                             numbers when the file is loaded

torch's kernels for weights alone (``_weight_int8pack_mm``, ``_weight_int4pack_mm_for_cpu``) are no
gain on a CPU in float32: 0.59 and 1.67 ms against 0.12 ms of the plain product for one row of
576 x 1536, and fifty times slower than it for 64 rows. So such weights are real numbers in memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_file import pack_nibbles
from planish.backends.torch_grids import (
    DEQUANTIZE,
    DYNAMIC,
    QUANTIZE,
    codes,
    grid_before,
    grid_of,
    quantized_tensor,
    round_to,
    storage,
)
from planish.backends.torch_lowering import PACK, Lowering, Table
from planish.ir.ops import argument, aten, node_of
from planish.ir.quantscheme import INTEGERS

_HALVES = ("int4", "uint4")
Call = Callable[..., Node]


def quantize(low: Lowering, node: Node) -> Node:
    """Real numbers as codes."""
    grid, x = grid_of(low, node), low.value(node.args[0])
    source = node_of(node.args[0]).meta["val"]
    if grid is not None and source.dtype == torch.float32 and not low.exportable:
        return round_to(low, x, grid, source.dim())
    kind = str(argument(node, "dtype"))
    smallest, largest, held = INTEGERS[kind]
    wide = torch.float64 if kind == "int32" else source.dtype  # its largest is no float32
    scale = low.call(aten.to.dtype, _parameter(low, node, 1, low.call), source.dtype)
    zero = low.call(aten.to.dtype, _parameter(low, node, 2, low.call), source.dtype)
    steps = low.call(aten.round.default, low.call(aten.div.Tensor, x, scale))
    shifted = low.call(aten.to.dtype, low.call(aten.add.Tensor, steps, zero), wide)
    return low.call(aten.to.dtype, low.call(aten.clamp.default, shifted, smallest, largest), held)


def dequantize(low: Lowering, node: Node) -> Node:
    """Codes as real numbers; dropped where kernels take the codes themselves."""
    grid = grid_before(low, node)
    if grid is not None and not low.exportable:
        return low.call(aten.dequantize.self, quantized_tensor(low, codes(low, node), grid))
    constant = all(low.program.constant(a) is not None for a in node.args[:3])

    def call(target: object, *args: object, **kwargs: object) -> Node:
        made = low.call(target, *args, **kwargs)
        if constant:
            made.meta[PACK] = True
        return made

    dtype = node.meta["val"].dtype
    wide = call(aten.to.dtype, _codes(low, node, call), torch.int32)
    zero = call(aten.to.dtype, _parameter(low, node, 2, call), torch.int32)
    steps = call(aten.to.dtype, call(aten.sub.Tensor, wide, zero), dtype)
    return call(aten.mul.Tensor, steps, _parameter(low, node, 1, call))


def _codes(low: Lowering, node: Node, call: Call) -> Node:
    """The integers; a constant of 4-bit ones is stored two to a byte."""
    held, kind = low.program.constant(node.args[0]), str(argument(node, "dtype"))
    if held is None or kind not in _HALVES:
        made: Node = low.value(node.args[0])
        return made
    name = f"{node_of(node.args[0]).target}_nibbles"
    halves = low.constant(name, low.cached(("nibbles", name), lambda: _nibbles(held)))
    pair = [
        call(aten.bitwise_and.Scalar, halves, 15),
        call(aten.bitwise_right_shift.Tensor_Scalar, halves, 4),
    ]
    flat = call(aten.reshape.default, call(aten.stack.default, pair, 1), [-1])
    whole = call(aten.slice.Tensor, flat, 0, 0, held.numel())
    shaped = call(aten.reshape.default, whole, list(held.shape))
    if kind == "uint4":
        return shaped
    signed = call(aten.to.dtype, shaped, torch.int8)  # 8 to 15 stand for -8 to -1
    return call(aten.sub.Scalar, call(aten.bitwise_xor.Scalar, signed, 8), 8)


def _nibbles(held: Tensor) -> Tensor:
    return pack_nibbles(held)


def _parameter(low: Lowering, node: Node, position: int, call: Call) -> Node:
    """A scale or zero point in a shape that broadcasts to what it belongs to."""
    source = node_of(node.args[position])
    value, axis = low.value(source), argument(node, "axis")
    block, rank = int(argument(node, "block_size")), node.meta["val"].dim()
    if axis is None:
        return call(aten.reshape.default, value, [])
    axis %= rank
    if not block:
        return call(aten.reshape.default, value, [-1 if d == axis else 1 for d in range(rank)])
    if source.meta["val"].shape[axis] == 1:
        made: Node = value
        return made
    size = node.meta["val"].shape[axis]
    repeated = call(aten.repeat_interleave.self_int, value, block, axis)
    return call(aten.slice.Tensor, repeated, axis, 0, size)


def _dynamic(low: Lowering, node: Node) -> tuple[Node, Node, Node] | None:
    """uint8 codes by the range of the values, exactly as the operator says."""
    if low.exportable or argument(node, "dtype") != "uint8" or argument(node, "per_token"):
        return _dynamic_formula(low, node)
    x = low.value(node.args[0])
    bounds = low.call(aten.aminmax.default, x)
    smallest = low.call(aten.clamp_max.default, low.call(operator.getitem, bounds, 0), 0.0)
    largest = low.call(aten.clamp_min.default, low.call(operator.getitem, bounds, 1), 0.0)
    scale = _nonzero(low, low.call(aten.sub.Tensor, largest, smallest), 255.0)
    ratio = low.call(aten.round.default, low.call(aten.div.Tensor, smallest, scale))
    zero = low.call(aten.clamp.default, low.call(aten.neg.default, ratio), 0, 255)
    integer = low.call(aten.to.dtype, zero, torch.int32)
    rounded = low.call(aten.quantize_per_tensor.tensor_qparams, x, scale, integer, torch.quint8)
    rank = node_of(node.args[0]).meta["val"].dim()
    return storage(low, rounded, rank), scale, low.call(aten.to.dtype, zero, torch.uint8)


def _nonzero(low: Lowering, span: Node, steps: float) -> Node:
    """``span / steps``, and 1 where that is 0."""
    scale = low.call(aten.div.Tensor, span, steps)
    none = low.call(aten.to.dtype, low.call(aten.eq.Scalar, scale, 0.0), torch.float32)
    return low.call(aten.add.Tensor, scale, none)


def _dynamic_formula(low: Lowering, node: Node) -> tuple[Node, Node, Node]:
    x, kind = low.value(node.args[0]), str(argument(node, "dtype"))
    smallest, largest, held = INTEGERS[kind]
    axes: tuple[Any, ...] = ([-1], True) if argument(node, "per_token") else ()
    low_end = low.call(aten.clamp_max.default, low.call(aten.amin.default, x, *axes), 0.0)
    high_end = low.call(aten.clamp_min.default, low.call(aten.amax.default, x, *axes), 0.0)
    if kind == "uint8":
        scale = _nonzero(low, low.call(aten.sub.Tensor, high_end, low_end), 255.0)
        ratio = low.call(aten.round.default, low.call(aten.div.Tensor, low_end, scale))
        zero = low.call(aten.clamp.default, low.call(aten.neg.default, ratio), smallest, largest)
    else:
        reach = low.call(aten.maximum.default, high_end, low.call(aten.neg.default, low_end))
        scale = _nonzero(low, reach, float(largest))
        zero = low.call(aten.zeros_like.default, scale)
    steps = low.call(aten.round.default, low.call(aten.div.Tensor, x, scale))
    inside = low.call(aten.clamp.default, low.call(aten.add.Tensor, steps, zero), smallest, largest)
    return low.call(aten.to.dtype, inside, held), scale, low.call(aten.to.dtype, zero, held)


def _getitem(low: Lowering, node: Node) -> Any:  # noqa: ANN401 - whatever the list holds
    whole = low.value(node.args[0])
    index = node.args[1]
    return whole[index] if isinstance(whole, tuple) and isinstance(index, int) else None


def _rotary(low: Lowering, node: Node) -> Node:
    """``x * cos + rotate(x) * sin``; pairs are halves, or neighbors."""
    x, cos, sin = (low.value(a) for a in node.args[:3])
    if argument(node, "interleaved"):
        even = low.call(aten.slice.Tensor, x, -1, 0, None, 2)
        odd = low.call(aten.neg.default, low.call(aten.slice.Tensor, x, -1, 1, None, 2))
        turned = low.call(
            aten.flatten.using_ints, low.call(aten.stack.default, [odd, even], -1), -2
        )
    else:
        half = node.meta["val"].shape[-1] // 2
        first = low.call(aten.slice.Tensor, x, -1, 0, half)
        second = low.call(aten.neg.default, low.call(aten.slice.Tensor, x, -1, half, 2 * half))
        turned = low.call(aten.cat.default, [second, first], -1)
    product = low.call(aten.mul.Tensor, x, cos)
    return low.call(aten.add.Tensor, product, low.call(aten.mul.Tensor, turned, sin))


CODES: Table = {
    torch.ops.planish.rotary_embedding.default: _rotary,
    QUANTIZE: quantize,
    DEQUANTIZE: dequantize,
    DYNAMIC: _dynamic,
    operator.getitem: _getitem,
}
