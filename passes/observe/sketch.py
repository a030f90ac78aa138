"""What is kept of one value: fixed-size sketches that a sweep feeds with whole samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from planish.passes.observe.histogram import Histogram, Workspace

# Rows shorter than this are taken together as one token: rows of a small picture are no tokens.
TOKEN_ELEMENTS = 32
TOKEN_BINS = 1024
# Extremes wait until there are as many as are worth an update.
_WAITING = 1 << 12


class Sketch:
    """Extremes, their means, a histogram, and histograms of the extremes of tokens.

    A token is the last axis, or as many last axes as hold ``TOKEN_ELEMENTS``.

    Attributes:
        histogram: of all elements.
        maxima: of the largest element of each token.
        minima: of the smallest element of each token.
        samples: how many samples were added.
        mean_low: mean over the samples of their smallest element.
        mean_high: mean over the samples of their largest element.
    """

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.maxima = Histogram(TOKEN_BINS)
        self.minima = Histogram(TOKEN_BINS)
        self.samples = 0
        self._low_sum = 0.0
        self._high_sum = 0.0
        # Made once: small tensors that outlive a batch keep the heap from shrinking after it.
        self._waiting = torch.empty(2, _WAITING)
        self._held = 0

    @property
    def mean_low(self) -> float:
        """Mean over the samples of their smallest element."""
        return self._low_sum / self.samples

    @property
    def mean_high(self) -> float:
        """Mean over the samples of their largest element."""
        return self._high_sum / self.samples

    def add(self, piece: Tensor, workspace: Workspace) -> bool:
        """Add whole samples.

        Args:
            piece: float32 [samples, ...], not empty.
            workspace: shared buffers.

        Returns:
            False, and nothing is added, where an element is NaN or infinite.
        """
        lows, highs = token_extremes(piece)
        sample_low, sample_high = lows.amin(1), highs.amax(1)
        low, high = sample_low.min().item(), sample_high.max().item()
        if not (math.isfinite(low) and math.isfinite(high)):  # NaN survives every minimum
            return False
        self.histogram.add(piece, workspace, (low, high))
        self.histogram.zeros += _zeros(piece, sample_low, sample_high, workspace)
        self.samples += len(piece)
        self._low_sum += sample_low.sum(dtype=torch.float64).item()
        self._high_sum += sample_high.sum(dtype=torch.float64).item()
        self._keep(lows.flatten(), highs.flatten(), workspace)
        return True

    def flush(self, workspace: Workspace) -> None:
        """Move what waits into the histograms of tokens; to be called after the last piece."""
        if self._held:
            lows, highs = self._waiting[0, : self._held], self._waiting[1, : self._held]
            self._count(lows, highs, workspace)
            self._held = 0

    def _keep(self, lows: Tensor, highs: Tensor, workspace: Workspace) -> None:
        if self._held + len(lows) > _WAITING:
            self.flush(workspace)
        if len(lows) > _WAITING:
            self._count(lows, highs, workspace)
            return
        end = self._held + len(lows)
        self._waiting[0, self._held : end] = lows
        self._waiting[1, self._held : end] = highs
        self._held = end

    def _count(self, lows: Tensor, highs: Tensor, workspace: Workspace) -> None:
        for histogram, values in ((self.minima, lows), (self.maxima, highs)):
            histogram.add(values, workspace, (values.min().item(), values.max().item()))


def token_extremes(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each token, both [samples, tokens]."""
    axes, width = [], 1
    for axis in range(piece.dim() - 1, 0, -1):
        if width >= TOKEN_ELEMENTS:
            break
        axes.append(axis)
        width *= piece.shape[axis]
    if not axes:  # [samples]: one element each
        return piece.unsqueeze(1), piece.unsqueeze(1)
    lows, highs = piece.amin(axes), piece.amax(axes)
    return lows.reshape(len(piece), -1), highs.reshape(len(piece), -1)


def _zeros(piece: Tensor, low: Tensor, high: Tensor, workspace: Workspace) -> int:
    """How many elements are zero, in samples that zero bounds.

    Only there zeros come in masses, as behind a relu; counting them everywhere costs a pass. The
    choice is made per sample, so it does not depend on which samples came together.
    """
    bounded = (low == 0) | (high == 0)
    if not bounded.any():
        return 0
    if not bounded.all():
        piece = piece[bounded]
    signs, _ = workspace.take(piece.shape)
    # Several times as fast as count_nonzero; float32 counts exactly up to 2**24.
    exact = torch.float32 if piece.numel() < 1 << 24 else torch.float64
    return piece.numel() - int(torch.sign(piece, out=signs).abs_().sum(dtype=exact))


@dataclass
class ChannelStats:
    """Per-channel statistics of one value.

    Attributes:
        min: smallest value of each channel, float32 [C].
        max: largest value, float32 [C].
        count: how many elements each channel had.
        mean: float64 [C].
        mean_square: mean of squares, float64 [C].
        mean_abs: mean of absolute values, float64 [C].
    """

    min: Tensor
    max: Tensor
    count: int
    mean: Tensor
    mean_square: Tensor
    mean_abs: Tensor

    @property
    def absmax(self) -> Tensor:
        """Largest absolute value of each channel, float32 [C]."""
        return torch.maximum(self.max, -self.min)


@dataclass
class ChannelSketch:
    """Collects ``ChannelStats`` along one axis.

    Attributes:
        axis: of the value as it is.
        count: elements of each channel so far.
    """

    axis: int
    count: int = 0
    _min: Tensor = field(default_factory=lambda: torch.empty(0))
    _max: Tensor = field(default_factory=lambda: torch.empty(0))
    _sums: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, piece: Tensor, axis: int) -> bool:
        """Add whole samples.

        Args:
            piece: float32 [samples, ...].
            axis: of the channels in the piece, at least 1.

        Returns:
            False, and nothing is added, where it has another number of channels than before.
        """
        channels = piece.shape[axis]
        if self.count and channels != len(self._min):
            return False
        others = [d for d in range(piece.dim()) if d != axis]
        low, high = piece.amin(others), piece.amax(others)
        # Float32 over one piece, float64 over all of them.
        sums = torch.stack([piece.sum(others), piece.square().sum(others), piece.abs().sum(others)])
        if not self.count:
            self._min, self._max, self._sums = low, high, sums.to(torch.float64)
        else:
            torch.minimum(self._min, low, out=self._min)
            torch.maximum(self._max, high, out=self._max)
            self._sums += sums
        self.count += piece.numel() // channels
        return True

    def stats(self) -> ChannelStats:
        """What was collected; ``count`` must not be 0."""
        mean, square, absolute = self._sums / self.count
        return ChannelStats(self._min, self._max, self.count, mean, square, absolute)
