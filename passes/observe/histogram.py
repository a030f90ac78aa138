"""A histogram of fixed size whose grid depends on the data alone, never on their order.

Bins are ``[i * 2**k, (i + 1) * 2**k)`` for ``-bins <= i < bins``: scaling by a power of two is
exact in float32, so every value falls into the bin it belongs to. ``k`` is the smallest for which
all values and zero lie within ``bins`` neighboring bins; where a value falls outside, pairs of bins
are merged. Both depend on the smallest and largest value only, and counts are integers, so a
stream gives the same histogram in whatever pieces it comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 4096
# 1 / 2**-100 is still finite in float32; nothing smaller can be a scale either.
SMALLEST_EXPONENT = -100


@dataclass
class Workspace:
    """Buffers that all histograms of one sweep share, so that no update allocates.

    Fresh memory for every update would cost more than the counting: each page has to be mapped.
    """

    floats: Tensor = field(default_factory=lambda: torch.empty(0))
    codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int16))

    def take(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A float32 and an int16 buffer of a shape; their content is arbitrary."""
        count = shape.numel()
        if self.floats.numel() < count:
            self.floats = torch.empty(count)
            self.codes = torch.empty(count, dtype=torch.int16)
        return self.floats[:count].view(shape), self.codes[:count].view(shape)


class Histogram:
    """Counts of real values.

    Args:
        bins: how many bins the values and zero span at most, and at least half of that where the
            values differ from zero; even, at most 8192.

    Attributes:
        exponent: a bin is ``2**exponent`` wide.
        counts: int64 [2 * bins]; entry ``i + bins`` counts the bin that begins at ``i * width``.
        zeros: how many of the values in the bin above zero are known to be zero itself.
        low: the smallest value, inf before there is one.
        high: the largest value, -inf before there is one.
    """

    def __init__(self, bins: int = BINS):
        if bins % 2 or not 2 <= bins <= 8192:
            raise ValueError(f"{bins} bins: not an even number up to 8192")
        self.bins = bins
        self.exponent = SMALLEST_EXPONENT
        self.counts = torch.zeros(2 * bins, dtype=torch.int64)
        self.zeros = 0
        self.low = math.inf
        self.high = -math.inf

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def add(self, x: Tensor, workspace: Workspace, extremes: tuple[float, float]) -> None:
        """Count values.

        Args:
            x: finite float32 values, any shape; not empty.
            workspace: buffers to compute in.
            extremes: smallest and largest value of ``x``.
        """
        self._reach(*extremes)
        scaled, codes = workspace.take(x.shape)
        torch.mul(x, math.ldexp(1.0, -self.exponent), out=scaled).floor_().add_(self.bins)
        codes.copy_(scaled)
        self.counts += torch.bincount(codes.view(-1), minlength=2 * self.bins)

    def merge(self, other: Histogram) -> None:
        """Add what another histogram of as many bins counted."""
        if other.bins != self.bins:
            raise ValueError(f"{other.bins} bins do not merge into {self.bins}")
        if not math.isfinite(other.low):
            return
        self._reach(other.low, other.high)
        self.counts += _coarser(other.counts, self.exponent - other.exponent)
        self.zeros += other.zeros

    def filled(self) -> tuple[Tensor, Tensor]:
        """Edges and counts, from the first bin that holds values or zero to the last.

        Returns:
            Edges, float64 [n + 1], ascending; and counts, int64 [n]. One edge is zero.
        """
        held = self.counts.nonzero().flatten()
        first = min(int(held[0]), self.bins) if len(held) else self.bins
        last = max(int(held[-1]), self.bins) if len(held) else self.bins
        edges = torch.arange(first, last + 2, dtype=torch.float64) - self.bins
        return edges * self.width, self.counts[first : last + 1]

    def spread(self) -> tuple[Tensor, Tensor]:
        """As ``filled``, with float64 counts and without the known zeros."""
        edges, counts = self.filled()
        counts = counts.to(torch.float64)
        counts[int((edges[:-1] == 0).nonzero())] -= self.zeros
        return edges, counts

    def absolute(self) -> Histogram:
        """The histogram of absolute values, on the same grid."""
        folded = Histogram(self.bins)
        folded.exponent = self.exponent
        folded.low = max(self.low, -self.high, 0.0)
        folded.high = max(self.high, -self.low)
        folded.zeros = self.zeros
        folded.counts = self.counts.clone()
        folded.counts[: self.bins] = 0
        folded.counts[self.bins :] += self.counts[: self.bins].flip(0)
        return folded

    def quantile(self, share: float) -> float:
        """The value below which a share of all values lies, linear within a bin.

        Args:
            share: 0 (the smallest value) to 1 (the largest).

        Raises:
            ValueError: nothing was added, or the share is none.
        """
        if not math.isfinite(self.low) or not 0 <= share <= 1:
            raise ValueError(f"no quantile {share} of {self.total} values")
        edges, counts = self.filled()
        below = counts.cumsum(0)
        wanted = share * float(below[-1])
        at = int(torch.searchsorted(below.to(torch.float64), wanted))
        at = min(at, len(counts) - 1)
        count = float(counts[at])
        inside = (wanted - (float(below[at]) - count)) / count if count else 0.0
        value = float(edges[at]) + inside * self.width
        return min(max(value, self.low), self.high)

    def _reach(self, low: float, high: float) -> None:
        """Widen the bins until all values up to these lie on the grid."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = _exponent(min(self.low, 0.0), max(self.high, 0.0), self.bins)
        if exponent > self.exponent:
            self.counts.copy_(_coarser(self.counts, exponent - self.exponent))
            self.exponent = exponent


def _exponent(low: float, high: float, bins: int) -> int:
    """The smallest exponent for which ``low`` to ``high`` (zero inside) lie in ``bins`` bins."""
    span = max(high - low, math.ldexp(1.0, SMALLEST_EXPONENT))
    guess = math.frexp(span)[1] - bins.bit_length() - 1
    exponent = max(guess, SMALLEST_EXPONENT)
    while _index(high, exponent) - _index(low, exponent) >= bins:
        exponent += 1
    return exponent


def _index(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _coarser(counts: Tensor, steps: int) -> Tensor:
    """Merge pairs of bins this many times; zero stays an edge."""
    if not steps:
        return counts
    bins = len(counts) // 2
    index = (torch.arange(2 * bins) - bins).bitwise_right_shift(min(steps, 62)) + bins
    return torch.zeros_like(counts).index_add_(0, index, counts)
