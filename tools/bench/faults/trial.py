"""One fault on trial: where it was caught, and by what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from planish.ir.errors import PlanishError, VerificationError
from planish.passes.base import PassContext
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.steps import Instrument, Run, Step
from planish.tools.bench.faults.models import TARGET, cached_run, protected
from planish.tools.bench.faults.planted import MARK
from planish.tools.bench.faults.spec import Fault, NotPlantedError


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How the run of a recipe with one fault in it ended.

    Attributes:
        fault: its name.
        model: where it was planted.
        inner: in which pass.
        guilty: the number of that step, from 1.
        caught: the number of the step that failed; 0 the end of the run, None nothing failed.
        by: the rule or comparison that caught it; empty if none.
        planted: what the planted pass said of its site.
        message: the first line of the error.
    """

    fault: str
    model: str
    inner: str
    guilty: int
    caught: int | None
    by: str
    planted: str
    message: str = ""

    @property
    def site(self) -> tuple[int, str, str]:
        """Number, rule and node of the planted site."""
        found = re.fullmatch(r"\S+ at site (\d+): (\S+?)@(\S+)", self.planted)
        assert found is not None
        return int(found[1]), found[2], found[3]

    @property
    def where(self) -> str:
        """``guilty pass``, ``later`` or ``never``."""
        if self.caught is None:
            return "never"
        return "guilty pass" if self.caught == self.guilty else "later"


class _Watch(Instrument):
    """Notes which step failed, and what the planted one said."""

    def __init__(self) -> None:
        self.failed = 0
        self.run: Run | None = None

    def before_pipeline(self, run: Run) -> None:
        """Remember the run."""
        self.run = run

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Note the step."""
        self.failed = step.index

    @property
    def planted(self) -> str:
        """The remark of the planted pass."""
        records = self.run.records if self.run else ()
        remarks = [sentence for record in records for sentence in record.remarks]
        return next((s.removeprefix(MARK) for s in remarks if s.startswith(MARK)), "")


def attempt(
    fault: Fault, folder: Path | None = None, *, extra: tuple[Instrument, ...] = ()
) -> Trial:
    """Run the fault's recipe on its model, with the fault planted, under default verification.

    Args:
        fault: what to plant.
        folder: where captured programs are kept.
        extra: more instruments, which see the run from further out.

    Raises:
        NotPlantedError: the catalogue is wrong: the fault met no site, or could not spoil it.
    """
    clean = cached_run(fault.model, fault.recipe, folder)
    guilty, recipe = clean.planted(fault)
    program = protected(clean.program) if fault.writes else clean.program
    watch = _Watch()
    caught: int | None = None
    by = message = ""
    instruments = (watch, *extra, *default_instruments())
    try:
        with clean.symbols.restored():
            run_pipeline(program, recipe, PassContext(target=TARGET), instruments)
    except NotPlantedError:
        raise
    except PlanishError as error:
        caught, by, message = watch.failed, caught_by(error), error.what
    if not watch.planted:
        raise NotPlantedError(f"the fault {fault.name} was not planted")
    return Trial(
        fault=fault.name,
        model=fault.model,
        inner=fault.inner,
        guilty=guilty,
        caught=caught,
        by=by,
        planted=watch.planted,
        message=message,
    )


def caught_by(error: PlanishError) -> str:
    """The verifier's rule, the comparison, or the check of the pipeline behind an error."""
    verifier = isinstance(error, VerificationError)
    rule = re.search(r"rule ([\w-]+): ", error.what) if verifier else None
    if rule:
        return f"rule {rule[1]}"
    for text, name in (
        (r"at the sample inputs", "comparison: sample"),
        (r"at the second probe", "comparison: second probe"),
        (r"no longer runs on", "comparison: it does not run"),
        (r"it wrote into", "pipeline: written in place"),
        (r"it changed the inputs or the outputs", "pipeline: signature"),
        (r"rejects these operands", "rewriter: types"),
    ):
        if re.search(text, error.what):
            return name
    return f"{type(error).__name__}: {error.what.splitlines()[0][:60]}"
