"""``Reproduce``: the instrument that writes a bundle when a run fails, and nothing otherwise."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from planish.ir.compare import bounds_of
from planish.ir.errors import PlanishError, UnsupportedError
from planish.ir.files import load
from planish.ir.program import Program
from planish.ir.symbols import Symbols
from planish.ir.text import text
from planish.passes.checking import CompareEach
from planish.passes.debug.bundle import PROGRAM, Facts, Sites, command, write_bundle
from planish.passes.debug.bundle_failure import failure_of, is_failure, name_step
from planish.passes.debug.bundle_subject import Subject, kept_passes
from planish.passes.recipe import step_text
from planish.passes.steps import Instrument, Run, Step

FOLDER_VARIABLE = "PLANISH_REPRO_DIR"


def bundle_folder(folder: str | Path | None = None) -> Path:
    """Where bundles go: the folder given, else the environment's, else that for temporary files."""
    found = folder or os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()
    return Path(found).expanduser().absolute()


def tell(error: BaseException, folder: Path) -> None:
    """Say on an error how to replay it."""
    if isinstance(error, PlanishError):
        error.replayed_by(command(folder))
    else:
        error.add_note(f"replay: {command(folder)}")


class Reproduce(Instrument):
    """Write a bundle for whatever a pass or a checking instrument raises.

    Put it first: it must see what the other instruments raise. A successful run costs nothing.
    Errors of the call (``UsageError``, ``RecipeError``, ``RequirementError``) and interrupts leave
    none. Where the bundle cannot be written, the error says why in a note.

    Args:
        folder: where to; None takes what ``PLANISH_REPRO_DIR`` names, else the system's folder
            for temporary files.
        verify: as the other instruments check, so that a replay checks alike.
        seed: of the second probe.
        compare: the instrument whose second probe a replay must take; None derives it again.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        verify: Literal["each", "end", "off"] = "each",
        seed: int = 0,
        compare: CompareEach | None = None,
    ):
        self.folder = folder
        self.verify = verify
        self.seed = seed
        self.compare = compare
        self._began = self._step_began = 0
        self._told: BaseException | None = None

    def before_pipeline(self, run: Run) -> None:
        """Remember what the passes will change besides the program."""
        self._began = self._step_began = run.context.sites.count
        self._symbols = self._step_symbols = Symbols(run.original)
        self._told = None

    def before_pass(self, step: Step) -> None:
        """Remember what the pass will change besides the program."""
        assert step.before is not None
        self._step_began = step.run.context.sites.count
        self._step_symbols = Symbols(step.before)

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Bundle the program before the pass, and the recipe from there on."""
        self._told = error
        name_step(error, step.label)
        if is_failure(error):
            self._write(error, step.run, step)

    def after_pipeline(self, run: Run) -> None:
        """Bundle the original program and the whole recipe, where no single pass failed."""
        if run.failure is not None and run.failure is not self._told and is_failure(run.failure):
            self._write(run.failure, run, None)

    def _write(self, error: BaseException, run: Run, step: Step | None) -> None:
        problems: list[str] = []
        for subject in self._subjects(run, step):
            try:
                with subject.symbols.restored():
                    folder = self._bundle(error, subject)
                tell(error, folder)
            except Exception as problem:  # the first error must show, whatever keeps us
                why = problem.what if isinstance(problem, PlanishError) else repr(problem)
                problems.append(f"{subject.name}: {why}")
            else:
                return
        error.add_note(f"no bundle was written to replay this: {'; '.join(problems)}")

    def _subjects(self, run: Run, step: Step | None) -> list[Subject]:
        """What to bundle, the best first."""
        planned = [s for s in run.steps if s.planned]
        whole = Subject(
            "the original program", run, run.original, planned, self._began, self._symbols, None
        )
        if step is None or step.before is None:
            return [whole]
        rest = [s for s in planned if s.index >= step.index]
        own = Subject(
            "the program before it",
            run,
            step.before,
            rest,
            self._step_began,
            self._step_symbols,
            step,
        )
        if step.before is run.original:
            return [own]
        # Unchecked, an earlier pass may have left a program that no file can hold.
        upto = [s for s in planned if s.index <= step.index]
        return [own, replace(whole, steps=upto)]

    def _bundle(self, error: BaseException, subject: Subject) -> Path:
        run = subject.run
        kept, left_out = kept_passes(subject, error, self._replayed())
        checked = self.verify != "off"
        probe, sizes = None, dict[str, int]()
        if checked:
            taken = self.compare.reference if self.compare is not None else None
            second = taken or CompareEach(seed=self.seed).second(run.original)
            probe, sizes = second.inputs, dict(second.sizes or {})
        sites, context = run.context.sites, run.context
        recipe = replace(run.recipe, passes=kept, target=run.recipe.target or context.target)
        facts = Facts(
            stage="recipe" if subject.failing is None else "pass",
            failure=failure_of(error),
            verify=self.verify,
            seed=self.seed,
            sites=Sites(subject.count, sites.limit, tuple(sorted(sites.excluded))),
            bounds=bounds_of(run.original) if checked else None,
            sizes=sizes,
            passes=tuple(step_text(pass_) for pass_ in kept),
            left_out=left_out,
        )
        found = write_bundle(
            bundle_folder(self.folder),
            facts,
            subject.program,
            recipe,
            calibration=context.calibration,
            probe=probe,
            error=error,
        )
        if self.verify != "each":
            _check_readable(found, subject.program)
        return found

    def _replayed(self) -> frozenset[type[Instrument]]:
        """The kinds of instruments that a replay has too."""
        from planish.passes.instruments import default_instruments

        return frozenset(type(i) for i in default_instruments(verify=self.verify, seed=self.seed))


def _check_readable(folder: Path, program: Program) -> None:
    """Nobody has verified the program, so it may not be one that a file can hold.

    Raises:
        PlanishError: it is not; the bundle is gone then.
    """
    try:
        same = text(load(folder / PROGRAM)) == text(program)
    except Exception:  # an unsound program may fail in any way
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        raise UnsupportedError("it is not the same after saving and loading")
