"""Scales of channels, in numbers: which make a product survive being written in 8 bits.

For ``Y = X W^T`` with X [n, I] per tensor in uint8 and W [O, I] per output channel in int8, a
positive scale s [I] gives the same product by ``(X / s) (W diag(s))^T`` and another error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from planish.ir.quantscheme import QuantScheme

FLOOR = 1e-5
# A channel that calibration hardly stirs may stir later: it counts as at least this share of the
# usual one.
LIVELY = 0.05
_CLIPS = (1.0, 0.85, 0.7)
# Outputs that a search looks at: each has a scale of its own, so a share of them tells of all.
_OUTPUTS = 1024
_VALUES = QuantScheme(dtype="uint8", symmetric=False)
_WEIGHTS = QuantScheme(dtype="int8", granularity="channel", axis=0, narrow=True)


def smooth_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """``s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)``, SmoothQuant's equation 4.

    Args:
        x_max: [I], largest absolute value of each input channel.
        w_max: [I], largest absolute weight that multiplies it, over all layers that share it.
        alpha: how much of the difficulty goes to the weights: 0 none of X's, 1 all of it.
    """
    x_max, w_max = x_max.clamp(min=FLOOR), w_max.clamp(min=FLOOR)
    return (x_max**alpha / w_max ** (1 - alpha)).clamp(min=FLOOR)


def outlier_scale(x_max: Tensor, share: float, power: float = 1.0) -> Tensor:
    """``s_j = max(1, max|X_j| / t)^power``: only channels beyond the quantile t are scaled.

    All other columns of the weights keep their values, and so the rows their scales.

    Args:
        x_max: [I].
        share: of the channels that stay as they are.
        power: 1 brings outliers down to t, 0.5 half of the way (in decibels).
    """
    limit = x_max.quantile(share).clamp(min=FLOOR)
    return (x_max / limit).clamp(min=1) ** power


@dataclass(frozen=True)
class Choice:
    """A scale and what it is worth.

    Attributes:
        scale: [I].
        name: how it was made: "alpha 0.7", "outliers 0.98", "none".
        sqnr_db: of the layers' outputs with this scale, in 8 bits.
        plain_db: the same without any scale.
    """

    scale: Tensor
    name: str
    sqnr_db: float
    plain_db: float

    @property
    def gain_db(self) -> float:
        """By how much the scale lowers the error."""
        return self.sqnr_db - self.plain_db


def candidates(
    x_max: Tensor, w_max: Tensor, alphas: Sequence[float], *, outliers: bool
) -> Iterator[tuple[str, Tensor]]:
    """The scales that a search tries, each with geometric mean 1 over the channels' middle."""
    lively = x_max.clamp(min=LIVELY * float(x_max.median()))
    for alpha in alphas:
        scale = smooth_scale(lively, w_max, alpha)
        yield f"alpha {alpha:g}", scale / scale.median()
    if outliers:
        for share in (0.5, 0.7, 0.9, 0.98, 0.995):
            for power in (1.0, 0.5):
                name = f"outliers beyond {share:g}" + ("" if power == 1 else ", by half")
                yield name, outlier_scale(x_max, share, power)


def search(
    rows: Tensor,
    x_max: Tensor,
    weights: Tensor,
    alphas: Sequence[float],
    *,
    outliers: bool = True,
) -> Choice:
    """The scale of least error of the outputs in 8 bits, among a grid and none.

    The error of each row counts relative to that row's own energy: what follows is usually a norm,
    and a few rows of huge energy would otherwise decide alone.

    Args:
        rows: [n, I], samples of X.
        x_max: [I], over all of X.
        weights: [O, I], of all layers that read X, one below the other.
        alphas: what to try.
        outliers: whether scales of outliers alone are tried as well.
    """
    w_max = weights.abs().amax(0)
    weights = weights[:: math.ceil(weights.shape[0] / _OUTPUTS)]
    exact = F.linear(rows, weights)
    energy = exact.square().mean(1, keepdim=True)
    energy = energy + 0.1 * energy.median() + 1e-30

    def decibels(scale: Tensor) -> float:
        scaled, rounded = rows / scale, _WEIGHTS.fake(weights * scale)
        limits = x_max / scale
        low = float(torch.minimum(scaled.amin(), torch.zeros(())))
        high = float(torch.maximum(scaled.amax(), torch.zeros(())))
        if high > -low:  # the sample may miss the largest values, which are among x_max
            high = max(high, float(limits.amax()))
        else:
            low = min(low, -float(limits.amax()))
        errors = []
        for clip in _CLIPS:
            bounds = torch.tensor(low * clip), torch.tensor(high * clip)
            step, zero = _VALUES.qparams(*bounds)
            written = _VALUES.dequantize(_VALUES.quantize(scaled, step, zero), step, zero)
            difference = (F.linear(written, rounded) - exact).square().mean(1, keepdim=True)
            errors.append(float((difference / energy).mean()))
        return -10 * math.log10(max(min(errors), 1e-30))

    plain = decibels(torch.ones_like(x_max))
    best = Choice(torch.ones_like(x_max), "none", plain, plain)
    for name, scale in candidates(x_max, w_max, alphas, outliers=outliers):
        found = decibels(scale)
        if found > best.sqnr_db:
            best = Choice(scale, name, found, plain)
    return best
