"""``QuantScheme``: how real numbers are written as small integers, and the arithmetic of it.

A scheme says which integers there are, whether zero stands in their middle, and which elements
share one scale. The functions here are the arithmetic of ONNX QuantizeLinear and DequantizeLinear
and nothing else; the operators of ``planish.ir.quant_ops`` and every pass use them.

4-bit integers are held one to a byte, in int8 or uint8 tensors: torch computes on nothing smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

IntegerName = Literal["int8", "uint8", "int4", "uint4", "int16", "uint16", "int32"]
Granularity = Literal["tensor", "channel", "token", "block"]

# name -> smallest and largest integer, and the dtype that holds them
INTEGERS: dict[str, tuple[int, int, torch.dtype]] = {
    "int8": (-128, 127, torch.int8),
    "uint8": (0, 255, torch.uint8),
    "int4": (-8, 7, torch.int8),
    "uint4": (0, 15, torch.uint8),
    "int16": (-(2**15), 2**15 - 1, torch.int16),
    "uint16": (0, 2**16 - 1, torch.uint16),
    "int32": (-(2**31), 2**31 - 1, torch.int32),
}

# The smallest normal float32. What is below it loses digits, and processors may take it for zero.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How a tensor is quantized.

    Attributes:
        dtype: which integers.
        granularity: what shares one scale and zero point: the whole "tensor", a "channel" (index
            along ``axis``), a "token" (everything along the last axis), or a "block" of
            ``block_size`` consecutive elements along ``axis``.
        symmetric: zero is written as the integer in the middle: 0, or 128 (8) without sign.
        axis: of channels or blocks; None for tensor and token.
        block_size: elements in one block; 0 for all other granularities.
        narrow: leave out the smallest signed integer, so that -x can be written wherever x can.
        bits: use only this many bits of the integers, None for all: 7-bit operands cannot
            saturate the 16-bit sums of x86 processors without VNNI.
    """

    dtype: IntegerName = "int8"
    granularity: Granularity = "tensor"
    symmetric: bool = True
    axis: int | None = None
    block_size: int = 0
    narrow: bool = False
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in INTEGERS:
            raise ValueError(f"{self.dtype!r} is none of {', '.join(INTEGERS)}")
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"{self.granularity!r} is none of {', '.join(get_args(Granularity))}")
        if (self.axis is None) != (self.granularity in ("tensor", "token")):
            raise ValueError(f"granularity {self.granularity!r} with axis {self.axis}")
        if (self.block_size > 0) != (self.granularity == "block"):
            raise ValueError(f"granularity {self.granularity!r}, block size {self.block_size}")
        if self.bits is not None and not 2 <= self.bits <= self.storage_bits:
            raise ValueError(f"{self.dtype} cannot use {self.bits} bits")

    @property
    def storage_bits(self) -> int:
        """Bits that one element takes in a file."""
        return int(self.dtype.removeprefix("u").removeprefix("int"))

    @property
    def signed(self) -> bool:
        """Whether the integers have a sign."""
        return not self.dtype.startswith("u")

    @property
    def storage(self) -> torch.dtype:
        """The dtype of a tensor that holds the integers."""
        return INTEGERS[self.dtype][2]

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer that is used."""
        bits = self.bits or self.storage_bits
        if not self.signed:
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)) + self.narrow, 2 ** (bits - 1) - 1

    def __str__(self) -> str:
        """``int8 per channel (axis 0), symmetric``."""
        where = {"channel": f" (axis {self.axis})", "block": f"s of {self.block_size}"}
        parts = [f"{self.dtype} per {self.granularity}{where.get(self.granularity, '')}"]
        parts.append("symmetric" if self.symmetric else "asymmetric")
        if self.bits is not None:
            parts.append(f"{self.bits} bits used")
        return ", ".join(parts)

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for real ranges; zero is always among what can be written.

        Args:
            low: smallest values, one for each scale; any shape.
            high: largest values, the same shape.

        Returns:
            The scale (float32), positive and finite, and the zero point (``storage``).
        """
        low = low.to(torch.float64).clamp(max=0)
        high = high.to(torch.float64).clamp(min=0)
        smallest, largest = self.range
        if self.symmetric:
            middle = 0 if self.signed else (largest + 1) // 2
            scale = torch.maximum(high / (largest - middle), -low / (middle - smallest))
            zero = torch.full_like(scale, middle)
        else:
            scale = (high - low) / (largest - smallest)
            zero = (smallest - low / scale.clamp(min=SMALLEST_SCALE)).round()
        # All zeros: any scale writes them; one is the plainest.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=SMALLEST_SCALE))
        zero = zero.clamp(smallest, largest)
        return scale.to(torch.float32), zero.to(self.storage)

    def qparams_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point from the smallest and largest value of each group of ``x``.

        Shapes: as ``spread`` takes them: [] per tensor, [C] per channel, and the rank of ``x``
        with ``ceil(D / block_size)`` along the axis for blocks (1 along the last axis for tokens).
        """
        if self.granularity == "tensor":
            return self.qparams(x.amin(), x.amax())
        if self.granularity == "token":
            return self.qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
        assert self.axis is not None
        axis = self.axis % x.dim()
        if self.granularity == "channel":
            rows = x.movedim(axis, 0).flatten(1)
            return self.qparams(rows.amin(1), rows.amax(1))
        blocks = to_blocks(x, axis, self.block_size)
        return self.qparams(blocks.amin(axis + 1), blocks.amax(axis + 1))

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Integers of ``x`` within ``range``, ties to even, saturating.

        Args:
            x: real values.
            scale: as ``qparams_of`` shapes it.
            zero_point: likewise.
        """
        axis, block = self.layout(x)
        scale = spread(scale, x, axis, block)
        zero = spread(zero_point, x, axis, block).to(torch.float32)
        codes = (x.to(torch.float32) / scale).round() + zero
        # The largest int32 is no float32.
        codes = codes.double() if self.storage_bits == 32 else codes
        return codes.clamp(*self.range).to(self.storage)

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``(q - zero_point) * scale``."""
        axis, block = self.layout(q)
        return dequantize_linear(q, scale, zero_point, axis, block)

    def fake(self, x: Tensor) -> Tensor:
        """``x`` as it is after having been written in this scheme by its own range."""
        scale, zero = self.qparams_of(x)
        return self.dequantize(self.quantize(x, scale, zero), scale, zero)

    def layout(self, x: Tensor) -> tuple[int | None, int]:
        """``axis`` and ``block_size`` as the operators take them; tokens are blocks of a row."""
        if self.granularity == "token":
            return x.dim() - 1, int(x.shape[-1])
        return self.axis, self.block_size


def to_blocks(x: Tensor, axis: int, block_size: int) -> Tensor:
    """Split an axis into (blocks, block_size); a last short block repeats the last element.

    Shapes: ``[.., D, ..]`` to ``[.., ceil(D / block_size), block_size, ..]``.
    """
    axis %= x.dim()
    missing = -x.shape[axis] % block_size
    if missing:
        last = x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([x, last.expand(*x.shape[:axis], missing, *x.shape[axis + 1 :])], axis)
    blocks: Tensor = x.unflatten(axis, (-1, block_size))
    return blocks


def spread(p: Tensor, x: Tensor, axis: int | None, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts to ``x``.

    Args:
        p: [] or [1] per tensor; [C] per channel; for blocks the rank of ``x``, with
            ``ceil(D / block_size)`` along the axis.
        x: what it is a parameter of.
        axis: None for per tensor.
        block_size: 0 for per channel.
    """
    if axis is None:
        return p.reshape(())
    axis %= x.dim()
    if not block_size:
        return p.reshape([-1 if d == axis else 1 for d in range(x.dim())])
    size = x.shape[axis]
    if p.shape[axis] == 1:
        return p
    return p.repeat_interleave(block_size, axis).narrow(axis, 0, size)


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    dtype: str,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    """``saturate(round_half_to_even(x / scale) + zero_point)``: ONNX QuantizeLinear."""
    low, high, storage = INTEGERS[dtype]
    zero = spread(zero_point, x, axis, block_size)
    codes = (x / spread(scale, x, axis, block_size).to(x.dtype)).round() + zero.to(x.dtype)
    codes = codes.double() if dtype == "int32" else codes  # its largest is no float32
    return codes.clamp(low, high).to(storage)


def dequantize_linear(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    """``(q - zero_point) * scale``, of the scale's dtype: ONNX DequantizeLinear."""
    zero = spread(zero_point, q, axis, block_size).to(torch.int32)
    return (q.to(torch.int32) - zero).to(scale.dtype) * spread(scale, q, axis, block_size)
