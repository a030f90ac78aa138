"""What happened to a model: per pass and in total, as text, dict and JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from planish.accuracy import accuracy_parts, operator_parts, ranked, sqnr_text
from planish.ir.compare import Fidelity
from planish.ir.cost import Cost
from planish.kernels import fallback_parts, kernel_lines
from planish.passes import Change, Refusal
from planish.passes.base import OperatorError
from planish.passes.steps import NodeError
from planish.sparsity import SparseWeight, sparsity_dict, sparsity_lines, sparsity_parts

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planish.graphdata import Graphs
    from planish.race import Race
    from planish.running import HeldOut

__all__ = ["PassEntry", "Report", "cost_cells", "fidelity_text", "sqnr_text"]


@dataclass(frozen=True)
class PassEntry:
    """One pass of the run.

    Attributes:
        name: the pass.
        options: its options as recipe text, empty for the defaults.
        contract: ``"exact"`` or ``"lossy"``.
        changes: what it rewrote.
        refusals: what it declined, and why.
        seconds: wall time of the pass itself, without verification.
        fidelity: outputs against the program before the pass; None where nothing was compared.
        cost: parameters, bytes and MACs after the pass.
        remarks: sentences the reader should see.
        ran: False where an option left the pass out.
        cumulative: outputs against the original program; None where nothing was compared.
        node_errors: of a lossy pass, the error of every value it rewrote.
        operators: of a pass that measures operators one by one, what it measured.
    """

    name: str
    options: str
    contract: str
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    seconds: float
    fidelity: Fidelity | None
    cost: Cost
    remarks: tuple[str, ...] = ()
    ran: bool = True
    cumulative: Fidelity | None = None
    node_errors: tuple[NodeError, ...] = ()
    operators: tuple[OperatorError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "ran": self.ran,
            "options": self.options,
            "contract": self.contract,
            "changes": [_change_dict(c) for c in self.changes],
            "refusals": [asdict(r) for r in self.refusals],
            "seconds": round(self.seconds, 6),
            "sqnr_db": self.fidelity.to_dict()["sqnr_db"] if self.fidelity else None,
            "equal": self.fidelity.equal if self.fidelity else None,
            "fidelity": self.fidelity.to_dict() if self.fidelity else None,
            "cumulative": self.cumulative.to_dict() if self.cumulative else None,
            "node_errors": [error.to_dict() for error in self.node_errors],
            "operators": [error.to_dict() for error in self.operators],
            "parameters": self.cost.parameters,
            "bytes": self.cost.bytes,
            "macs": self.cost.macs,
            "remarks": list(self.remarks),
        }


@dataclass(frozen=True)
class Report:
    """The whole run.

    Attributes:
        passes: one entry per pass, in order.
        before: cost of the captured program.
        after: cost of the optimized program.
        target: what it was optimized for.
        fidelity: final outputs against the captured program's, on the samples.
        seconds: wall time by stage: capture, passes, verification, export.
        versions: of planish, Python and the libraries that matter.
        seed: the seed of the run.
        recipe: the resolved recipe as text.
        runtime: what the runtime made of the exported file; None before an export.
        remarks: sentences the reader should see.
        model: what was optimized, as a title: the class of the module.
        recipe_yaml: the resolved recipe as YAML.
        graphs: the program before and after; written out only when asked for.
        held_out: final outputs against the captured program's, on calibration inputs that no pass
            saw; None where nothing was lossy or held out.
        race: the recipes that were measured against each other, where the recipe asks for that.
        sparsity: the weights of the optimized program that are typed sparse.
    """

    passes: tuple[PassEntry, ...]
    before: Cost
    after: Cost
    target: str
    fidelity: Fidelity | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    seed: int
    recipe: str
    runtime: Mapping[str, Any] | None = None
    remarks: tuple[str, ...] = field(default=())
    model: str = ""
    recipe_yaml: str = ""
    graphs: Graphs | None = field(default=None, repr=False, compare=False)
    held_out: HeldOut | None = None
    race: Race | None = None
    sparsity: tuple[SparseWeight, ...] = ()

    @property
    def changes(self) -> int:
        """Number of rewrites of all passes."""
        return sum(len(entry.changes) for entry in self.passes)

    def to_dict(self, *, graphs: bool = False) -> dict[str, Any]:
        """Plain data, ready for JSON.

        Args:
            graphs: add both programs under ``graphs``; ``planish.graphdata`` says what is in them.
        """
        written = {}
        if graphs:
            changes = [entry.changes for entry in self.passes]
            written["graphs"] = self.graphs.to_dict(changes) if self.graphs is not None else None
        return {
            "model": self.model,
            "passes": [entry.to_dict() for entry in self.passes],
            "totals": {
                "changes": self.changes,
                "refusals": sum(len(entry.refusals) for entry in self.passes),
                "seconds": {stage: round(s, 6) for stage, s in self.seconds.items()},
                "before": asdict(self.before),
                "after": asdict(self.after),
                "ratio": _ratios(self.before, self.after),
            },
            "target": self.target,
            "runtime": dict(self.runtime) if self.runtime is not None else None,
            "fidelity": self.fidelity.to_dict() if self.fidelity else None,
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "race": self.race.to_dict() if self.race else None,
            "sparsity": sparsity_dict(self.sparsity, self.target),
            "accuracy": [loss.to_dict() for loss in ranked(self.passes)],
            "versions": dict(self.versions),
            "seed": self.seed,
            "recipe": self.recipe,
            "recipe_yaml": self.recipe_yaml,
            "remarks": list(self.remarks),
            **written,
        }

    def to_json(self, *, indent: int | None = 2, graphs: bool = False) -> str:
        """The report as strict JSON; an infinite SQNR is null beside ``"equal": true``."""
        return json.dumps(self.to_dict(graphs=graphs), indent=indent, allow_nan=False)

    def to_html(self) -> str:
        """The report as one HTML page that loads nothing from anywhere."""
        from planish.htmlpage import page

        return page(self.to_dict(graphs=True))

    def to_text(self, *, width: int = 100, all_passes: bool = False) -> str:
        """The report as a plain-text table.

        Args:
            width: columns.
            all_passes: also show passes that changed and refused nothing.
        """
        from rich.console import Console

        console = Console(width=width, color_system=None, record=False)
        with console.capture() as captured:
            for part in self.render(all_passes=all_passes):
                console.print(part)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"

    def __str__(self) -> str:
        return self.to_text()

    def render(self, *, all_passes: bool = False) -> list[RenderableType]:
        """The parts of the terminal output, for a rich console."""
        from rich.text import Text

        parts: list[RenderableType] = [self._table(all_passes=all_passes)]
        idle = [p for p in self.passes if p.ran and not p.changes and not p.refusals]
        if idle and not all_passes:
            parts.append(Text(f"{len(idle)} more passes found nothing to do", style="dim"))
        left_out = [f"{i} {p.name}" for i, p in enumerate(self.passes, 1) if not p.ran]
        if left_out:
            parts.append(Text(f"left out: {', '.join(left_out)}", style="yellow"))
        parts.extend(Text(line) for line in self._summary())
        parts.extend(self.race.render() if self.race is not None else [])
        parts.extend(fallback_parts(self.runtime or {}))
        parts.extend(sparsity_parts(self.sparsity))
        parts.extend(part for p in self.passes for part in operator_parts(p.operators))
        parts.extend(accuracy_parts(ranked(self.passes)))
        for entry in self.passes:
            for reason, count in Counter(r.reason for r in entry.refusals).most_common(3):
                times = f" ({count} times)" if count > 1 else ""
                parts.append(Text(f"{entry.name} declined{times}: {reason}", style="dim"))
        for sentence in (*self.remarks, *(r for p in self.passes for r in p.remarks)):
            parts.append(Text(f"remark: {sentence}", style="yellow"))
        return parts

    def _table(self, *, all_passes: bool) -> RenderableType:
        from rich import box
        from rich.table import Table

        lossy = any(entry.contract == "lossy" for entry in self.passes)
        # With both errors there are ten columns, which 100 characters hold without wide gaps only.
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0) if lossy else (0, 1)
        )
        table.add_column("pass", overflow="fold")
        table.add_column("contract")
        errors = ("local\ndB", "total\ndB") if lossy else ("SQNR dB",)
        for title in ("changes", "declined", "ms", *errors, "parameters", "bytes", "MACs"):
            table.add_column(title, justify="right")
        for entry in self.passes:
            if not all_passes and not entry.changes and not entry.refusals:
                continue
            table.add_row(
                entry.name,
                entry.contract,
                str(len(entry.changes)) if entry.ran else "left out",
                str(len(entry.refusals)),
                f"{1e3 * entry.seconds:.1f}",
                sqnr_text(entry.fidelity),
                *([sqnr_text(entry.cumulative)] if lossy else []),
                *cost_cells(entry.cost),
            )
        return table

    def _summary(self) -> list[str]:
        nodes = f"{self.changes} rewrites for {self.target}"
        stages = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items())
        lines = [f"{nodes}; {stages}"]
        if self.fidelity is not None:
            lines.append(f"outputs against the original: {fidelity_text(self.fidelity)}")
        if self.held_out is not None:
            lines.append(
                f"on {self.held_out.batches} held-out batches, which nothing was calibrated with: "
                f"{self.held_out.score}"
            )
        lines += sparsity_lines(self.sparsity, self.target, self.runtime)
        if self.runtime is not None and "operators" in self.runtime:
            counts = sorted(self.runtime["operators"].items(), key=lambda item: -item[1])
            shown = ", ".join(f"{count} {name}" for name, count in counts[:10])
            more = f", and {len(counts) - 10} other kinds" if len(counts) > 10 else ""
            lines.append(f"the runtime runs: {shown}{more}")
            lines += kernel_lines(self.runtime)
        return lines


def _ratios(before: Cost, after: Cost) -> dict[str, float | None]:
    """Costs after by costs before; None where there was nothing before."""
    old, new = asdict(before), asdict(after)
    return {name: round(new[name] / old[name], 6) if old[name] else None for name in old}


def _change_dict(change: Change) -> dict[str, Any]:
    """A change for JSON: an infinite error is None; the node errors tell which kind."""
    found = asdict(change)
    if change.error is not None:
        found["error"] = {k: v if math.isfinite(v) else None for k, v in change.error.items()}
    return found


def fidelity_text(fidelity: Fidelity) -> str:
    """One line for people."""
    if fidelity.equal:
        return "identical"
    return (
        f"SQNR {sqnr_text(fidelity)} dB, cosine {fidelity.cosine:.6f}, "
        f"largest difference {fidelity.max_abs:.2e}"
    )


def cost_cells(cost: Cost) -> tuple[str, str, str]:
    """Parameters, bytes and MACs with unit prefixes."""
    return (_prefixed(cost.parameters), _prefixed(cost.bytes) + "B", _prefixed(cost.macs))


def _prefixed(number: int) -> str:
    for size, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {prefix}"
    return f"{number} "
