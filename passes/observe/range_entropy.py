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

CANDIDATES = 128
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


def divergence(counts: Counts, end: int, levels: int) -> float:
    """KL(P || Q) of keeping the first bins.

    Args:
        counts: of all bins.
        end: how many bins are kept; what the others hold moves into the last kept one.
        levels: how many integers the kept bins are merged to.
    """
    kept = counts[:end]
    p = kept.copy()
    p[-1] += counts[end:].sum()
    starts = np.arange(levels) * end // levels
    holds = kept > 0
    sums = np.add.reduceat(kept, starts)
    held = np.add.reduceat(holds.astype(np.float64), starts)
    spread = np.repeat(sums / np.maximum(held, 1), np.diff(np.append(starts, end)))
    q = np.where(holds, spread, 0.0)
    if not q.any() or not p.any():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    there = p > 0
    p, q = p[there], np.maximum(q[there], EPSILON / end)
    return float((p * np.log(p / q)).sum())


def _search(counts: Counts, levels: int, least: int) -> int:
    """How many bins to keep, at least one for each integer and at least ``least``."""
    first = max(levels, least + 1)
    if first >= len(counts):
        return len(counts)
    ends = np.unique(np.linspace(first, len(counts), CANDIDATES).round().astype(int))
    found = [divergence(counts, int(end), levels) for end in ends]
    # The widest of equals: nothing is clipped for no gain.
    best = len(found) - 1 - int(np.argmin(found[::-1]))
    return int(ends[best])


def _counts(histogram: Histogram) -> Counts:
    """Counts of the filled bins, without known zeros."""
    _, counts = histogram.spread()
    return np.asarray(counts.numpy(), dtype=np.float64)
