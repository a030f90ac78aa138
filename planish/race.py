"""What came out of a race between recipes: for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.backends.ort_race import Speed
from planish.passes.quantize.outputs import Score

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One recipe, or one variation of it, and how its file did.

    Attributes:
        name: "int8-static"; the float file is called "float".
        verdict: "taken", or why it was not.
        speed: beside the float file; None where there was no file.
        score: outputs against the original, on held-out inputs; None where not measured.
        bytes: of the file.
        kept_float: quantized operators that it leaves in floating point because that is faster.
    """

    name: str
    verdict: str = ""
    speed: Speed | None = None
    score: Score | None = None
    bytes: int | None = None
    kept_float: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "speed": self.speed.to_dict() if self.speed else None,
            "fidelity": self.score.fidelity.to_dict() if self.score else None,
            "metric": self.score.metric if self.score else None,
            "bytes": self.bytes,
            "kept_float": list(self.kept_float),
        }


@dataclass(frozen=True, kw_only=True)
class Race:
    """All entrants, the float file first; one of them was taken.

    Attributes:
        entrants: in the order in which they ran.
        taken: the name of the one that is handed over.
    """

    entrants: tuple[Entrant, ...]
    taken: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"taken": self.taken, "entrants": [e.to_dict() for e in self.entrants]}

    def render(self) -> list[RenderableType]:
        """A table for a rich console."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for title in ("file", "speed", "ms", "MB", "SQNR dB", "cosine", "verdict"):
            right = title not in ("file", "verdict")
            table.add_column(title, justify="right" if right else "left", overflow="fold")
        for entrant in self.entrants:
            speed, score = entrant.speed, entrant.score
            apart = score.fidelity if score else None
            equal = apart is not None and apart.equal
            table.add_row(
                Text(entrant.name),
                f"{speed.ratio:.2f}x" if speed else "-",
                f"{speed.best_ms:.2f}" if speed else "-",
                f"{entrant.bytes / 2**20:.1f}" if entrant.bytes is not None else "-",
                "equal" if equal else (f"{apart.sqnr_db:.1f}" if apart else "-"),
                f"{apart.cosine:.5f}" if apart else "-",
                Text(entrant.verdict),
            )
        return [
            Text("measured here, one thread, in alternation; fidelity on held-out inputs"),
            table,
        ]
