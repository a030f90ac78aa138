"""Shrink a program while it still fails: the search behind ``planish reduce``.

1. Windows: operators near the place of the failure, at growing distance along the graph, until
   they fail together. Small ones come first, since they run in milliseconds; where no place is
   known, halves.
2. One sample, and its sizes in place of dynamic ones, if the failure allows it.
3. ``ddmin`` over the operators, until none can go (``reduce_ddmin`` names the source).
4. Fewer outputs and inputs, and plain numbers in place of weights and samples. What that makes
   superfluous, ``ddmin`` removes in a second round.

Every candidate is a legal program: see ``subgraph``. No set of operators is tried twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.passes.debug.reduce_search import Fails, Progress, Search, SpentError, Tell

MAX_TRIES = 1000


@dataclass(frozen=True)
class Reduction:
    """A smaller program that fails, and how it was found.

    Attributes:
        program: the smallest one found.
        steps: the stages, in order.
        tries: how many programs were tried.
        exhausted: whether ``max_tries`` ended the search, so that more might go.
    """

    program: Program
    steps: tuple[Progress, ...]
    tries: int
    exhausted: bool


def reduce_program(program: Program, fails: Fails, *, tell: Tell | None = None) -> Program:
    """The smallest program found that is made of parts of ``program`` and still fails.

    Args:
        program: what fails; it is not edited.
        fails: whether a program fails in the same way. It must not edit it.
        tell: told after every try and every stage.

    Raises:
        UsageError: ``program`` does not fail, so there is nothing to keep.
    """
    return reduction(program, fails, tell=tell).program


def reduction(
    program: Program,
    fails: Fails,
    *,
    anchors: Sequence[str] = (),
    known: bool = False,
    tell: Tell | None = None,
    max_tries: int = MAX_TRIES,
) -> Reduction:
    """``reduce_program`` with its story.

    Args:
        program: what fails.
        fails: whether a program fails in the same way.
        anchors: names of nodes near the failure, the likeliest first; unknown ones are ignored.
        known: whether it was seen that ``program`` fails, so that it is not tried again.
        tell: told after every try and every stage.
        max_tries: how often ``fails`` may be asked.

    Raises:
        UsageError: ``program`` does not fail, or ``max_tries`` is not positive.
    """
    if max_tries < 1:
        raise UsageError(f"max_tries is {max_tries}", hint="give at least 1")
    search = Search(program, fails, tell, max_tries)
    if not known and not search.attempt(program):
        raise UsageError(
            "the program does not fail, so there is nothing to reduce",
            hint="a failure is reduced with the recipe and the inputs that showed it",
        )
    exhausted = False
    try:
        search.go(anchors)
    except SpentError:
        exhausted = True
        search.close()
    return Reduction(search.program, tuple(search.story), search.tries, exhausted)
