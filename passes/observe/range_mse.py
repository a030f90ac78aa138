"""Range "mse": the one with the smallest mean squared error of quantization.

The error is integrated exactly over the histogram, taking values as spread evenly within a bin
(and zeros as zero). Of the values that become the number ``v`` it is ``M2 - 2 v M1 + v**2 M0`` with
their moments, which are differences of sums up to a point: each range costs as much as it has
numbers, however many bins there are.

Source: Sung, Shin and Hwang, Resiliency of deep neural networks under quantization, 2015, section
3; search per side as in Choukroun et al., Low-bit quantization of neural networks, ICCVW 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from planish.ir.quantscheme import QuantScheme
from planish.passes.observe.histogram import Histogram

STEPS = 64


def mse(histogram: Histogram, scheme: QuantScheme) -> tuple[float, float]:
    """Search the range with the smallest error; never worse than the smallest to largest value.

    Args:
        histogram: not empty.
        scheme: per tensor.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if scheme.symmetric:
        # Both sides at once: only the larger one decides on the scale.
        best, _ = _shrink(histogram, scheme, (low, high), (True, True))
        return best
    best, error = (low, high), float("inf")
    while True:
        # Each side in turn, for as long as that helps: the zero point ties them together.
        last = error
        best, error = _shrink(histogram, scheme, best, (False, True), (low, high))
        best, error = _shrink(histogram, scheme, best, (True, False), (low, high))
        if not error < 0.999 * last:
            return best


def squared_error(histogram: Histogram, scheme: QuantScheme, low: Tensor, high: Tensor) -> Tensor:
    """Mean squared error of quantizing what a histogram counted, for several ranges.

    Args:
        histogram: of the values, not empty.
        scheme: gives scale and zero point of a range.
        low: float64 [ranges].
        high: likewise.

    Returns:
        float64 [ranges].
    """
    scale, zero = scheme.qparams(low, high)
    s = scale.to(torch.float64).unsqueeze(1)
    smallest, largest = scheme.range
    numbers = torch.arange(smallest, largest + 1, dtype=torch.float64)
    v = (numbers - zero.to(torch.float64).unsqueeze(1)) * s
    # Halfway to the next number; what lies beyond the last ones is clipped to them.
    ends = torch.nn.functional.pad(v[:, 1:] - s / 2, (1, 1))
    ends[:, 0], ends[:, -1] = -math.inf, math.inf
    m0, m1, m2 = (m.diff(dim=1) for m in _moments(histogram, ends))
    errors = (m2 - 2 * v * m1 + v * v * m0).sum(1)
    # Differences of large sums may fall below zero by their rounding.
    return errors.clamp(min=0) / histogram.total


def _moments(histogram: Histogram, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of 1, ``u`` and ``u**2`` over all values ``u`` up to ``t``; known zeros left out."""
    edges, counts = histogram.spread()
    t = t.clamp(edges[0].item(), edges[-1].item())
    at = ((t - edges[0]) / histogram.width).floor().to(torch.int64).clamp(max=len(counts) - 1)
    density = counts / histogram.width
    slope = density.take(at)
    found = []
    for power in (1, 2, 3):
        integral = edges**power / power
        sums = torch.nn.functional.pad((density * integral.diff()).cumsum(0), (1, 0))
        # Up to the bin, and the part of the bin itself.
        start = (sums - torch.nn.functional.pad(density, (0, 1)) * integral)[:-1]
        found.append(slope.mul(t**power).div_(power).add_(start.take(at)))
    return found[0], found[1], found[2]


def _shrink(
    histogram: Histogram,
    scheme: QuantScheme,
    now: tuple[float, float],
    sides: tuple[bool, bool],
    widest: tuple[float, float] | None = None,
) -> tuple[tuple[float, float], float]:
    """Try smaller ranges on the sides named, coarsely and then finely around the best."""
    widest = widest or now
    fractions = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    best, error = now, float("inf")
    for _ in range(2):
        low, high = (
            fractions * end if side else torch.full_like(fractions, fixed)
            for side, end, fixed in zip(sides, widest, now, strict=True)
        )
        # What we have stays among the candidates, so no step makes it worse.
        low, high = (
            torch.cat([low, low.new_tensor([best[0]])]),
            torch.cat([high, high.new_tensor([best[1]])]),
        )
        errors = squared_error(histogram, scheme, low, high)
        at = int(errors.argmin())
        best, error = (low[at].item(), high[at].item()), errors[at].item()
        center = fractions[at].item() if at < len(fractions) else 1.0
        near = torch.linspace(-1, 1, STEPS // 4, dtype=torch.float64) / STEPS
        fractions = (center + near).clamp(1 / (8 * STEPS), 1)
    return best, error
