"""Terminal output shared by the commands: tables on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment

_PLAIN_WIDTH = 120
_SILENT_SECONDS = 2.0


def printable(text: str) -> str:
    """Text whose control characters are question marks; lines and tabs stay.

    Names, source lines and messages come out of files, and must not steer the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class _Printable(Console):
    """A console on which no text steers the terminal; rich's own codes are no text."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def stdout() -> Console:
    """The console for results: colored on a terminal, plain and wide in a pipe."""
    if sys.stdout.isatty():
        return _Printable()
    return _Printable(width=_plain_width(), color_system=None)


def stderr() -> Console:
    """The console for what is not a result: colored on a terminal, plain and wide elsewhere."""
    if sys.stderr.isatty():
        return _Printable(stderr=True)
    return _Printable(stderr=True, width=_plain_width(), color_system=None)


def _plain_width() -> int:
    """What ``COLUMNS`` says; 120 where it is not set, or set to what is no width."""
    columns = os.environ.get("COLUMNS", "")
    # As rich does on a terminal: some programs start others with an empty or zero COLUMNS.
    width = int(columns) if columns.isdecimal() else 0
    return width or _PLAIN_WIDTH


def print_parts(parts: list[RenderableType]) -> None:
    """Print rich parts on stdout."""
    console = stdout()
    for part in parts:
        console.print(part, highlight=False)


def print_json(data: Any) -> None:  # noqa: ANN401 - anything json takes
    """Print strict JSON on stdout and nothing else."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


class Stages:
    """Names the stage a long command is in; draws a bar where it knows how far it is."""

    def __init__(self, progress: Progress | None):
        self._progress = progress
        self._task = progress.add_task("starting", total=None) if progress else None
        self.name = "starting"

    def __call__(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Enter a stage, or report progress within it."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name, completed=done or 0, total=total)
        elif name.split(":")[0] != self.name.split(":")[0]:
            self._say(name)
        self.name = name

    def _say(self, name: str) -> None:
        """Without a terminal: one line per stage, so that a log shows where time went."""
        sys.stderr.write(f"{name} ...\n")
        sys.stderr.flush()


@contextmanager
def stages(*, quiet: bool = False) -> Iterator[Stages]:
    """Show progress on stderr for work that takes longer than two seconds.

    A terminal gets a spinner and a bar, anything else one line per stage; ``quiet`` gets nothing.
    """
    if quiet:
        yield _Quiet()
        return
    if not sys.stderr.isatty():
        yield Stages(None)
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=stderr(),
        transient=True,
    )
    start = threading.Timer(_SILENT_SECONDS, progress.start)
    start.daemon = True
    start.start()
    try:
        yield Stages(progress)
    finally:
        start.cancel()
        progress.stop()


class _Quiet(Stages):
    def __init__(self) -> None:
        super().__init__(None)

    def _say(self, name: str) -> None:
        """Say nothing."""
