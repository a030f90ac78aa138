"""Options with which a run is watched, cut short and bisected by hand, and what they become.

What is watched goes to stderr, so that stdout stays the result; with ``--json`` it stays JSON.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from planish.passes.instruments import Instrument, Timing
    from planish.passes.recipe import Recipe
    from planish.report import Report

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--print-after",
        metavar="REGEX",
        help="Print the program (stderr) after each pass whose whole name matches.",
    ),
    click.option(
        "--print-after-change",
        is_flag=True,
        help="Print it after each pass that changed something; with --print-after, of those.",
    ),
    click.option(
        "--dump-dir",
        type=click.Path(path_type=Path),
        help="Folder for the program after every pass: 001_NAME.txt and .pt2.",
    ),
    click.option("--stop-after", metavar="PASS", help="Run nothing after this pass."),
    click.option(
        "--start-from",
        metavar="PASS",
        help="Run nothing before this pass; MODEL may be the .pt2 dumped before it.",
    ),
    click.option("--disable-pass", multiple=True, metavar="PASS", help="Leave it out; repeatable."),
    click.option(
        "--exclude",
        multiple=True,
        metavar="RULE@NODE",
        help="Leave out one rewrite site; repeatable.",
    ),
    click.option(
        "--bisect-limit",
        type=click.IntRange(min=0),
        metavar="N",
        help="Rewrite the first N sites of the whole run and no more.",
    ),
    click.option(
        "--timing",
        is_flag=True,
        help="Table (stderr) of seconds per step: the pass; all checks, prints and dumps.",
    ),
)


@dataclass(frozen=True)
class Watching:
    """What the user asked for; PASS is a name or the number of a step, from 1."""

    print_after: str | None = None
    print_after_change: bool = False
    dump_dir: Path | None = None
    stop_after: str | None = None
    start_from: str | None = None
    disable_pass: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    bisect_limit: int | None = None
    timing: bool = False
    _timing: list[Timing] = field(default_factory=list, repr=False)

    @property
    def prints(self) -> bool:
        """Whether programs go to stderr, where a live progress bar would garble them."""
        return self.print_after is not None or self.print_after_change

    def check(self, recipe: Recipe) -> None:
        """Refuse what cannot work with a recipe, before the model is loaded.

        Raises:
            UsageError: no such pass, a bad pattern or site, a start behind the stop.
        """
        from planish.passes.instruments import ExcludeSites, check_printed
        from planish.passes.selecting import check_selection

        check_selection(
            recipe,
            start_from=self.start_from,
            stop_after=self.stop_after,
            disable=self.disable_pass,
        )
        if self.prints:
            check_printed(self._pattern, [pass_.name for pass_ in recipe.passes])
        ExcludeSites(self.exclude)

    @property
    def _pattern(self) -> str:
        return ".*" if self.print_after is None else self.print_after

    def instruments(self) -> tuple[Instrument, ...]:
        """The instruments, outermost first; ``Timing`` includes what the others take."""
        from planish.passes import instruments as all_

        found: list[Instrument] = []
        if self.timing:
            self._timing[:] = [all_.Timing()]
            found.extend(self._timing)
        if self.start_from is not None:
            found.append(all_.StartFrom(self.start_from))
        if self.stop_after is not None:
            found.append(all_.StopAfter(self.stop_after))
        if self.disable_pass:
            found.append(all_.DisablePass(self.disable_pass))
        if self.bisect_limit is not None:
            found.append(all_.SiteLimit(self.bisect_limit))
        if self.exclude:
            found.append(all_.ExcludeSites(self.exclude))
        if self.prints:
            found.append(
                all_.PrintAfter(self._pattern, changed=self.print_after_change, stream=sys.stderr)
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """What the options add to a JSON result: ``timing``, where asked for."""
        if not self.timing:
            return {}
        times = self._timing[0].times if self._timing else []
        return {
            "timing": [
                {
                    "step": t.index,
                    "name": t.name,
                    "seconds": round(t.seconds, 6),
                    "checking_seconds": round(t.checking, 6),
                    "nodes_before": t.nodes_before,
                    "nodes_after": t.nodes_after,
                }
                for t in times
            ]
        }

    @contextmanager
    def shown(self, *, as_json: bool) -> Iterator[None]:
        """Around a run: at the end, also of one that fails, print the table of times on stderr."""
        try:
            yield
        finally:
            if self._timing and not as_json:
                _print_times(self._timing[0])


def watching(function: F) -> F:
    """Add the options to a command, which takes them as one argument ``watching``."""
    names = [name for name in Watching.__dataclass_fields__ if not name.startswith("_")]

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the command takes
        chosen = Watching(**{name: kwargs.pop(name) for name in names})
        return function(*args, watching=chosen, **kwargs)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command  # type: ignore[return-value]  # click's options keep what they decorate


def said(report: Report) -> dict[str, list[str]]:
    """What a command that shows no report must not keep to itself, as plain data."""
    return {
        "left_out": [f"{i} {p.name}" for i, p in enumerate(report.passes, 1) if not p.ran],
        "remarks": [*report.remarks, *(r for p in report.passes for r in p.remarks)],
    }


def remarks(report: Report) -> list[str]:
    """The same as lines."""
    found = said(report)
    left_out = ", ".join(found["left_out"])
    lines = [f"left out: {left_out}"] if left_out else []
    return [*lines, *(f"remark: {sentence}" for sentence in found["remarks"])]


def _print_times(timing: Timing) -> None:
    """The steps, the slowest first, and their sum."""
    from rich import box
    from rich.table import Table

    from planish.tools.console import stderr

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    rows = sorted(timing.times, key=lambda t: -(t.seconds + t.checking))
    seconds, checking = sum(t.seconds for t in rows), sum(t.checking for t in rows)
    table.add_column("step", footer="", justify="right")
    table.add_column("pass", footer="all", overflow="fold")
    table.add_column("pass ms", footer=f"{1e3 * seconds:.1f}", justify="right")
    table.add_column("checking ms", footer=f"{1e3 * checking:.1f}", justify="right")
    table.add_column("nodes before", justify="right")
    table.add_column("after", justify="right")
    for t in rows:
        table.add_row(
            str(t.index),
            t.name,
            f"{1e3 * t.seconds:.1f}",
            f"{1e3 * t.checking:.1f}",
            str(t.nodes_before),
            "-" if t.nodes_after is None else str(t.nodes_after),
        )
    stderr().print(table)
