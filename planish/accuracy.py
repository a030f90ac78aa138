"""Where the accuracy went: the rewritten values of all lossy passes, worst first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from planish.ir.compare import Fidelity
from planish.passes.base import OperatorError
from planish.passes.steps import NodeError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planish.report import PassEntry

_SHOWN = 10  # rows of the table; the JSON has them all
_NAME, _SOURCE = 26, 34  # columns


@dataclass(frozen=True)
class Loss:
    """One rewritten value.

    Attributes:
        step: number of the pass in the recipe, from 1.
        pass_name: the pass.
        error: what its rewrite did.
    """

    step: int
    pass_name: str
    error: NodeError

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"step": self.step, "pass": self.pass_name, **self.error.to_dict()}


def ranked(passes: Sequence[PassEntry]) -> tuple[Loss, ...]:
    """All rewritten values of a run: the worst own error first, then the worst local one."""
    found = [
        Loss(step, entry.name, error)
        for step, entry in enumerate(passes, 1)
        for error in entry.node_errors
    ]
    return tuple(sorted(found, key=lambda loss: (loss.error.own.sqnr_db, loss.error.local.sqnr_db)))


def accuracy_parts(losses: Sequence[Loss]) -> list[RenderableType]:
    """The ranked table for a rich console; nothing where there is no loss to show."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not losses:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # A narrow terminal takes its width from the source line first: which value it was, and what
    # made it, must stay readable. What may shrink is a column of rich that may wrap; the cells
    # themselves say that names fold and that the source line does not.
    table.add_column("pass", no_wrap=True, max_width=24)
    table.add_column("rule", no_wrap=True, max_width=24)
    table.add_column("node", no_wrap=True)
    for title in ("own\ndB", "local\ndB", "total\ndB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("source")
    for loss in losses[:_SHOWN]:
        error = loss.error
        node = error.node
        if error.constant is not None:
            node += f"\n  {_shortened(error.constant)}"
        names = (loss.pass_name, error.rule, node)
        numbers = (error.own, error.local, error.cumulative)
        # As texts: in plain strings rich would read ":100:" and "[0]" as its own markup.
        table.add_row(
            *(Text(name, overflow="fold", no_wrap=False) for name in names),
            *(Text(sqnr_text(number)) for number in numbers),
            Text(_place(error.source), overflow="ellipsis", no_wrap=True),
        )
    head = (
        "where the accuracy went: SQNR of the rewrite alone (own), against the program before "
        "the pass (local) and against the original (total)"
    )
    parts: list[RenderableType] = [Text(head), table]
    if len(losses) > _SHOWN:
        more = len(losses) - _SHOWN
        parts.append(Text(f"{more} more rewritten values; the JSON report has all", style="dim"))
    return parts


def operator_parts(errors: Sequence[OperatorError]) -> list[RenderableType]:
    """What each operator costs by itself, the worst first; nothing where nothing was measured."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not errors:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("operator", overflow="fold")
    table.add_column("node", overflow="fold")
    for title in ("own\ndB", "outputs\ndB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("stays" if errors[0].becomes is None else "becomes", no_wrap=True)
    table.add_column("source")
    for error in errors[:_SHOWN]:
        table.add_row(
            Text(error.operator),
            Text(error.node),
            sqnr_text(error.own),
            f"{error.output_db:.1f}",
            error.becomes or ("float" if error.kept_float else "integer"),
            Text(_place(error.source), overflow="ellipsis", no_wrap=True),
        )
    what = "quantizing" if errors[0].becomes is None else "pruning"
    head = f"what {what} one operator alone does: to its own result, and to the model's outputs"
    parts: list[RenderableType] = [Text(head), table]
    if len(errors) > _SHOWN:
        more = len(errors) - _SHOWN
        parts.append(Text(f"{more} more operators; the JSON report has all", style="dim"))
    return parts


def sqnr_text(fidelity: Fidelity | None) -> str:
    """SQNR in dB for a table; ``equal`` where there is no difference at all."""
    if fidelity is None:
        return "-"
    return "equal" if fidelity.equal else f"{fidelity.sqnr_db:.1f}"


def _shortened(name: str) -> str:
    """The end of a dotted name, which tells more than its beginning."""
    return name if len(name) <= _NAME else "..." + name[3 - _NAME :]


def _place(source: str | None) -> str:
    """A source line without its folders."""
    if source is None:
        return "-"
    file, colon, rest = source.partition(":")
    text = PurePath(file).name + colon + rest
    return text if len(text) <= _SOURCE else text[: _SOURCE - 3] + "..."
