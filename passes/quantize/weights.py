"""Constants as integers: weights by a scheme, biases with the scale of their products.

Rewrite:
    W  ->  dequantize(Q, s, z),   Q = saturate(round(W / s) + z)
    b  ->  dequantize(B, s_x s, 0),   B = round(b / (s_x s)), int32
Shapes:       W: any; s: [C] per channel, [] per tensor, the rank of W in blocks;
              b: [C]; s_x: [].
Requires:     finite values; the integers of a bias fit into 32 bits.
Failures:     weights so small that their scale would be no normal float32 take the smallest one
              that is: they lose digits, and a remark says so. A channel whose weights are all zero
              has no range of its own. It takes the largest scale of the others: any scale writes
              its weights, but its bias would come out coarse with a scale of 1. Where a bias is too
              large beside its weights for 32 bits, the scales of these are raised.
Source:       Jacob et al., "Quantization and Training of Neural Networks for Efficient
              Integer-Arithmetic-Only Inference", CVPR 2018, section 2.4 (biases).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planish.ir.quantscheme import SMALLEST_SCALE, QuantScheme

INT32 = 2**31 - 1
_ALL_DEAD = 2.0**-20  # of weights that are all zero: then only the bias is left to be resolved
# What is left of the largest weights where clipping is searched.
_SHRINK = tuple(1 - step / 40 for step in range(13))


@dataclass(frozen=True)
class Codes:
    """A constant in integers.

    Attributes:
        codes: the integers, shaped as the constant.
        scale: as ``QuantScheme.qparams_of`` shapes it.
        zero_point: likewise.
        scheme: what they mean.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: QuantScheme

    def real(self) -> Tensor:
        """The constant as the integers say it."""
        return self.scheme.dequantize(self.codes, self.scale, self.zero_point)

    @property
    def coarse(self) -> str | None:
        """Says how many groups are so small that no finer step can be written for them."""
        count = int((self.scale == SMALLEST_SCALE).sum())
        if not count:
            return None
        return (
            f"{count} of {self.scale.numel()} groups of it are too small for a step of their own: "
            f"with {SMALLEST_SCALE:.2g}, the smallest there is, they lose digits or become zero"
        )


def quantize_weight(weight: Tensor, scheme: QuantScheme, *, search: bool = False) -> Codes:
    """Write a weight as integers, each group by its own range.

    Args:
        weight: float, any shape; finite.
        scheme: which integers, and which elements share a scale.
        search: cut the range of each group where that lowers its squared error.
    """
    scale, zero = scheme.qparams_of(weight)
    if search:
        scale, zero = _searched(weight, scheme)
    scale = _fill_dead(weight, scheme, scale)
    return Codes(scheme.quantize(weight, scale, zero), scale, zero, scheme)


def _fill_dead(weight: Tensor, scheme: QuantScheme, scale: Tensor) -> Tensor:
    """Give channels that are all zero the largest scale of the others, or a fine one."""
    if scheme.granularity != "channel":
        return scale
    assert scheme.axis is not None
    dead = weight.movedim(scheme.axis, 0).flatten(1).abs().amax(1) == 0
    if not dead.any():
        return scale
    return torch.where(dead, _ALL_DEAD if dead.all() else scale[~dead].max(), scale)


def _searched(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scales and zero points of least squared error over shrunken ranges."""
    best: tuple[Tensor, Tensor] | None = None
    least: Tensor | None = None
    for shrink in _SHRINK:
        scale, zero = scheme.qparams_of(weight * shrink)
        loss = group_sums(
            (
                scheme.dequantize(scheme.quantize(weight, scale, zero), scale, zero) - weight
            ).square(),
            scheme,
        )
        if best is None or least is None:
            best, least = (scale, zero), loss
            continue
        better = (loss < least).reshape(scale.shape)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.minimum(loss, least)
    assert best is not None
    return best


def group_sums(x: Tensor, scheme: QuantScheme) -> Tensor:
    """Sums over the elements that share a scale; shaped as the scale is."""
    if scheme.granularity == "tensor":
        return x.sum()
    if scheme.granularity == "token":
        return x.sum(-1, keepdim=True)
    assert scheme.axis is not None
    axis = scheme.axis % x.dim()
    if scheme.granularity == "channel":
        return x.movedim(axis, 0).flatten(1).sum(1)
    missing = -x.shape[axis] % scheme.block_size
    if missing:
        shape = [*x.shape[:axis], missing, *x.shape[axis + 1 :]]
        x = torch.cat([x, x.new_zeros(shape)], axis)
    blocks: Tensor = x.unflatten(axis, (-1, scheme.block_size)).sum(axis + 1)
    return blocks


def weight_scheme(
    scheme: QuantScheme, axis: int | None, inner: int | None, shape: tuple[int, ...]
) -> QuantScheme:
    """A scheme for one weight: the axes it has, and blocks no longer than its rows.

    Args:
        scheme: granularity "tensor", "channel" (any axis) or "block" (any axis).
        axis: the weight's axis of output channels; None where it has none.
        inner: the axis that is summed over.
        shape: of the weight.
    """
    if scheme.granularity == "channel":
        if axis is None:
            return replace(scheme, granularity="tensor", axis=None)
        return replace(scheme, axis=axis)
    if scheme.granularity == "block":
        if inner is None:
            return replace(scheme, granularity="tensor", axis=None, block_size=0)
        if shape[inner] == 1:  # depthwise: a block would be one element
            return replace(scheme, granularity="channel", axis=axis, block_size=0)
        return replace(scheme, axis=inner, block_size=min(scheme.block_size, shape[inner]))
    return scheme


def weight_problem(weight: Tensor) -> str | None:
    """Say why a weight cannot be written in integers, or None."""
    if not weight.numel():
        return "its weight is empty"
    if not bool(weight.isfinite().all()):
        return "its weight holds values that are not finite"
    return None


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor | None:
    """A bias in int32.

    Args:
        bias: ``[C]``.
        scale: ``s_x s_w``, ``[C]`` or ``[]``.

    Returns:
        The integers; None where one of them does not fit, or the bias is not finite.
    """
    codes = (bias.double() / scale.double()).round()
    if not bool(codes.isfinite().all()) or bool((codes.abs() > INT32).any()):
        return None
    return codes.to(torch.int32)


def room_for_bias(codes: Codes, bias: Tensor, x_scale: Tensor) -> Tensor:
    """Weight scales that are large enough for the integers of the bias to fit into 30 bits.

    Args:
        codes: the weight; per tensor or per channel.
        bias: ``[C]``.
        x_scale: ``[]``.

    Returns:
        Scales of the shape of ``codes.scale``; equal to it where nothing overflowed.
    """
    needed = bias.double().abs() / (x_scale.double() * 2.0**30)
    if codes.scheme.granularity == "tensor":
        needed = needed.max()
    return torch.maximum(codes.scale, needed.to(torch.float32))


def rescaled(weight: Tensor, codes: Codes, scale: Tensor) -> Codes:
    """The weight written again by larger scales, which lowers what its integers resolve."""
    written = codes.scheme.quantize(weight, scale, codes.zero_point)
    return Codes(written, scale, codes.zero_point, codes.scheme)


def decibels(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio in dB; infinite where they are equal."""
    noise = float((reference.double() - other.double()).square().sum())
    signal = float(reference.double().square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
