"""What all levels of a bisection share: the question, how to run, and the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.ir.symbols import Symbols
from planish.passes.base import PassContext
from planish.passes.debug.bisect_ledger import Ledger
from planish.passes.debug.bisect_predicate import Predicate, Verdict
from planish.passes.debug.bisect_runs import Attempt, State, attempt, rerun
from planish.passes.debug.bisect_search import budget
from planish.passes.recipe import Recipe
from planish.passes.selecting import DisablePass
from planish.passes.steps import Instrument


@dataclass
class Task:
    """A bisection as it goes on.

    Attributes:
        program: the original.
        recipe: what turns it bad.
        predicate: what bad means.
        context: makes the context of a run.
        ledger: what was seen.
        working: told what is about to be done.
        exhaustive: look at everything.
        watching: whether the error that ends a run is the verdict.
        disabled: steps to leave out of every run, by name or number.
    """

    program: Program
    recipe: Recipe
    predicate: Predicate
    context: Callable[[], PassContext]
    ledger: Ledger
    working: Callable[[str], None]
    exhaustive: bool
    watching: bool
    disabled: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        # A pass that fixes a dynamic size fixes it for all versions of the program. Every run has
        # to begin with what was known before any of them.
        self._symbols = Symbols(self.program)

    def watchers(self) -> tuple[Instrument, ...]:
        """Instruments of the next run."""
        return self.predicate.watchers() if self.watching else ()

    def verdict(self, error: Exception | None, program: Program | None) -> Verdict:
        """Judge what a run left; one that failed is bad, whatever is asked for."""
        if error is not None:
            return Verdict(True, first_line(error))
        if self.watching:
            return Verdict(False, "no check failed")
        assert program is not None
        try:
            return self.predicate.judge(program)
        except Exception as raised:  # a broken program may raise anything; that is the evidence
            return Verdict(True, first_line(raised))

    def allowed(self, points: int) -> int:
        """How many states of a level may be looked at."""
        return points + 1 if self.exhaustive else budget(points)

    def run(self, recipe: Recipe, excluded: frozenset[str] = frozenset()) -> Attempt:
        """Run a recipe from the original program on."""
        left_out = (DisablePass(self.disabled),) if self.disabled else ()
        instruments = (*left_out, *self.watchers())
        with self._symbols.restored():
            return attempt(self.program, recipe, self.context(), instruments, excluded=excluded)

    def rerun(self, state: State, limit: int, *, watched: bool = True) -> Attempt:
        """Run the step of a state again, with the rewrite sites up to a limit."""
        watchers = self.watchers() if watched else ()
        with self._symbols.restored():
            return rerun(state, self.recipe, self.context(), watchers, limit)


def first_line(error: Exception) -> str:
    """The first line of an error's message; the kind of one that planish did not mean to raise."""
    text = error.what if isinstance(error, PlanishError) else f"{type(error).__name__}: {error}"
    return text.partition("\n")[0]
