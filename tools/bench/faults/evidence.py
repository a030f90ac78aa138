"""What the debugging tools make of a caught fault: bisect, replay elsewhere, reduce."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from planish.ir.errors import PlanishError
from planish.passes.base import PassContext
from planish.passes.debug.bisect import bisect
from planish.passes.debug.bundle import failure_of, load_bundle, replay
from planish.passes.debug.predicates import KeepsContract
from planish.passes.debug.reduce_bundle import reduce_bundle
from planish.passes.debug.reproduce import Reproduce
from planish.tools.bench.faults.models import TARGET, cached_run, protected
from planish.tools.bench.faults.spec import Fault
from planish.tools.bench.faults.trial import Trial, attempt

_REPLAY_SECONDS = 300


@dataclass(frozen=True)
class Bisected:
    """What ``bisect`` said of a fault.

    Attributes:
        right: whether it named the guilty step, and the number, rule and node of the site.
        within: whether every level took at most ``ceil(log2 N) + 1`` evaluations.
        evaluations: how many both levels took.
        answer: what it named.
    """

    right: bool
    within: bool
    evaluations: int
    answer: str


def bisected(fault: Fault, trial: Trial, folder: Path | None = None) -> Bisected:
    """Let ``bisect`` look for a fault that was caught."""
    clean = cached_run(fault.model, fault.recipe, folder)
    step, recipe = clean.planted(fault)
    program = protected(clean.program) if fault.writes else clean.program
    with clean.symbols.restored():
        found = bisect(
            program,
            recipe,
            KeepsContract(),
            context_factory=lambda: PassContext(target=TARGET),
        )
    number, rule, node = trial.site
    levels = [e for e in found.evaluations if e.level in ("pass", "site")]
    return Bisected(
        right=(found.step, found.site, found.rule, found.node) == (step, number, rule, node),
        within=all(e.number <= e.budget for e in levels),
        evaluations=len(levels),
        answer=f"step {found.step}, site {found.site}: {found.rule}@{found.node}",
    )


@dataclass(frozen=True)
class Replayed:
    """What became of the bundle of a fault.

    Attributes:
        same: whether a fresh process fails with the same signature.
        signature: that of the bundle.
        found: that of the replay, or what went wrong.
        operators: of the bundle's program.
        left: operators after ``reduce``; None where that was not asked for.
    """

    same: bool
    signature: str
    found: str
    operators: int
    left: int | None = None

    @property
    def removed(self) -> float:
        """The share of operators that ``reduce`` removed, 0 to 1."""
        return 1 - (self.operators if self.left is None else self.left) / max(1, self.operators)


def replayed(fault: Fault, folder: Path | None = None, *, reduce: bool = False) -> Replayed:
    """Write the bundle of a fault that is caught, replay it in a fresh process, and reduce it."""
    with tempfile.TemporaryDirectory(prefix="planish-faults-") as scratch:
        attempt(fault, folder, extra=(Reproduce(scratch),))
        bundles = sorted(path for path in Path(scratch).iterdir() if path.is_dir())
        if len(bundles) != 1:
            return Replayed(False, "", f"{len(bundles)} bundles were written", 0)
        found = _in_fresh_process(bundles[0], Path(scratch) / "replayed.txt")
        bundle = load_bundle(bundles[0])
        signature, operators = bundle.failure.signature, len(bundle.program.operators)
        left = None
        if reduce:
            try:
                left = reduce_bundle(bundle, Path(scratch) / "reduced").after
            except PlanishError as error:
                found = f"{found}; reduce: {error.what}"
    return Replayed(found.split(";")[0] == signature, signature, found, operators, left)


def processes() -> ForkServerContext:
    """Makes processes that have planish imported, and have run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _in_fresh_process(bundle: Path, result: Path) -> str:
    """The signature of the failure that another process sees, or what became of that."""
    process = processes().Process(target=_replay, args=(str(bundle), str(result)))
    process.start()
    process.join(_REPLAY_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return "the replay did not end"
    code = process.exitcode
    return result.read_text(encoding="utf-8") if result.is_file() else f"exit code {code}"


def _replay(bundle: str, result: str) -> None:
    import torch

    torch.set_num_threads(1)
    error = replay(load_bundle(bundle))
    said = "nothing failed" if error is None else failure_of(error).signature
    Path(result).write_text(said, encoding="utf-8")
