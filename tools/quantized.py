"""What ``planish quantize`` says of a file: kernels and fallbacks, fidelity, speed, size."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.backends.ort_race import Speed, race
from planish.ir.errors import PlanishError
from planish.passes.steps import Instrument, Run

if TYPE_CHECKING:
    from rich.console import RenderableType

    from planish.ir.program import Program
    from planish.optimized import Optimized
    from planish.report import Report

_SHOWN = 60  # operators that the terminal lists; the JSON has them all
_SECONDS = 4.0  # of timing


@dataclass(frozen=True)
class Bounds:
    """What the outputs must keep, as ``keep-float`` takes it."""

    min_sqnr_db: float | None = None
    min_cosine: float | None = None
    min_metric: float | None = None
    max_operators: int | None = None

    def options(self) -> dict[str, Any]:
        """The options that were given.

        Raises:
            UsageError: a number of operators without a bound, or a cosine that cannot be.
        """
        from planish.ir.errors import UsageError

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.min_cosine is not None and not -1 <= self.min_cosine < 1:
            raise UsageError(
                f"--min-cosine {self.min_cosine:g} can never be kept by integers",
                hint="give a number below 1, such as 0.998",
            )
        if set(given) == {"max_operators"}:
            raise UsageError(
                "--max-float without a bound to keep",
                hint="add --min-sqnr-db, --min-cosine or --min-metric",
            )
        return given


@dataclass(frozen=True)
class Measured:
    """A file beside the same model in floating point.

    Attributes:
        bytes: of the file.
        float_bytes: of the float file.
        float_speed: the float file's times.
        speed: the file's, in the same rounds.
    """

    bytes: int
    float_bytes: int
    float_speed: Speed | None
    speed: Speed | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "file": {
                "bytes": self.bytes,
                "float_bytes": self.float_bytes,
                "speed": self.speed.to_dict() if self.speed else None,
                "float_speed": self.float_speed.to_dict() if self.float_speed else None,
            }
        }


class Original(Instrument):
    """Remembers the captured program of a run."""

    def __init__(self) -> None:
        self.program: Program | None = None

    def before_pipeline(self, run: Run) -> None:
        """The run begins."""
        self.program = run.original


def measured(
    result: Optimized,
    program: Program,
    out: Path,
    batch: Any,  # noqa: ANN401 - any inputs
    remarks: list[str],
) -> Measured:
    """Time a file against the model's float file: the one that the recipe ``exact`` makes.

    Args:
        result: what was exported.
        program: the captured one that it came from.
        out: to this file.
        batch: inputs, of which one sample is timed; None for the model's own example.
        remarks: told what could not be measured, and that a file is slower than float.
    """
    import planish
    from planish.backends.base import ExportOptions
    from planish.backends.registry import load_backend

    floating = planish.optimize(program, recipe="exact", target=result.report.target, verify="off")
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        path = Path(folder) / "float.onnx"
        options = ExportOptions(verify=False)
        artifact = load_backend(result.report.target).export(floating.program, path, options)
        speeds: list[Speed | None] = [None, None]
        try:
            inputs, target = _flat(program, batch), result.report.target
            speeds = [*race([path, out], inputs, seconds=_SECONDS, target=target)]
        except PlanishError as error:  # the file is right all the same
            remarks.append(f"speed was not measured: {error.what}")
    data = out.with_name(f"{out.name}.data")
    size = out.stat().st_size + (data.stat().st_size if data.exists() else 0)
    found = Measured(size, artifact.bytes, *speeds)
    if found.speed is not None and found.speed.ratio < 1.0:
        remarks.append(
            f"the file is SLOWER than floating point here ({found.speed.ratio:.2f}x); the recipe "
            "int8 takes no such file"
        )
    return found


def _flat(program: Program, batch: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any inputs
    from planish.fastest import one_sample

    if batch is None:
        return one_sample(program, program.samples[0])
    if isinstance(batch, Mapping):
        return one_sample(program, program.signature.flatten((), batch))
    args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    return one_sample(program, program.signature.flatten(args, {}))


def render(report: Report, found: Measured, remarks: list[str]) -> list[RenderableType]:
    """The parts of the terminal output: the operators, then the file as a whole."""
    from rich.text import Text

    parts: list[RenderableType] = []
    if report.race is not None:
        parts.extend(report.race.render())
    parts.extend(_operators(report))
    parts.extend(Text(line) for line in _lines(report, found))
    said = (*report.remarks, *(r for p in report.passes for r in p.remarks), *remarks)
    parts.extend(Text(f"remark: {sentence}", style="yellow") for sentence in said)
    return parts


def _operators(report: Report) -> list[RenderableType]:
    """One row for each quantized operator: its kernel or why it runs in float, and its error."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    uses = (report.runtime or {}).get("kernels") or []
    if not uses:
        return []
    own = {
        error.node: error.own.to_dict()["sqnr_db"]
        for entry in report.passes
        for error in entry.node_errors
    }
    outputs = {e.node: e.output_db for entry in report.passes for e in entry.operators}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("operator", "node", "runs as", "own dB", "outputs dB"):
        right = title.endswith("dB")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for use in uses[:_SHOWN]:
        kernel = use["kernel"] or f"float: {use['reason']}"
        numbers = (own.get(use["node"]), outputs.get(use["node"]))
        table.add_row(
            Text(use["operator"].removeprefix("aten.")),
            Text(use["node"]),
            Text(kernel, style="" if use["kernel"] else "yellow"),
            *("-" if number is None else f"{number:.1f}" for number in numbers),
        )
    parts: list[RenderableType] = [table]
    if len(uses) > _SHOWN:
        more = len(uses) - _SHOWN
        parts.append(Text(f"{more} more operators; --json lists all", style="dim"))
    return parts


def _lines(report: Report, found: Measured) -> list[str]:
    from planish.kernels import kernel_lines
    from planish.report import fidelity_text

    lines = kernel_lines(report.runtime or {})
    if report.held_out is not None:
        lines.append(
            f"fidelity on {report.held_out.batches} held-out batches: {report.held_out.score}"
        )
    elif report.fidelity is not None:
        lines.append(
            f"fidelity on the example inputs alone: {fidelity_text(report.fidelity)}; give four "
            "batches of calibration data or more, and some are held out to measure it on"
        )
    if found.speed is not None and found.float_speed is not None:
        lines.append(
            f"speed here, one thread: {found.speed.ratio:.2f}x of float "
            f"({found.speed.best_ms:.2f} ms against {found.float_speed.best_ms:.2f} ms; median "
            f"ratio {found.speed.median_ratio:.2f} over {found.speed.rounds} rounds)"
        )
    share = found.bytes / found.float_bytes
    lines.append(
        f"size: {found.bytes / 2**20:.1f} MB, {share:.2f}x of float "
        f"({found.float_bytes / 2**20:.1f} MB)"
    )
    return lines
