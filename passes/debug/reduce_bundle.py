"""From a bundle to a smaller bundle, with a readable module beside the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from planish.ir.capture_errors import quiet
from planish.ir.errors import PlanishError
from planish.ir.files import load, save
from planish.ir.program import Program
from planish.passes.debug.bundle import Bundle, command, failure_of, load_bundle, replay
from planish.passes.debug.bundle_inputs import Inputs
from planish.passes.debug.module_source import MODULE
from planish.passes.debug.reduce import MAX_TRIES, Reduction, reduction
from planish.passes.debug.reduce_folder import (
    check_folder,
    describe,
    move,
    scratch_beside,
    write_readable,
    write_reduced,
)
from planish.passes.debug.reduce_search import Fails, Tell
from planish.passes.debug.reduce_suspects import suspects

_BATCHES = 8  # of calibration data, that a part of the program is tried on


class NotReproducedError(PlanishError):
    """The bundle does not fail here, or fails in another way: there is nothing to reduce."""


@dataclass(frozen=True)
class ReducedBundle:
    """What ``reduce_bundle`` wrote.

    Attributes:
        folder: the new bundle.
        before: operators of the program before.
        after: operators now.
        bytes_before: of the constants.
        bytes_after: likewise.
        reduction: how it was found.
        passes: the passes of the new bundle, as text.
        module: whether ``module.py`` was written.
        problem: why ``module.py`` does not stand for the program, and only ``program.pt2``
            reproduces the failure; None where it does.
    """

    folder: Path
    before: int
    after: int
    bytes_before: int
    bytes_after: int
    reduction: Reduction
    passes: tuple[str, ...]
    module: bool
    problem: str | None

    @property
    def removed(self) -> float:
        """The share of the operators that is gone, 0 to 1."""
        return 1 - self.after / self.before if self.before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "folder": str(self.folder),
            "operators_before": self.before,
            "operators_after": self.after,
            "removed_ratio": self.removed,
            "constant_bytes_before": self.bytes_before,
            "constant_bytes_after": self.bytes_after,
            "tries": self.reduction.tries,
            "exhausted": self.reduction.exhausted,
            "steps": [step.to_dict() for step in self.reduction.steps],
            "passes": list(self.passes),
            "module": MODULE if self.module else None,
            "problem": self.problem,
            "replay": command(self.folder),
        }


def reduce_bundle(
    bundle: Bundle,
    folder: Path,
    *,
    tell: Tell | None = None,
    max_tries: int = MAX_TRIES,
) -> ReducedBundle:
    """Shrink the program of a bundle while its failure persists, and write it as a bundle.

    Args:
        bundle: what to reduce; it is not changed.
        folder: the new bundle; one that is there already is replaced.
        tell: told after every try and every stage.
        max_tries: how many programs may be tried.

    Raises:
        NotReproducedError: the bundle does not fail here as it says.
        UsageError: ``folder`` exists and is no bundle, or ``max_tries`` is not positive.
        ExportError: the new bundle cannot be written. Nothing is left behind.
    """
    check_folder(folder)
    program = bundle.program
    view, only, error = _reproduced(bundle)
    anchors = suspects(view, error)

    def fails(candidate: Program) -> bool:
        return _fails(view, candidate, only=only)

    with scratch_beside(folder) as scratch:

        def fails_from_file(candidate: Program) -> bool:
            return fails(candidate) and _survives(candidate, scratch, fails)

        searches = _Searches(anchors, tell, max_tries)
        found = searches.run(program, fails)
        if 2 * len(found.program.operators) > len(program.operators):
            wide = _widened(bundle)
            if wide is not None and fails(wide):
                found = searches.run(wide, fails)
        if not _survives(found.program, scratch, fails):
            found = searches.run(program, fails_from_file)  # among what files can hold
        written = write_reduced(view, found.program, scratch, only=only)
        module, problem = write_readable(written, fails)
        describe(written, folder, module=module, problem=problem)
        move(written, folder)
    facts = load_bundle(folder, program=False).facts
    return ReducedBundle(
        folder=folder,
        before=len(program.operators),
        after=len(found.program.operators),
        bytes_before=_bytes(program),
        bytes_after=_bytes(found.program),
        reduction=found,
        passes=facts.passes,
        module=module,
        problem=problem,
    )


class _Searches:
    """One search after the other, if one does not do; together they try no more than allowed."""

    def __init__(self, anchors: Sequence[str], tell: Tell | None, max_tries: int):
        self.anchors = anchors
        self.tell = tell
        self.max_tries = max_tries
        self.before: tuple[Reduction, ...] = ()

    def run(self, program: Program, fails: Fails) -> Reduction:
        """Search, and tell of this search and those before as of one."""
        spent = sum(r.tries for r in self.before)
        left = max(1, self.max_tries - spent)
        new = reduction(
            program, fails, anchors=self.anchors, known=True, tell=self.tell, max_tries=left
        )
        steps = [s for r in self.before for s in r.steps]
        steps += [replace(s, tries=s.tries + spent) for s in new.steps]
        self.before = (*self.before, new)
        return Reduction(new.program, tuple(steps), new.tries + spent, new.exhausted)


def _widened(bundle: Bundle) -> Program | None:
    """The program with what the run saw besides its samples as further samples.

    A part of the program takes other inputs, so nothing but samples reaches it. None where the run
    saw nothing else.
    """
    names = bundle.program.signature.tensor_names
    more: list[tuple[Any, ...]] = []
    for inputs in (bundle.probe, bundle.calibration):
        if inputs is not None and inputs.names == names:
            more += islice(inputs, _BATCHES)
    if not more:
        return None
    wide = bundle.program.clone()
    wide.samples = (*wide.samples, *more)
    return wide


class _Unpinned(Bundle):
    """A bundle without its second probe: smaller programs take other inputs anyway."""

    @property
    def probe(self) -> Inputs | None:
        """None."""
        return None


def _reproduced(bundle: Bundle) -> tuple[Bundle, bool, BaseException]:
    """How to replay: the bundle or a view of it, whether the failing pass is enough; the error.

    Raises:
        NotReproducedError: says what happened instead.
    """
    wanted = bundle.failure.signature
    unpinned = _Unpinned(bundle.folder, bundle.facts)
    unpinned.program = bundle.program
    only_failing = (True, False) if bundle.facts.stage == "pass" else (False,)
    error = None
    for view in (unpinned, bundle):
        for only in only_failing:
            error = replay(view, only_failing=only)
            if error is not None and failure_of(error).signature == wanted:
                return view, only, error
    happened = "nothing fails" if error is None else f"something else fails: {error}"
    raise NotReproducedError(
        f"{bundle.folder} does not reproduce here: {happened}",
        where=f"recorded: {wanted}",
        hint=f"`{command(bundle.folder)}` shows what differs between that machine and this one",
    )


def _fails(bundle: Bundle, candidate: Program, *, only: bool) -> bool:
    with quiet():  # torch logs what its shape functions reject, again and again
        error = replay(bundle, candidate, only_failing=only)
    return error is not None and failure_of(error).signature == bundle.failure.signature


def _survives(program: Program, folder: Path, fails: Fails) -> bool:
    """Whether a program still fails after saving and loading."""
    path = folder / "candidate.pt2"
    try:
        save(program, path)
        return fails(load(path))
    except PlanishError:  # no file can hold it
        return False
    finally:
        path.unlink(missing_ok=True)


def _bytes(program: Program) -> int:
    return sum(c.nbytes for c in program.constants.values() if isinstance(c, Tensor))
