"""How many weights of each layer go, when the error that each layer makes alone is known.

Errors of several layers are taken to add up as energies. Of each layer's curve (zeros against
error) only the lower convex hull counts: between two points of it a layer is taken to behave like
their mean, so a point above the hull is never worth stopping at. Segments are taken by rising error
per weight until the budget is spent, which is the least sum on these hulls; the last one is taken
in part. Layers that have a pattern of groups or have it not are taken whole.

Source: Fox, "Discrete optimization via marginal analysis", Management Science 1966 (greedy on
convex curves is optimal); Frantar, Alistarh, "Optimal Brain Compression", NeurIPS 2022, section 6
(levels of layers under one budget by errors that add up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from planish.ir.errors import MisusedPassError


@dataclass(frozen=True)
class Curve:
    """What pruning one layer alone does.

    Attributes:
        name: of the weight.
        numel: its entries.
        unit: entries that go at a time; zeros are multiples of it.
        points: (zeros, error) by rising zeros; the first is the least that may go, (0, 0.0) where
            all may stay.
    """

    name: str
    numel: int
    unit: int
    points: tuple[tuple[int, float], ...]

    def hull(self) -> list[tuple[int, float]]:
        """The lower convex hull of the points, from the first to the last."""
        kept: list[tuple[int, float]] = []
        for point in self.points:
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
                kept.pop()
            kept.append(point)
        return kept

    def error(self, zeros: int) -> float:
        """On the hull, between its ends."""
        hull = self.hull()
        for low, high in pairwise(hull):
            if zeros <= high[0]:
                return low[1] + _slope(low, high) * (zeros - low[0])
        return hull[-1][1]


def _slope(low: tuple[int, float], high: tuple[int, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])


def allocate(curves: Sequence[Curve], ratio: float) -> dict[str, int]:
    """The zeros of every layer, of least summed error.

    Together they are ``ratio`` of all entries, rounded down to what the units allow.

    Args:
        curves: of all layers.
        ratio: share of all their entries that is to be zero.

    Raises:
        MisusedPassError: the ends of the curves do not let the ratio be met.
    """
    numel = sum(curve.numel for curve in curves)
    target = int(numel * ratio + 1e-9)
    taken = {curve.name: curve.points[0][0] for curve in curves}
    fewest, most = sum(taken.values()), sum(curve.points[-1][0] for curve in curves)
    slack = sum(curve.unit for curve in curves)  # the ends are whole units
    if target < fewest or target >= most + slack:
        reached, how = (fewest, "least") if target < fewest else (most, "most")
        raise MisusedPassError(
            f"a ratio of {ratio:g} over all layers cannot be met: the nearest is "
            f"{reached / numel:.4f}, where every layer gives up {how}",
            hint=f"change ratio or {how}",
        )
    left = target - fewest
    segments = [
        (_slope(low, high), place, number, high[0] - low[0])
        for place, curve in enumerate(curves)
        for number, (low, high) in enumerate(pairwise(curve.hull()))
    ]
    ended: set[int] = set()
    for _, place, _, length in sorted(segments):
        if place not in ended:
            curve = curves[place]
            take = min(length, left // curve.unit * curve.unit)
            taken[curve.name] += take
            left -= take
            if take < length:
                ended.add(place)
    return taken


def least_harm(
    zeros: Mapping[str, int], errors: Mapping[str, float], numel: int, ratio: float
) -> tuple[str, ...]:
    """Which layers get a pattern, so that at least ``ratio`` of all entries is zero.

    By rising error per weight, any number of layers, and one more of least error that meets the
    ratio; what is not needed for it after all is given up again. The best of these choices is
    taken; it is the least sum of errors where all layers are of one size.

    Args:
        zeros: by layer, how many it has with the pattern.
        errors: by layer, what that costs.
        numel: entries of all layers.
        ratio: share of them.

    Raises:
        MisusedPassError: the pattern in every layer is less than the ratio.
    """
    target, most = ratio * numel - 1e-9 * numel, sum(zeros.values())
    if most < target:
        raise MisusedPassError(
            f"a ratio of {ratio:g} over all layers cannot be met: the pattern in every one of "
            f"them gives {most / numel:.4f}",
            hint="lower ratio, or take a sparser pattern",
        )
    order = {name: place for place, name in enumerate(zeros)}
    ranked = sorted(zeros, key=lambda n: (errors[n] / zeros[n], order[n]))
    best: tuple[float, list[str]] | None = None
    total = 0
    for place, name in enumerate(ranked):
        enough = [n for n in ranked[place:] if total + zeros[n] >= target]
        if enough:
            last = min(enough, key=lambda n: (errors[n], order[n]))
            tried = _needed([*ranked[:place], last], zeros, target)
            harm = sum(errors[n] for n in tried)
            if best is None or harm < best[0]:
                best = harm, tried
        total += zeros[name]
    assert best is not None  # the last of all makes it enough
    return tuple(sorted(best[1], key=order.__getitem__))


def _needed(chosen: Sequence[str], zeros: Mapping[str, int], target: float) -> list[str]:
    """What is chosen, without what the target is met without; the last are given up first."""
    kept = list(chosen)
    total = sum(zeros[name] for name in kept)
    for name in reversed(chosen):
        if total - zeros[name] >= target:
            kept.remove(name)
            total -= zeros[name]
    return kept
