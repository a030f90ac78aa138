"""What went wrong in a run, and when two failures are one and the same.

A failure is replayed on another machine and on a smaller program, so its signature names neither
nodes nor sizes: what counts is the pass, the rule, and the kind of thing that happened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from planish.ir.errors import (
    BoundError,
    ExportError,
    NothingToDoError,
    PlanishError,
    RequirementError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from planish.passes.steps import Instrument

Kind = Literal["crash", "verifier", "contract", "export"]

_PASS = re.compile(r"(?:in )?pass (?P<name>.+?)(?: \(step \d+\))?")
_RULE = re.compile(r"rule (?P<name>\S+?)(?: failed)?(?:: |$)")
_OPERATOR = re.compile(r"operator (\S+)")
# How planish.passes.checking begins its sentences; the rest differs from model to model.
_CONTRACT = (
    "it is exact, and at ",
    "it is lossy, and ",
    "the recipe changed what the program computes",
    "each pass kept its bound, but not all together",
    "the program no longer runs on ",
)


@dataclass(frozen=True)
class Failure:
    """An error of a run.

    Attributes:
        kind: ``"crash"`` of a pass or an instrument, ``"verifier"`` where an invariant broke,
            ``"contract"`` where a pass changed the numbers, ``"export"`` of the emitter.
        step: the pass as errors name it; None where no single one is at fault.
        signature: equal for two failures that are the same one.
        message: what the user saw.
    """

    kind: Kind
    step: str | None
    signature: str
    message: str


def failure_of(error: BaseException) -> Failure:
    """Describe an error that a run or an export raised."""
    step = _step(error)
    match = _PASS.fullmatch(step or "")
    kind, details = _details(error, step)
    parts = (kind, match["name"] if match else "", *details)
    return Failure(kind, step, "/".join(p for p in parts if p), _message(error))


def is_failure(error: BaseException) -> bool:
    """Whether an error is one of planish or of a pass, and not of the call or of the user's wish.

    That there is nothing to do, or no way to be as near as was asked for, is an answer and no
    failure. A ``UsageError`` of the comparison is not about the call: it says that outputs changed
    shape.
    """
    if isinstance(error, UsageError):
        return origin(error).startswith("planish.ir.compare:")
    answers = (RequirementError, NothingToDoError, BoundError)
    return isinstance(error, Exception) and not isinstance(error, answers)


def name_step(error: BaseException, label: str) -> None:
    """Write on an error that is not planish's own in which step it arose."""
    if not isinstance(error, PlanishError) and _step(error) is None:
        error.add_note(f"in {label}")


def origin(error: BaseException) -> str:
    """``module:function`` that raised an error; empty where it was never raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_qualname}"


def raised_by(error: BaseException) -> Instrument | None:
    """The instrument that raised an error, or had it raised; None where a pass did."""
    found: Instrument | None = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, Instrument):
            found = owner
        trace = trace.tb_next
    return found


def _step(error: BaseException) -> str | None:
    if isinstance(error, PlanishError):
        named = [c for c in error.contexts if _PASS.fullmatch(c)]
        return named[0] if named else None
    for note in getattr(error, "__notes__", ()):
        if note.startswith("in ") and _PASS.fullmatch(note):
            return str(note.removeprefix("in "))
    return None


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, PlanishError) else f"{type(error).__name__}: {error}"


def _details(error: BaseException, step: str | None) -> tuple[Kind, tuple[str, ...]]:
    """The kind, and what tells apart two failures of one kind in one pass."""
    if not isinstance(error, PlanishError):
        return "crash", (type(error).__name__,)
    own = _own(error)
    rules = [m["name"] for m in map(_RULE.match, (*error.contexts, own)) if m]
    if isinstance(error, VerificationError):
        if own.startswith(_CONTRACT):
            return "contract", (_category(own),)
        return "verifier", (*rules, "" if rules else origin(error))
    cause = _cause(error)
    if step is None and isinstance(error, (ExportError, UnsupportedError)):
        operator = _OPERATOR.search(own) if isinstance(error, UnsupportedError) else None
        detail = operator[1] if operator else cause or origin(error)
        return "export", (type(error).__name__, detail)
    return "crash", (*rules, cause or f"{type(error).__name__} of {origin(error)}")


def _own(error: PlanishError) -> str:
    """The message without what ``within`` put before it."""
    own = error.what
    for context in error.contexts:
        own = own.removeprefix(f"{context}: ")
    return own


def _cause(error: BaseException) -> str | None:
    """Type of the first foreign exception behind an error."""
    cause = error.__cause__
    while isinstance(cause, PlanishError):
        cause = cause.__cause__
    return type(cause).__name__ if cause is not None else None


def _category(own: str) -> str:
    if own.startswith("the program no longer runs"):
        return "no longer runs"
    if "there is no input to measure" in own:
        return "not measured"
    found = "not finite" if "not finite" in own else "differs"
    return f"{found}, all passes together" if own.startswith(_CONTRACT[3]) else found
