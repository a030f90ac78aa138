"""Every error planish raises on purpose, each with the exit code the command line returns for it.

A message says what was wrong, where (the node and the user's own source line) and what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar

from torch.fx import Node


class PlanishError(Exception):
    """Base of all deliberate errors.

    Args:
        what: one sentence that says what was wrong.
        where: the node, input or file it concerns, if there is one.
        hint: what the caller can do about it.

    Attributes:
        contexts: what ``within`` put before the message, the outermost first.
        replay: the command that makes it happen again, where a bundle was written.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | Node | None = None, hint: str | None = None):
        self.contexts: tuple[str, ...] = ()
        self.replay: str | None = None
        self._say(what, describe(where) if isinstance(where, Node) else where, hint)

    def _say(self, what: str, where: str | None, hint: str | None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        parts = [what]
        if where:
            parts.append(f"  at: {where}")
        if hint:
            parts.append(f"  try: {hint}")
        if self.replay:
            parts.append(f"  replay: {self.replay}")
        super().__init__("\n".join(parts))

    def within(self, context: str, where: str | Node | None = None) -> None:
        """Say in which pass or rule this error arose, before it is raised again.

        Args:
            context: put before the message: ``"pass fold-batch-norm"``.
            where: taken if the error names no place of its own.
        """
        self.contexts = (context, *self.contexts)
        place = describe(where) if isinstance(where, Node) else where
        self._say(f"{context}: {self.what}", self.where or place, self.hint)

    def replayed_by(self, command: str) -> None:
        """Say which command makes this error happen again."""
        self.replay = command
        self._say(self.what, self.where, self.hint)


class UsageError(PlanishError):
    """The call itself was malformed: a wrong argument, a missing file."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe names a pass, an option or a value that does not exist."""


class CaptureError(PlanishError):
    """The model could not be turned into a program."""


class VerificationError(PlanishError):
    """A program broke an invariant, or an exact pass changed the function."""

    exit_code = 3


class RequirementError(PlanishError):
    """A pass needs a fact (calibration data, labels) that was not supplied."""

    exit_code = 2


class PassError(PlanishError):
    """A pass failed while it ran."""


class UnsupportedError(PlanishError):
    """A target or a pass cannot represent this operator or type."""

    exit_code = 4


class ControlFlowError(CaptureError, UnsupportedError):
    """What the model does next depends on values, which no traced graph can follow."""

    exit_code = 4


class MisusedPassError(PassError, UsageError):
    """A recipe asks of a pass what cannot be: a pattern that matches nothing, a wrong order."""

    exit_code = 2


class NothingToDoError(PassError, UnsupportedError):
    """A pass that was asked for finds nothing in the program that it could work on."""

    exit_code = 4


class BoundError(VerificationError):
    """The outputs cannot be kept as near as the caller asks."""


class ExportError(PlanishError):
    """An artifact could not be written, or did not agree with the program."""


# Frames of torch, transformers' decorators and planish itself say nothing to the user.
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)'
)
_NOT_USER = (
    "/torch/nn/",
    "/torch/_tensor.py",
    "/torch/functional.py",
    "/torch/_dynamo/",
    "/torch/fx/",
    "/torch/export/",
)


def source_line(node: Node) -> str | None:
    """Return ``file:line: code`` of the innermost user frame that made a node, or None."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    frames = [f for f in frames if not f["file"].startswith("<eval_with_key>")]  # a traced body
    users = [f for f in frames if not any(part in f["file"] for part in _NOT_USER)] or frames
    if not users:
        return None
    frame = users[-1]
    return f"{frame['file']}:{frame['line']}: {frame['code'].strip()}"


def describe(node: Node) -> str:
    """Name a node for a message: its name, operator and the user's source line."""
    line = source_line(node)
    target = str(node.target)
    return f"{node.name} = {target}" + (f" ({line})" if line else "")
