"""Range "token": clip at a quantile of the tokens' extremes (coarse token-wise clipping).

Outliers of transformers sit in a few tokens (separators) that matter little, so the candidates
for a clip are quantiles of what single tokens reach, not of elements. Of the candidates the one
with the smallest loss is taken: the squared error on the histogram, or the caller's own loss, as
the paper takes the loss of the network.

Source: Wei et al., Outlier Suppression, NeurIPS 2022, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from planish.ir.quantscheme import QuantScheme
from planish.passes.observe.histogram import Histogram
from planish.passes.observe.range_mse import squared_error

SHARES = (1.0, 0.9999, 0.999, 0.995, 0.99, 0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)

RangeLoss = Callable[[float, float], float]


def candidates(minima: Histogram, maxima: Histogram) -> tuple[tuple[float, float], ...]:
    """Clips that keep this and that share of tokens whole, on either side; the widest first.

    Args:
        minima: of the smallest element of each token, not empty.
        maxima: of the largest.
    """
    pairs = [(minima.quantile(1 - share), maxima.quantile(share)) for share in SHARES]
    return tuple(dict.fromkeys((min(low, 0.0), max(high, 0.0)) for low, high in pairs))


def token(
    histogram: Histogram,
    minima: Histogram,
    maxima: Histogram,
    scheme: QuantScheme,
    loss: RangeLoss | None = None,
) -> tuple[float, float]:
    """The best of ``candidates``.

    Args:
        histogram: of all elements.
        minima: of the smallest element of each token.
        maxima: of the largest.
        scheme: per tensor.
        loss: of a clip (low, high); None for the squared error on the histogram.
    """
    found = candidates(minima, maxima)
    if loss is not None:
        return min(found, key=lambda clip: loss(*clip))
    low, high = torch.tensor(found, dtype=torch.float64).T
    return found[int(squared_error(histogram, scheme, low, high).argmin())]
