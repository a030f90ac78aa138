"""The record of a bisection as it goes on: evaluations, remarks, and what speaks against a flip."""

from __future__ import annotations

from collections.abc import Mapping

from planish.passes.debug.bisect_predicate import Verdict
from planish.passes.debug.bisect_result import Evaluation, Level, Tell
from planish.passes.debug.bisect_search import Found

_SHOWN = 5


class Ledger:
    """Takes down what is seen, and passes it on.

    Args:
        tell: told of every evaluation, after it.

    Attributes:
        evaluations: all so far, in order.
        remarks: sentences for the reader.
        monotone: False once something speaks against a single flip.
    """

    def __init__(self, tell: Tell | None, *, exhaustive: bool = False):
        self._tell = tell
        self._exhaustive = exhaustive
        self.evaluations: list[Evaluation] = []
        self.remarks: list[str] = []
        self.monotone = True

    def take(self, evaluation: Evaluation) -> None:
        """Take down an evaluation."""
        self.evaluations.append(evaluation)
        if self._tell is not None:
            self._tell(evaluation)

    def add(
        self, level: Level, at: int, of: int, allowed: int, what: str, verdict: Verdict
    ) -> None:
        """Take down the next of at most ``allowed`` looks of a level."""
        number = 1 + sum(1 for e in self.evaluations if e.level == level)
        text = f"{what}: {verdict.text}"
        self.take(Evaluation(level, at, of, verdict.bad, text, number, allowed, verdict.text))

    def seen(self, level: Level, at: int) -> str | None:
        """What was seen at a state."""
        found = (e for e in self.evaluations if (e.level, e.at) == (level, at))
        return next((e.seen for e in found), None)

    def judge(self, found: Found, level: Level, numbers: Mapping[int, int]) -> None:
        """Say at which states a search met the unexpected.

        Args:
            found: the search.
            level: of what.
            numbers: what the reader calls the states.
        """
        if found.monotone or found.at is None:
            return
        self.monotone = False
        flip = numbers.get(found.at, 0)
        # Who has looked at everything has seen the other flips, and needs no advice to look.
        advice = "" if self._exhaustive else "; other flips may exist (--exhaustive looks at all)"
        for verdict, points in (
            ("bad", [p for p in found.against if p < found.at]),
            ("good", [p for p in found.against if p > found.at]),
        ):
            if points:
                shown = ", ".join(str(numbers.get(p, 0)) for p in points[:_SHOWN])
                more = f" and {len(points) - _SHOWN} more" if len(points) > _SHOWN else ""
                self.remarks.append(
                    f"not monotone: it is {verdict} after {level} {shown}{more}, though it turns "
                    f"bad at {level} {flip}{advice}"
                )
