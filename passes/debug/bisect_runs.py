"""Runs of a recipe, or of one step of it, whose states are kept for a bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from planish.ir.changes import Change, SiteCounter
from planish.ir.errors import RequirementError, VerificationError
from planish.ir.program import Program
from planish.ir.snapshot import Snapshot
from planish.ir.text import digest, text
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.steps import Instrument, Step


@dataclass
class LoggedSites(SiteCounter):
    """A site counter that remembers who asked, for the sites that were granted."""

    log: dict[int, tuple[str, str]] = field(default_factory=dict)

    def take(self, rule: str = "", node: str = "") -> int | None:
        """As ``SiteCounter.take``."""
        number = super().take(rule, node)
        if number is not None:
            self.log[number] = (rule, node)
        return number


@dataclass(frozen=True)
class State:
    """What one step that changed something, or failed, came to.

    Attributes:
        step: its number in the recipe, from 1.
        pass_: the pass.
        before: the program before it.
        program: the program after it; None where it failed before it returned one.
        first: how many sites had asked before it.
        sites: the numbers of the sites at which it rewrote something; where it failed on the way,
            of all sites it was granted.
        changes: what it recorded.
        error: what stopped it, if anything did.
        spoiled: whether it wrote into the constants that it shares with all programs before.
    """

    step: int
    pass_: Pass
    before: Program
    program: Program | None
    first: int
    sites: tuple[int, ...]
    changes: tuple[Change, ...] = ()
    error: Exception | None = None
    spoiled: bool = False

    def change(self, number: int) -> Change | None:
        """The change of a site."""
        return next((c for c in self.changes if c.number == number), None)


@dataclass(frozen=True)
class Attempt:
    """A finished run.

    Attributes:
        states: of the steps that changed something, and of the one that failed.
        program: the result; None where a pass failed.
        error: what stopped it; also one that is no single step's fault.
        sites: who asked for rewrite sites.
    """

    states: tuple[State, ...]
    program: Program | None
    error: Exception | None
    sites: LoggedSites

    @property
    def failed(self) -> State | None:
        """The state of the step that failed."""
        last = self.states[-1] if self.states else None
        return last if last is not None and last.error is not None else None


class _Keep(Instrument):
    """Keeps every state of a run: graphs, and the constants that passes made; others are shared."""

    def __init__(self, sites: LoggedSites):
        self.sites = sites
        self.states: list[State] = []
        self._first = 0
        self._constants: Snapshot | None = None

    def before_pass(self, step: Step) -> None:
        assert step.before is not None  # it is the step's turn
        self._first = self.sites.count
        self._constants = Snapshot(step.before)

    def after_pass(self, step: Step, result: PassResult) -> None:
        if step.record.changed:
            self._keep(step, result.program, None)

    def after_failure(self, step: Step, error: BaseException) -> None:
        if isinstance(error, Exception):  # an interrupt is no fault of the pass
            self._keep(step, step.after, error)

    def _keep(self, step: Step, program: Program | None, error: Exception | None) -> None:
        assert step.before is not None
        assert self._constants is not None
        granted = [n for n in self.sites.log if n > self._first]
        changes = step.record.changes
        if program is not None:  # a site at which nothing was edited is none
            changed = {c.number for c in changes}
            granted = [n for n in granted if n in changed]
        self.states.append(
            State(
                step.index,
                step.pass_,
                step.before,
                program,
                self._first,
                tuple(granted),
                changes,
                error,
                error is not None and any(self._constants.written()),
            )
        )


def attempt(
    program: Program,
    recipe: Recipe,
    context: PassContext,
    instruments: Sequence[Instrument] = (),
    *,
    limit: int | None = None,
    first: int | None = None,
    excluded: frozenset[str] = frozenset(),
) -> Attempt:
    """Run a recipe and keep its states; a step that fails ends the run and is one of them.

    Args:
        program: where to start.
        recipe: what to run.
        context: as for ``run_pipeline``; its site counter says what is left out anyway.
        instruments: more watchers.
        limit: the last rewrite site that is granted.
        first: how many sites asked before, in the run of which this is a part; None takes what the
            context's counter says.
        excluded: sites to leave out, as ``rule@node``.

    Raises:
        PlanishError: what is no fault of a step: a pass lacks data, an option cannot be written.
    """
    given = context.sites
    limits = [n for n in (limit, given.limit) if n is not None]
    start = given.count if first is None else first
    sites = LoggedSites(min(limits, default=None), start, given.excluded | excluded)
    keep = _Keep(sites)
    context = replace(context, sites=sites)
    error: Exception | None = None
    result: Program | None = None
    try:
        result = run_pipeline(program, recipe, context, (keep, *instruments)).program
    except RequirementError:
        raise
    except Exception as raised:  # a broken program may raise anything; it is the evidence
        drifted = isinstance(raised, VerificationError) and not _failed(keep)
        if not _failed(keep) and not drifted:
            raise
        error = raised
    return Attempt(tuple(keep.states), result, error, sites)


def rerun(
    state: State,
    recipe: Recipe,
    context: PassContext,
    instruments: Sequence[Instrument],
    limit: int,
) -> Attempt:
    """Run the step of a state again on the program before it, with fewer rewrite sites.

    The numbers of the sites and the random numbers are those of the whole run.
    """
    alone = replace(recipe, passes=(state.pass_,))
    return attempt(state.before, alone, context, instruments, limit=limit, first=state.first)


def _failed(keep: _Keep) -> bool:
    return bool(keep.states) and keep.states[-1].error is not None


def outcome(found: Attempt, before: Program) -> Program | None:
    """The program that a rerun left, also where a check rejected it; None where there is none."""
    if found.failed is not None:
        return found.failed.program
    return found.states[-1].program if found.states else before


def same_outcome(state: State, again: Attempt) -> bool:
    """Whether a rerun without checks came to what the whole run came to at that step."""
    program = outcome(again, state.before)
    if state.program is None or program is None:
        return state.program is program and type(_error(again)) is type(state.error)
    if state.error is not None:  # what a check rejected may be in no state to be printed
        return [n.name for n in program.nodes] == [n.name for n in state.program.nodes]
    return same_program(state.program, program)


def _error(found: Attempt) -> Exception | None:
    return found.failed.error if found.failed is not None else None


def same_program(a: Program, b: Program) -> bool:
    """Whether two programs print the same and hold the same values."""
    if a is b:
        return True
    if text(a) != text(b):
        return False
    return all(
        a.constants[name] is b.constants[name]
        or digest_of(a.constants[name]) == digest_of(b.constants[name])
        for name in {str(n.target) for n in a.graph.find_nodes(op="get_attr")}
    )


def digest_of(constant: object) -> str:
    """A digest of a constant's values; the body of a branch prints with the program."""
    return digest(constant) if isinstance(constant, Tensor) else ""
