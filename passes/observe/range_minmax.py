"""Range "minmax": everything that was seen can be written."""

from __future__ import annotations

from planish.passes.observe.histogram import Histogram


def minmax(histogram: Histogram) -> tuple[float, float]:
    """The smallest and the largest value; ``histogram`` must not be empty."""
    return histogram.low, histogram.high
