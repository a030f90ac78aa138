"""Find where a row of states turns from good to bad, with few looks.

The states are numbered 0 (nothing done) to N (all done). At most ``budget(N)`` of them are looked
at: the last, and then halves. What remains of the budget goes to states that say whether the row
is monotone (good up to a point, bad from there on). Where the last state is good, the budget goes
to looking for a bad one in the middle, never so far from a good one that the flip between them
could not be found with what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


def budget(points: int) -> int:
    """How many states may be looked at: ``ceil(log2(points)) + 1``; 0 where there are none."""
    return (points - 1).bit_length() + 1 if points > 0 else 0


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        at: a bad state whose predecessor is good; 0 where the very first is bad; None where all
            that were looked at are good.
        asked: the states that were looked at, in order, and whether each was bad.
        against: states that speak against a single flip at ``at``: bad before it, or good after.
    """

    at: int | None
    asked: tuple[tuple[int, bool], ...]
    against: tuple[int, ...] = ()

    @property
    def monotone(self) -> bool:
        """Whether nothing that was looked at speaks against a single flip."""
        return not self.against


def search(
    points: int,
    is_bad: Callable[[int], bool],
    *,
    known: Mapping[int, bool],
    exhaustive: bool = False,
) -> Found:
    """Find a flip from good to bad among the states 0 to ``points``.

    Args:
        points: the last state.
        is_bad: looks at a state; it is asked at most ``budget(points)`` times.
        known: states whose verdict is known already; state 0 or the last one must be.
        exhaustive: look at every state, whatever that costs; the first bad one is the answer.
    """
    if 0 not in known and points not in known:
        raise ValueError("neither end is known: the budget would not suffice")
    look = _Look(points, is_bad, dict(known))
    if exhaustive:
        return look.everywhere()
    if not points:
        return look.found(0 if known[0] else None)
    flip: int | None = points if look(points) else look.stray()
    if flip is not None:
        flip = look.narrow(flip)
        look.spot_checks(flip)
    return look.found(flip)


class _Look:
    """The verdicts so far, and what is left of the budget."""

    def __init__(self, points: int, is_bad: Callable[[int], bool], known: dict[int, bool]):
        self.points = points
        self.is_bad = is_bad
        self.verdicts = known
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, point: int) -> bool:
        if point not in self.verdicts:
            self.verdicts[point] = self.is_bad(point)
            self.asked.append((point, self.verdicts[point]))
        return self.verdicts[point]

    @property
    def left(self) -> int:
        return budget(self.points) - len(self.asked)

    def everywhere(self) -> Found:
        for point in (*range(1, self.points + 1), 0):
            self(point)
        bad = [point for point in range(self.points + 1) if self.verdicts[point]]
        return self.found(bad[0] if bad else None)

    def stray(self) -> int | None:
        """A bad state although the last is good: look where least is known, within reach."""
        while self.left:
            reach = 1 << (self.left - 1)
            near = [p for p in self._unknown() if p - self._good_below(p) <= reach]
            if not near:
                return None
            point = max(near, key=lambda p: (min(abs(p - q) for q in self.verdicts), -p))
            if self(point):
                return point
        return None

    def narrow(self, bad: int) -> int:
        """The flip between a bad state and the last good one before it."""
        good = self._good_below(bad)
        while bad - good > 1:
            middle = (good + bad) // 2
            if self(middle):
                bad = middle
            else:
                good = middle
        if good == 0 and self(0):  # it was only assumed to be good
            return 0
        return bad

    def spot_checks(self, flip: int) -> None:
        """Spend what is left far from the answer, where a surprise would say most."""
        while self.left and (unknown := self._unknown()):
            self(max(unknown, key=lambda p: (abs(p - flip), -p)))

    def found(self, flip: int | None) -> Found:
        against: tuple[int, ...] = ()
        if flip is not None:
            wrong = (p for p, bad in self.verdicts.items() if bad != (p >= flip))
            against = tuple(sorted(wrong))
        return Found(flip, tuple(self.asked), against)

    def _unknown(self) -> list[int]:
        return [p for p in range(1, self.points) if p not in self.verdicts]

    def _good_below(self, point: int) -> int:
        return max((p for p, bad in self.verdicts.items() if p < point and not bad), default=0)
