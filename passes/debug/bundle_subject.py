"""What of a run goes into a bundle, and what a bundle cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planish.ir.errors import RecipeError
from planish.ir.program import Program
from planish.ir.symbols import Symbols
from planish.passes.base import Fact, Pass
from planish.passes.debug.bundle_failure import raised_by
from planish.passes.registry import load_class, name_of
from planish.passes.steps import Instrument, Run, Step

_UNBUNDLED = frozenset({Fact.LOSS, Fact.LABELS})


@dataclass(frozen=True)
class Subject:
    """A program and the steps that fail on it.

    Attributes:
        name: what it is, for messages.
        run: the run that failed.
        program: what to bundle.
        steps: what is left to run on it.
        count: rewrite sites that had asked before.
        symbols: what was known of the program's sizes then.
        failing: the step at fault, the first; None where all are together.
    """

    name: str
    run: Run
    program: Program
    steps: Sequence[Step]
    count: int
    symbols: Symbols
    failing: Step | None


def kept_passes(
    subject: Subject, error: BaseException, replayed: frozenset[type[Instrument]]
) -> tuple[tuple[Pass, ...], tuple[str, ...]]:
    """The passes to bundle, and sentences on what a bundle cannot hold."""
    kept: list[Pass] = []
    left_out: list[str] = []
    context = subject.run.context
    for step in subject.steps:
        needed = subject.failing is None or step is subject.failing
        problem = _unimportable(step.pass_)
        wanted = sorted(fact.name.lower() for fact in step.pass_.needs() & _UNBUNDLED)
        if problem:
            left_out.append(f"{step.label}: {problem}")
        if wanted:
            left_out.append(
                f"{step.label} needs {' and '.join(wanted)}, which no file can hold: replay it "
                "with planish.passes.debug.bundle.replay(bundle, loss=..., labeled=...)"
            )
        if needed or not (problem or wanted):
            kept.append(step.pass_)
    if context.loss is not None or context.labeled is not None:
        if not any("which no file can hold" in sentence for sentence in left_out):
            left_out.append("loss and labeled data were given; no pass here asks for them")
    if context.metric is not None:
        left_out.append("the metric, which no file can hold: what asks for it fails otherwise")
    if context.held_out is not None:
        left_out.append("the held-out calibration inputs: a replay judges by the others")
    if subject.failing is not None and subject.run.floating not in (None, subject.program):
        left_out.append("the program from before it was quantized, which some passes ask for")
    culprit = raised_by(error)
    if culprit is not None and type(culprit) not in replayed:
        kind = type(culprit)
        left_out.append(
            f"the instrument {kind.__module__}:{kind.__qualname__}, in which the error arose"
        )
    return tuple(kept), tuple(left_out)


def _unimportable(pass_: Pass) -> str | None:
    """Why another process cannot import a pass; None where it can."""
    cls = type(pass_)
    location = name_of(cls)
    if ":" not in location:
        return None
    if cls.__module__ == "__main__":
        return f"{location} is part of a script, which another process cannot import"
    try:
        found = load_class(location)
    except RecipeError as error:
        return error.what
    return (
        None if found is cls else f"importing {location} gives another class than the one that ran"
    )
