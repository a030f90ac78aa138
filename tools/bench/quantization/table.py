"""One row of the quantization table for each candidate: files are made, timed and judged.

All files of a model run in alternation, OpenVINO's in their own process, on one thread each. A
round is one run of everybody; the speed is the median over rounds of the plain float file's
latency divided by the candidate's, and beside it the ratio of the fastest runs, which a busy
machine disturbs least.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import PlanishError
from planish.tools.bench.quantization.cases import Case, Inputs
from planish.tools.bench.quantization.rivals import RivalError, Worker, ort_dynamic, ort_static

BASE = "float, ONNX Runtime"
OURS = "planish, ONNX Runtime"
PORTABLE = "planish portable, OpenVINO"
_WARMUP = 3

Tell = Callable[[str], None]


@dataclass
class Candidate:
    """A file under test.

    Attributes:
        name: for the table.
        file: what runs.
        once: run the timed input once, and say how many seconds that took.
        outputs: the first output for every batch.
        planish: whether we made it.
        note: what a reader should know.
    """

    name: str
    file: Path
    once: Callable[[], float]
    outputs: Callable[[Sequence[Inputs]], list[Tensor]]
    planish: bool = False
    note: str = ""


@dataclass
class Row:
    """What was found out about a candidate.

    Attributes:
        name: of the candidate.
        ratio: median over rounds of plain's latency by its own.
        best: plain's fastest run by its own.
        milliseconds: median latency.
        megabytes: size of its file and the data beside it.
        scores: figures of fidelity.
        note: why there are none, or what the file consists of.
    """

    name: str
    ratio: float | None = None
    best: float | None = None
    milliseconds: float | None = None
    megabytes: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "ratio": self.ratio,
            "best_ratio": self.best,
            "median_ms": self.milliseconds,
            "megabytes": self.megabytes,
            "scores": self.scores,
            "note": self.note,
        }


def measure(
    case: Case,
    *,
    rounds: int,
    worker: Worker | None = None,
    recipe: str | None = None,
    keep: Path | None = None,
    tell: Tell = lambda sentence: None,
) -> list[Row]:
    """Make, time and judge all candidates of a model.

    Args:
        case: the model.
        rounds: timed runs of each.
        worker: the rivals' process; None leaves out NNCF and OpenVINO.
        recipe: of our file, instead of the case's own.
        keep: a folder for the files; None for one that goes away.
        tell: told what is being done.

    Returns:
        One row for each, the plain float file first; one that failed says why.
    """
    torch.set_num_threads(1)
    with _folder(keep) as folder:
        maker = _Maker(case, folder, worker, tell)
        candidates, failed = maker.all(recipe or case.recipe)
        tell(f"{case.name}: timing {len(candidates)} files")
        rows = timed_rows(candidates, rounds)
        held = case.held()
        reference: list[Tensor] = []
        for candidate, row in zip(candidates, rows, strict=True):
            tell(f"{case.name}: judging {candidate.name}")
            try:
                found = candidate.outputs(held)
            except PlanishError as error:
                row.note = error.what
                continue
            reference = reference or found
            row.scores = case.judge(held, reference, found)
        return [*rows, *failed]


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="planish-table-") as name:
        yield Path(name)


class _Maker:
    """Makes the files of one model and opens them."""

    def __init__(self, case: Case, folder: Path, worker: Worker | None, tell: Tell):
        self.case = case
        self.folder = folder
        self.worker = worker
        self.tell = tell
        self.calibration = case.calibration()
        self.timed = case.timed()
        self.failed: list[Row] = []
        self.made: list[Candidate] = []

    def all(self, recipe: str) -> tuple[list[Candidate], list[Row]]:
        """Every candidate that could be made, and a row for each that could not."""
        plain = self.folder / "plain.onnx"
        model = self.case.load()
        self.tell(f"{self.case.name}: plain export")
        self._plain(model, plain)
        self._here(BASE, plain)
        self._try(OURS, lambda: self._ours(model, recipe))
        static = self.folder / "ort_static.onnx"
        dynamic = self.folder / "ort_dynamic.onnx"
        self._try("ORT quantize_static", lambda: self._ort_static(plain, static))
        if self.case.dynamic:
            self._try("ORT quantize_dynamic", lambda: self._ort_dynamic(plain, dynamic))
        if self.worker is not None:
            self._openvino(model, plain, static)
        return self.made, self.failed

    def _openvino(self, model: torch.nn.Module, plain: Path, static: Path) -> None:
        self._try("float, OpenVINO", lambda: self._there("float, OpenVINO", plain))
        self._try(PORTABLE, lambda: self._portable(model))
        for method in ("int8", *(("weights8", "weights4") if "gpt2" in self.case.name else ())):
            name = f"NNCF {method}, OpenVINO"
            self._try(name, lambda m=method, n=name: self._nncf(m, n, plain))  # type: ignore[misc]  # bound at once
        if static.exists():
            name = "ORT quantize_static, OpenVINO"
            self._try(name, lambda: self._there(name, static))

    def _try(self, name: str, make: Callable[[], None]) -> None:
        self.tell(f"{self.case.name}: {name}")
        try:
            make()
        except PlanishError as error:
            self.failed.append(Row(name, note=error.what))

    def _plain(self, model: torch.nn.Module, path: Path) -> None:
        from planish.tools.bench.export_cost import export_plain

        example = (*self._example(), *self.case.extra)
        export_plain(model, example, {}, self.case.dynamic_shapes, str(path))

    def _example(self) -> Inputs:
        """A sample of batch 2, so that no dimension looks like a constant 1."""
        return tuple(torch.cat([t, t]) for t in self.timed)

    def _optimized(self, model: torch.nn.Module, recipe: str, target: str) -> Any:  # noqa: ANN401 - whatever the translation or the call gives
        import planish

        return planish.optimize(
            model,
            (*self._example(), *self.case.extra),
            recipe=recipe,
            target=target,
            calibration=[(*batch, *self.case.extra) for batch in self.calibration],
            dynamic_shapes=self.case.dynamic_shapes,
            padding_mask=self.case.padding_mask,
            verify="end",
        )

    def _ours(self, model: torch.nn.Module, recipe: str) -> None:
        began = time.perf_counter()
        path = self.folder / "planish.onnx"
        optimized = self._optimized(model, recipe, "onnxruntime-cpu")
        artifact = optimized.export(path)
        integer = sum(use.kernel is not None for use in artifact.kernels)
        note = f"{integer} of {len(artifact.kernels)} quantized operators in integer kernels"
        seconds = time.perf_counter() - began
        self._here(OURS, path, planish=True, note=f"{note}; made in {seconds:.0f} s")

    def _portable(self, model: torch.nn.Module) -> None:
        path = self.folder / "portable.onnx"
        self._optimized(model, self.case.portable, "onnx").export(path)
        self._there(PORTABLE, path, planish=True)

    def _ort_static(self, plain: Path, goal: Path) -> None:
        ort_static(plain, goal, self.calibration)
        self._here("ORT quantize_static", goal)

    def _ort_dynamic(self, plain: Path, goal: Path) -> None:
        ort_dynamic(plain, goal)
        self._here("ORT quantize_dynamic", goal)

    def _nncf(self, method: str, name: str, plain: Path) -> None:
        assert self.worker is not None
        goal = self.folder / f"nncf_{method}.xml"
        self.worker.make(method, plain, goal, self.calibration, self.case.transformer)
        self._there(name, goal)

    def _here(self, name: str, path: Path, *, planish: bool = False, note: str = "") -> None:
        """Open a file in ONNX Runtime."""
        from planish.backends.ort_run import Session

        session = Session(path, threads=1)
        self.made.append(
            Candidate(
                name,
                path,
                once=lambda: _seconds(lambda: session.run(self.timed)),
                outputs=lambda held: [torch.from_numpy(session.run(b)[0]) for b in held],
                planish=planish,
                note=note,
            )
        )

    def _there(self, name: str, path: Path, *, planish: bool = False) -> None:
        """Open a file in OpenVINO."""
        worker = self.worker
        assert worker is not None
        worker.open(name, path, self.timed)
        self.made.append(
            Candidate(
                name,
                path,
                once=lambda: worker.seconds(name),
                outputs=lambda held: worker.outputs(name, held),
                planish=planish,
            )
        )


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def timed_rows(candidates: Sequence[Candidate], rounds: int) -> list[Row]:
    """Run everybody in alternation; the order turns by one every round."""
    for candidate in candidates:
        for _ in range(_WARMUP):
            candidate.once()
    seconds: list[list[float]] = [[] for _ in candidates]
    for number in range(rounds):
        shift = number % len(candidates)
        for index in (*range(shift, len(candidates)), *range(shift)):
            seconds[index].append(candidates[index].once())
    base = seconds[0]
    return [
        Row(
            candidate.name,
            ratio=statistics.median(b / o for b, o in zip(base, own, strict=True)),
            best=min(base) / min(own),
            milliseconds=1e3 * statistics.median(own),
            megabytes=_megabytes(candidate.file),
            note=candidate.note,
        )
        for candidate, own in zip(candidates, seconds, strict=True)
    ]


def _megabytes(path: Path) -> float:
    beside = (path, path.with_name(f"{path.name}.data"), path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in beside if file.exists()) / 2**20


# -- what is asked for ------------------------------------------------------------------------


def verdicts(case: Case, rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Sentences on what is asked of our file, and whether it holds."""
    ours = next((row for row in rows if row.name == OURS), None)
    if ours is None or ours.ratio is None:
        why = ours.note if ours is not None else "it was not made"
        return [(f"{case.name}: no file of ours: {why}", False)]
    found = [(f"{case.name}: {ours.ratio:.2f}x, asked {case.speed:.2f}x", ours.ratio >= case.speed)]
    for figure, least in case.goals.items():
        value = ours.scores.get(figure)
        shown = "not measured" if value is None else f"{value:.4g}"
        good = value is not None and value >= least
        found.append((f"{case.name}: {figure} {shown}, asked {least:.4g}", good))
    rivals = [r for r in rows if r.name.endswith("OpenVINO") and r.name != PORTABLE and r.ratio]
    portable = next((row for row in rows if row.name == PORTABLE and row.ratio), None)
    if portable is not None and rivals:
        best = max(rivals, key=lambda r: r.ratio or 0.0)
        assert portable.ratio is not None
        assert best.ratio is not None
        sentence = (
            f"{case.name}: portable in OpenVINO {portable.ratio:.2f}x; best there {best.name} "
            f"{best.ratio:.2f}x"
        )
        found.append((sentence, portable.ratio >= 0.95 * best.ratio))
    return found


def to_json(results: dict[str, list[Row]]) -> str:
    """All rows as strict JSON."""
    plain = {name: [row.to_dict() for row in rows] for name, rows in results.items()}
    return json.dumps(plain, indent=2, allow_nan=False)


__all__ = [
    "BASE",
    "OURS",
    "PORTABLE",
    "Candidate",
    "RivalError",
    "Row",
    "measure",
    "timed_rows",
    "verdicts",
]
