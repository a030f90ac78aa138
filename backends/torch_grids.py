"""Quantized values in plain torch: grids, codes, and the way from real numbers and back.

Codes of activations are plain uint8 tensors, as oneDNN's kernels take them. torch's own quantized
tensors appear only between two neighbors: ``quantize_per_tensor`` is the one vectorized way to
round (``int_repr`` copies ten times slower than it rounds, so its storage is taken over), and
``quantized::add`` and the pools compute on codes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.torch_lowering import Lowering
from planish.ir.ops import argument, aten, is_op, node_of
from planish.ir.quantscheme import spread

_PICTURE = 4
QUANTIZE = torch.ops.planish.quantize.default
DEQUANTIZE = torch.ops.planish.dequantize.default
DYNAMIC = torch.ops.planish.dynamic_quantize.default


@dataclass(frozen=True)
class Grid:
    """One scale and zero point for a whole tensor of uint8 codes."""

    scale: float
    zero: int


def grid_of(low: Lowering, node: Node) -> Grid | None:
    """The grid of a quantize or dequantize: per tensor, constant, of uint8; None for others."""
    scale, zero = (low.program.constant(a) for a in node.args[1:3])
    if scale is None or zero is None or argument(node, "dtype") != "uint8":
        return None
    if scale.numel() != 1 or argument(node, "block_size"):
        return None
    return Grid(float(scale), int(zero))


def grid_before(low: Lowering, node: object) -> Grid | None:
    """The grid of a dequantized activation; None for anything else."""
    if not is_op(node, DEQUANTIZE) or low.program.constant(node.args[0]) is not None:
        return None
    return grid_of(low, node)


def codes(low: Lowering, node: Node) -> Node:
    """The codes behind a dequantized activation."""
    made: Node = low.value(node.args[0])
    return made


def round_to(low: Lowering, x: Node, grid: Grid, rank: int) -> Node:
    """Real numbers as uint8 codes."""
    rounded = low.call(aten.quantize_per_tensor.default, x, grid.scale, grid.zero, torch.quint8)
    return storage(low, rounded, rank)


def storage(low: Lowering, rounded: Node, rank: int) -> Node:
    """The codes of a quantized tensor of this rank, without a copy: pictures lie channels-last."""
    if rank == _PICTURE:
        last = low.call(aten.contiguous.default, rounded, memory_format=torch.channels_last)
        flat = _taken(low, low.call(aten.permute.default, last, [0, 2, 3, 1]))
        return low.call(aten.permute.default, flat, [0, 3, 1, 2])
    return _taken(low, low.call(aten.contiguous.default, rounded))


def _taken(low: Lowering, rounded: Node) -> Node:
    empty = low.call(aten.empty.memory_format, [0], dtype=torch.uint8)
    sizes = low.call(SIZES, rounded)
    strides = low.call(STRIDES, rounded)
    return low.call(aten.set_.source_Tensor_storage_offset, empty, rounded, 0, sizes, strides)


def quantized_tensor(low: Lowering, plain: Node, grid: Grid) -> Node:
    """uint8 codes as one of torch's quantized tensors."""
    made: Node = low.cached(
        ("quantized", plain, grid),
        lambda: low.call(
            aten._make_per_tensor_quantized_tensor.default, plain, grid.scale, grid.zero
        ),
    )
    return made


@cache
def expect_quantized_tensors() -> None:
    """Have torch say now, unheard, that its quantized tensors are deprecated.

    It says so once in a process, from C++ straight to stderr, where no filter reaches; unless it is
    a call from Python, as here, that makes it say it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def sizes_of(x: Tensor) -> list[int]:
    """All sizes of a tensor, as a list: TorchScript's ``x.size()``."""
    return list(x.shape)


def strides_of(x: Tensor) -> list[int]:
    """All strides of a tensor, as a list: TorchScript's ``x.stride()``."""
    return list(x.stride())


SIZES, STRIDES = sizes_of, strides_of


# -- weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A weight in codes: int8, symmetric, one scale for each output, as oneDNN takes it."""

    codes: Node  # of the program: a constant
    scale: Tensor  # [outputs], f32


def weight_of(low: Lowering, node: object) -> tuple[Weight | None, str]:
    """The integer weight behind a dequantize, or why the integer kernels do not take it."""
    if not is_op(node, DEQUANTIZE):
        return None, "its weight is not quantized"
    held = low.program.constant(node.args[0])
    scale, zero = (low.program.constant(a) for a in node.args[1:3])
    if held is None or scale is None or zero is None:
        return None, "its weight is computed"
    kind = argument(node, "dtype")
    if kind != "int8":
        return None, f"oneDNN takes int8 weights, and these are {kind}"
    if argument(node, "block_size"):
        return None, "oneDNN takes no scales of blocks"
    axis = argument(node, "axis")
    if axis is not None and axis % held.dim() != 0:
        return None, "its scales do not belong to outputs"
    if bool(zero.any()):
        return None, "oneDNN takes symmetric weights only"
    outputs = held.shape[0]
    per_output = scale.reshape(-1).expand(outputs) if scale.numel() == 1 else scale.reshape(-1)
    return Weight(node_of(node.args[0]), per_output.float().contiguous()), ""


def float_bias(low: Lowering, node: object) -> Node | None:
    """A bias in real numbers, whether the program holds it as integers or not."""
    if node is None:
        return None
    if is_op(node, DEQUANTIZE):
        held, scale, zero = (low.program.constant(a) for a in node.args[:3])
        if held is not None and scale is not None and zero is not None:
            name = str(node_of(node.args[0]).target)
            real = low.cached(("bias", node), lambda: _real(held, scale, zero, node))
            return low.constant(f"{name}_real", real)
    made: Node = low.value(node)
    return made


def _real(held: Tensor, scale: Tensor, zero: Tensor, node: Node) -> Tensor:
    axis, block = argument(node, "axis"), int(argument(node, "block_size"))
    shift = held.long() - spread(zero, held, axis, block).long()
    return (shift.double() * spread(scale, held, axis, block).double()).to(scale.dtype)
