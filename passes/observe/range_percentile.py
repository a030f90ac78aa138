"""Range "percentile": all but a small share of the values can be written."""

from __future__ import annotations

from planish.ir.quantscheme import QuantScheme
from planish.passes.observe.histogram import Histogram

SHARE = 0.9999


def percentile(
    histogram: Histogram, scheme: QuantScheme, share: float = SHARE
) -> tuple[float, float]:
    """The range that this share of all values lies in.

    Args:
        histogram: not empty.
        scheme: if symmetric, the share is of absolute values; otherwise as much is cut off at
            either side.
        share: 0 to 1.
    """
    if scheme.symmetric:
        limit = histogram.absolute().quantile(share)
        return -limit, limit
    outside = (1 - share) / 2
    return histogram.quantile(outside), histogram.quantile(1 - outside)
