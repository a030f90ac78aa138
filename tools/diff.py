"""``planish diff``: what is different between two programs, operator by operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planish.tools.console import print_json, stages, stdout
from planish.tools.options import common, optimize_loaded

if TYPE_CHECKING:
    from rich.text import Text

    from planish.ir.program import Program
    from planish.ir.textdiff import Entry, TextDiff
    from planish.tools.console import Stages

_MARKS = {"same": " ", "changed": "|", "removed": "<", "added": ">"}
_STYLES = {"-": "red", "+": "green", "@": "cyan"}


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="Unchanged lines around each change.",
)
@click.option("--full", is_flag=True, help="Show every line.")
@click.option("--side-by-side", is_flag=True, help="Two columns, fitted to the terminal.")
@common
def diff(
    first: str,
    second: str,
    context: int,
    full: bool,
    side_by_side: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> int:
    """Align the operators of A and B and show what is different.

    A and B are anything that MODEL may be; typically programs that --dump-dir wrote. Both are
    printed with the numbers that values have in A, so an unchanged operator is an unchanged line;
    what only B has is numbered from where A ends. A constant with other values is shown with a
    digest of them. The exit code is 0 if there is no difference, 1 if there is one, and 2 or more
    if A or B cannot be opened.

    \b
    Examples:
      planish diff dump/000_capture.pt2 dump/004_recover-norms.pt2
      planish diff before.pt2 after.pt2 --side-by-side --context 1
      planish diff my_package.models:build model.pt2 --json
    """
    from planish.ir.textdiff import compare

    with stages(quiet=quiet) as stage:
        programs = [_program(spec, stage, seed) for spec in (first, second)]
        stage("aligning")
        found = compare(*programs)
    lines_around = None if full else context
    if as_json:
        print_json(to_dict(found))
    elif side_by_side:
        print_columns(found, lines_around, (first, second))
    else:
        print_unified(found, lines_around, (first, second))
    return 0 if found.equal else 1


def _program(spec: str, stage: Stages, seed: int) -> Program:
    from planish.ir.errors import PlanishError, UsageError
    from planish.tools.loading import load_model

    stage("loading")
    try:
        loaded = load_model(spec)
        return optimize_loaded(loaded, stage, recipe="none", target="onnx", seed=seed).program
    except PlanishError as error:
        if error.exit_code != 1:
            raise
        # As with diff(1), 1 says that the programs differ, so trouble must say something else.
        raise UsageError(
            f"{spec} cannot be compared: {error.what}", where=error.where, hint=error.hint
        ) from error


def to_dict(found: TextDiff) -> dict[str, object]:
    """The diff as plain data: whether equal, counts by status, and all lines."""
    return {
        "equal": found.equal,
        "counts": dict(found.counts()),
        "entries": [
            {
                "status": entry.status,
                "before": entry.before,
                "after": entry.after,
                "node_before": entry.nodes[0],
                "node_after": entry.nodes[1],
                "moved": entry.moved,
            }
            for entry in found.entries
        ],
    }


def print_unified(found: TextDiff, context: int | None, names: tuple[str, str]) -> None:
    """Print lines that begin with a space, - or +."""
    console = stdout()
    for line in found.unified(context=context, names=names):
        style = "bold" if line.startswith(("---", "+++")) else _STYLES.get(line[:1])
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def print_columns(found: TextDiff, context: int | None, names: tuple[str, str]) -> None:
    """Print A on the left, B on the right and between them | changed, < only in A, > only in B."""
    console = stdout()
    width = max(20, (console.width - 3) // 2)
    for number, (head, entries) in enumerate(found.hunks(context)):
        if number == 0:
            console.print(_row(*names, " ", width, ("bold", "bold")), soft_wrap=True)
        console.print(head, style="cyan", markup=False, highlight=False)
        for entry in entries:
            for row in _rows(entry, width):
                console.print(row, soft_wrap=True)


def _rows(entry: Entry, width: int) -> list[Text]:
    """One line of a diff as lines of two columns; what is too long goes on below, indented."""
    left, right = (_folded(line or "", width) for line in (entry.before, entry.after))
    count = max(len(left), len(right))
    left, right = (side + [""] * (count - len(side)) for side in (left, right))
    styles = ("", "") if entry.status == "same" else ("red", "green")
    marks = [_MARKS[entry.status]] + [" "] * (count - 1)
    return [_row(a, b, m, width, styles) for a, b, m in zip(left, right, marks, strict=True)]


def _row(left: str, right: str, mark: str, width: int, styles: tuple[str, str]) -> Text:
    from rich.text import Text

    row = Text(left[:width].ljust(width), style=styles[0])
    whole = Text.assemble(row, f" {mark} ", (right[:width], styles[1]))
    whole.rstrip()
    return whole


def _folded(line: str, width: int) -> list[str]:
    """Cut a line into pieces of a width, at spaces where there are any."""
    import textwrap

    indent = line[: len(line) - len(line.lstrip())]
    pieces = textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_on_hyphens=False,
    )
    return pieces or [""]
