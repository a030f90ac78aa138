"""What a bisection says: every evaluation, and the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from planish.ir.program import Program

Level = Literal["baseline", "pass", "site", "confirm"]


@dataclass(frozen=True)
class Evaluation:
    """One look at the predicate.

    Attributes:
        level: ``"baseline"`` of the original program, ``"pass"``, ``"site"`` or ``"confirm"``.
        at: number of the step in the recipe, or of the rewrite site in the whole run, up to which
            everything was done; for ``"confirm"``, the one that was left out.
        of: the last of these numbers.
        bad: whether the predicate failed.
        text: what was evaluated, and what it gave.
        number: which evaluation of its level, from 1; 0 for the baseline.
        budget: how many evaluations its level may take.
        seen: what the predicate gave, alone.
    """

    level: Level
    at: int
    of: int
    bad: bool
    text: str
    number: int = 0
    budget: int = 0
    seen: str = ""

    def __str__(self) -> str:
        count = f" {self.number}/{self.budget}" if self.number else ""
        return f"{self.level}{count}: {self.text}  {'BAD' if self.bad else 'good'}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


Tell = Callable[[Evaluation], None]


@dataclass(frozen=True)
class Bisection:
    """The answer.

    Attributes:
        found: whether anything was bad.
        predicate: what was asked, as a sentence.
        step: number of the guilty step in the recipe, from 1.
        pass_name: the guilty pass.
        site: number of the guilty rewrite in the whole run; None where no single one is to blame.
        rule: its rule, or the rule that an error outside of any site names.
        node: the node it matched at, or that such an error names.
        source: the user's source line of that node, if known.
        symptom: what the predicate, or the error, says at the flip.
        before: the program without the guilty rewrite (or pass).
        after: the program with it; None where it raises before there is one.
        evaluations: all looks at the predicate, in order.
        monotone: False where something speaks against a single flip.
        remarks: sentences for the reader.
        options: what keeps the guilty rewrite from being done, as command-line options.
    """

    found: bool
    predicate: str
    step: int | None = None
    pass_name: str | None = None
    site: int | None = None
    rule: str | None = None
    node: str | None = None
    source: str | None = None
    symptom: str = ""
    before: Program | None = field(default=None, repr=False)
    after: Program | None = field(default=None, repr=False)
    evaluations: tuple[Evaluation, ...] = ()
    monotone: bool = True
    remarks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def suggestion(self) -> str | None:
        """What to add to the command; the narrowest option first."""
        if not self.options:
            return None
        first, *others = self.options
        return first + "".join(f", or the whole pass: {option}" for option in others)

    def count(self, level: Level) -> int:
        """How many evaluations a level took."""
        return sum(1 for e in self.evaluations if e.level == level)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the programs are left out."""
        names = ("found", "predicate", "step", "pass_name", "site", "rule", "node", "source")
        return {
            **{name: getattr(self, name) for name in names},
            "symptom": self.symptom,
            "suggestion": self.suggestion,
            "options": list(self.options),
            "monotone": self.monotone,
            "remarks": list(self.remarks),
            "evaluations": [e.to_dict() for e in self.evaluations],
        }
