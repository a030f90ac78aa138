"""Range "entropy": the clip whose quantized histogram tells least apart from the true one.

For each clip the histogram with what lies outside moved to its end (P) is compared with the same
histogram merged to as many steps as there are integers and spread out again over the bins that
hold anything (Q), by the Kullback-Leibler divergence KL(P || Q).

Known zeros are left out: every scheme writes zero exactly, and a mass of them behind a relu would
hide the rest. For asymmetric schemes the upper side is searched first, then the lower one.

Source: Migacz, 8-bit inference with TensorRT, GTC 2017.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planish.ir.quantscheme import QuantScheme
from planish.passes.observe.histogram import Histogram

CANDIDATES = 256
# Mass given to a bin that P holds and Q does not, so that the divergence stays finite.
EPSILON = 1e-4

Counts = NDArray[np.float64]


def entropy(histogram: Histogram, scheme: QuantScheme) -> tuple[float, float]:
    """Search the range with the smallest divergence.

    Args:
        histogram: not empty.
        scheme: per tensor.
    """
    smallest, largest = scheme.range
    if scheme.symmetric:
        folded = histogram.absolute()
        levels = largest if scheme.signed else largest // 2
        counts = _counts(folded)
        limit = min(_search(counts, levels, 0) * folded.width, folded.high)
        return -limit, limit
    edges, _ = histogram.filled()
    counts = _counts(histogram)
    levels = largest - smallest
    zero = round(-float(edges[0]) / histogram.width)  # bins below zero
    above = _search(counts, levels, zero)
    # The mirror image: what was cut above stays outside, at what is now the lower end.
    kept = counts[:above].copy()
    kept[-1] += counts[above:].sum()
    below = _search(kept[::-1], levels, above - zero) if zero else above
    low = float(edges[above]) - below * histogram.width
    return max(low, min(histogram.low, 0.0)), min(float(edges[above]), max(histogram.high, 0.0))


def divergence(counts: Counts, ends: NDArray[np.int64], levels: int) -> NDArray[np.float64]:
    """KL(P || Q) of keeping the first bins, for several numbers of bins.

    Q is the same in all bins of an integer that hold anything, so that sums up to each bin are all
    it takes: the cost is that of the integers, not of the bins.

    Args:
        counts: of all bins.
        ends: how many bins are kept; what the others hold moves into the last kept one.
        levels: how many integers the kept bins are merged to, at most as many as are kept.

    Returns:
        One per end; inf where the kept bins hold nothing.
    """
    below, holding, own = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts > 0, _xlogx(counts))
    )
    total, kept = below[-1], below[ends]
    bounds = np.arange(levels + 1) * ends[:, None] // levels
    sums, held = np.diff(below[bounds]), np.diff(holding[bounds])
    floor = EPSILON / ends
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing is kept, see below
        q = np.maximum(sums / np.maximum(held, 1) / kept[:, None], floor[:, None])
        cross = (sums * np.log(q)).sum(1)
        # What moves into the last kept bin meets the Q there, which is none if it held nothing.
        last, outside = counts[ends - 1], total - kept
        cross += outside * np.log(np.where(last > 0, q[:, -1], floor))
        entropy_of_p = own[ends - 1] + _xlogx(last + outside)
        found = (entropy_of_p - cross) / total - np.log(total)
    return np.asarray(np.where(kept > 0, found, np.inf), dtype=np.float64)


def _xlogx(x: Counts) -> Counts:
    return x * np.log(np.maximum(x, 1.0))  # counts: 0, or at least 1


def _search(counts: Counts, levels: int, least: int) -> int:
    """How many bins to keep, at least one for each integer and at least ``least``."""
    first = max(levels, least + 1)
    if first >= len(counts):
        return len(counts)
    ends = np.unique(np.linspace(first, len(counts), CANDIDATES).round().astype(np.int64))
    found = divergence(counts, ends, levels)
    # The widest of equals: nothing is clipped for no gain.
    best = len(found) - 1 - int(np.argmin(found[::-1]))
    return int(ends[best])


def _counts(histogram: Histogram) -> Counts:
    """Counts of the filled bins, without known zeros."""
    _, counts = histogram.spread()
    return np.asarray(counts.numpy(), dtype=np.float64)
