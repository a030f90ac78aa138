"""Straight lines over the coordinates of a tensor, and what comparing two of them gives.

``arange(n)[:, None] - 1`` is ``-1 + 1*i + 0*j`` whatever n is; it is less than ``1*i + 0*j``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Affine:
    """``start + sum(steps[a] * i[a])`` at coordinates i; uniform where all steps are 0."""

    start: int
    steps: tuple[int, ...] = ()

    @property
    def is_uniform(self) -> bool:
        """Whether it is one number."""
        return not any(self.steps)

    def least(self) -> int | None:
        """Its smallest value over all coordinates from 0 on; None where there is none."""
        return self.start if all(step >= 0 for step in self.steps) else None

    def largest(self) -> int | None:
        """Its largest value; None where it grows with the size."""
        return self.start if all(step <= 0 for step in self.steps) else None


def combine(a: Affine, b: Affine, scale: int) -> Affine:
    """``a + scale * b``, broadcast."""
    rank = max(len(a.steps), len(b.steps))
    left, right = ((0,) * (rank - len(v.steps)) + v.steps for v in (a, b))
    return Affine(
        a.start + scale * b.start, tuple(x + scale * y for x, y in zip(left, right, strict=True))
    )


def decide(comparison: str, a: Affine, b: Affine) -> bool | None:
    """What a comparison is everywhere; None where it depends on the coordinates or the sizes.

    Args:
        comparison: ``lt``, ``le``, ``gt``, ``ge``, ``eq`` or ``ne``.
        a: the left operand.
        b: the right operand.
    """
    if comparison in ("gt", "ge"):
        return decide({"gt": "lt", "ge": "le"}[comparison], b, a)
    if comparison == "ne":
        equal = decide("eq", a, b)
        return None if equal is None else not equal
    gap = combine(a, b, -1)
    least, largest = gap.least(), gap.largest()
    if comparison == "eq":
        if gap.is_uniform:
            return gap.start == 0
        apart = (least is not None and least > 0) or (largest is not None and largest < 0)
        return False if apart else None
    if comparison == "lt":
        # a < b is not a >= b, which is not b <= a turned around: b - a has the signs swapped.
        flipped = decide("le", b, a)
        return None if flipped is None else not flipped
    if largest is not None and largest <= 0:
        return True
    return False if least is not None and least > 0 else None
