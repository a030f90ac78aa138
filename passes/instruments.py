"""Instruments that show a run: times, texts, events; and the set that ``optimize`` uses."""

from __future__ import annotations

import difflib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import PassResult
from planish.passes.checking import CompareEach, VerifyEach
from planish.passes.dump import Dump
from planish.passes.selecting import DisablePass, ExcludeSites, SiteLimit, StartFrom, StopAfter
from planish.passes.steps import Instrument, Run, Step

__all__ = [
    "CompareEach",
    "DisablePass",
    "Dump",
    "Event",
    "ExcludeSites",
    "Instrument",
    "PrintAfter",
    "Progress",
    "SiteLimit",
    "StartFrom",
    "StopAfter",
    "Timing",
    "VerifyEach",
    "default_instruments",
]


def default_instruments(
    *,
    verify: Literal["each", "end", "off"] = "each",
    dump_dir: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
    seed: int = 0,
    reproduce: bool = False,
) -> tuple[Instrument, ...]:
    """The instruments of ``optimize``, outermost first.

    Args:
        verify: hold every pass to its contract, or the result only, or nothing.
        dump_dir: a folder for the program after every pass.
        progress: told of every step as it begins and ends.
        seed: of the second probe.
        reproduce: write a bundle that replays a failure: into the dump folder, else where
            ``PLANISH_REPRO_DIR`` says, else into the system's folder for temporary files.

    Raises:
        UsageError: ``verify`` is none of the three.
    """
    if verify not in ("each", "end", "off"):
        raise UsageError(f"verify is {verify!r}", hint="use 'each', 'end' or 'off'")
    found: list[Instrument] = []
    at_end = verify == "end"
    compare = CompareEach(at_end=at_end, seed=seed) if verify != "off" else None
    if reproduce:
        from planish.passes.debug.reproduce import Reproduce

        # Outermost: it must see what all others raise.
        found.append(Reproduce(dump_dir, verify=verify, seed=seed, compare=compare))
    if progress is not None:
        found.append(Progress(progress))
    if dump_dir is not None:
        found.append(Dump(dump_dir))
    if compare is not None:
        # Called in reverse after a pass: invariants first, numbers only of a sound program.
        found += [compare, VerifyEach(at_end=at_end)]
    return tuple(found)


@dataclass(frozen=True)
class Event:
    """Something happened in a run.

    Attributes:
        kind: ``"begin"`` and ``"end"`` of the run, ``"pass"`` before and ``"done"`` after a step,
            ``"failed"`` where it raised, ``"batch"`` for every calibration batch it has read.
        total: number of steps.
        index: the step's position in the recipe, from 1; 0 for the run.
        name: the pass; empty for the run.
        seconds: since the step or the run began.
        batch: how many calibration batches the step has read.
        batches: of how many.
    """

    kind: Literal["begin", "pass", "batch", "done", "failed", "end"]
    total: int
    index: int = 0
    name: str = ""
    seconds: float = 0.0
    batch: int = 0
    batches: int = 0


class Progress(Instrument):
    """Tell somebody how far a run is; whoever listens draws."""

    def __init__(self, tell: Callable[[Event], None]):
        self.tell = tell
        self._began = self._step = 0.0

    def before_pipeline(self, run: Run) -> None:
        """The run begins."""
        self._began = time.perf_counter()
        self.tell(Event("begin", len(run.steps)))

    def before_pass(self, step: Step) -> None:
        """A step begins."""
        self._step = time.perf_counter()
        self._about(step, "pass", 0.0)

    def within_pass(self, step: Step, done: int, total: int) -> None:
        """A step has read some calibration batches."""
        steps, seconds = len(step.run.steps), time.perf_counter() - self._step
        self.tell(Event("batch", steps, step.index, step.name, seconds, done, total))

    def after_pass(self, step: Step, result: PassResult) -> None:
        """A step ended, checks included."""
        self._about(step, "done", time.perf_counter() - self._step)

    def after_failure(self, step: Step, error: BaseException) -> None:
        """A step failed."""
        self._about(step, "failed", time.perf_counter() - self._step)

    def after_pipeline(self, run: Run) -> None:
        """The run ended."""
        self.tell(Event("end", len(run.steps), seconds=time.perf_counter() - self._began))

    def _about(self, step: Step, kind: Literal["pass", "done", "failed"], seconds: float) -> None:
        self.tell(Event(kind, len(step.run.steps), step.index, step.name, seconds))


@dataclass(frozen=True)
class Time:
    """Seconds of one step, and its operators.

    Attributes:
        index: position in the recipe, from 1.
        name: the pass.
        seconds: of the pass alone.
        checking: of all that the instruments inside did about it.
        nodes_before: operators of the program before.
        nodes_after: operators after; None where the pass returned nothing.
    """

    index: int
    name: str
    seconds: float
    checking: float
    nodes_before: int
    nodes_after: int | None


class Timing(Instrument):
    """Measure every step; put it first to time the other instruments as well.

    Attributes:
        times: one entry per step that ran.
    """

    def __init__(self) -> None:
        self.times: list[Time] = []
        self._began = 0.0

    def before_pipeline(self, run: Run) -> None:
        """Forget the run before."""
        self.times = []

    def before_pass(self, step: Step) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Stop it."""
        self._stop(step)

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Stop it."""
        self._stop(step)

    def _stop(self, step: Step) -> None:
        whole = time.perf_counter() - self._began
        own = step.record.seconds
        assert step.before is not None
        after = len(step.after.operators) if step.after is not None else None
        checking = max(0.0, whole - own)
        before = len(step.before.operators)
        self.times.append(Time(step.index, step.name, own, checking, before, after))

    def table(self) -> str:
        """The times as text, the slowest first; ``around it`` is what watched and checked."""
        rows = sorted(self.times, key=lambda t: -(t.seconds + t.checking))
        lines = [f"{'pass':<36}{'ms':>10}{'around it, ms':>16}"]
        lines += [f"{t.name:<36}{1e3 * t.seconds:>10.1f}{1e3 * t.checking:>16.1f}" for t in rows]
        total, checks = sum(t.seconds for t in rows), sum(t.checking for t in rows)
        return "\n".join([*lines, f"{'total':<36}{1e3 * total:>10.1f}{1e3 * checks:>16.1f}"])


class PrintAfter(Instrument):
    """Print the program after passes, also after one whose result was rejected.

    Args:
        pattern: a regular expression that the whole name of a pass must match.
        changed: only after passes that changed something.
        stream: where to; None is standard output.

    Raises:
        UsageError: the pattern is no regular expression.

    A pattern that matches no pass of the recipe is an error; where it matches only passes that
    were left out, or nothing changed, a remark says so.
    """

    def __init__(self, pattern: str = ".*", *, changed: bool = False, stream: TextIO | None = None):
        self.pattern = self.compiled(pattern)
        self.changed = changed
        self.stream = stream
        self._printed = False

    @staticmethod
    def compiled(pattern: str) -> re.Pattern[str]:
        """The expression.

        Raises:
            UsageError: the pattern is none.
        """
        try:
            return re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from None

    def before_pipeline(self, run: Run) -> None:
        """See whether anything can be printed.

        Raises:
            UsageError: no pass of the recipe has a name like this.
        """
        self._printed = False
        check_printed(self.pattern.pattern, [step.name for step in run.steps])

    def after_pipeline(self, run: Run) -> None:
        """Say that nothing was printed, and why."""
        if self._printed or run.failure is not None:
            return
        for step in run.steps:
            if self.pattern.fullmatch(step.name):
                why = "no such pass changed the program" if self.changed else "it was left out"
                step.remark(f"nothing was printed after {self.pattern.pattern!r}: {why}")
                return

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Print."""
        self._print(step, result.program, "")

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Print what the pass returned, if it did."""
        if step.after is not None:
            self._print(step, step.after, f", which failed: {str(error).splitlines()[0]}")

    def _print(self, step: Step, program: Program, outcome: str) -> None:
        if self.pattern.fullmatch(step.name) and (step.record.changed or not self.changed):
            self._printed = True
            stream = self.stream or sys.stdout
            stream.write(f"// after step {step.index}, {step.text}{outcome}\n{text(program)}\n")


def check_printed(pattern: str, names: Sequence[str]) -> None:
    """Refuse a pattern after which nothing could be printed.

    Raises:
        UsageError: it is no regular expression, or matches none of these names of passes.
    """
    expression = PrintAfter.compiled(pattern)
    if any(expression.fullmatch(name) for name in names):
        return
    parts = [name for name in names if expression.search(name)]
    near = (parts or difflib.get_close_matches(pattern, names, n=1) or [""])[0]
    whole = f"; the whole name counts: '.*{pattern}.*'" if parts else ""
    raise UsageError(
        f"{pattern!r} matches no pass of the recipe",
        hint=f"did you mean {near!r}?{whole}" if near else "it runs: " + (", ".join(names) or "-"),
    )
