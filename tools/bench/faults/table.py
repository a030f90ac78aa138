"""The table of all faults: each tried in its turn, and the totals."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from planish.tools.bench.faults.catalogue import FAULTS
from planish.tools.bench.faults.evidence import Bisected, Replayed, bisected, processes, replayed
from planish.tools.bench.faults.models import cache_dir
from planish.tools.bench.faults.spec import Fault
from planish.tools.bench.faults.trial import Trial, attempt

CAUGHT_SHARE = 0.95
REMOVED_SHARE = 0.9
_GROUP = 6  # faults a process takes at a time


@dataclass(frozen=True)
class Row:
    """One fault of the table."""

    trial: Trial
    bisected: Bisected | None = None
    replayed: Replayed | None = None
    seconds: float = 0.0

    @property
    def fault(self) -> Fault:
        """From the catalogue."""
        return FAULTS[self.trial.fault]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read what ``to_json`` wrote."""
        held = json.loads(line)
        bisection, replay = held["bisected"], held["replayed"]
        return cls(
            Trial(**held["trial"]),
            Bisected(**bisection) if bisection else None,
            Replayed(**replay) if replay else None,
            held["seconds"],
        )


def results_file() -> Path:
    """Where rows are kept as they come, one line each; of several for one fault the last counts."""
    return cache_dir() / "results.jsonl"


def read_results(path: Path) -> dict[str, Row]:
    """Rows by the fault's name; faults that the catalogue no longer has are left out."""
    if not path.is_file():
        return {}
    rows = map(Row.from_json, path.read_text(encoding="utf-8").splitlines())
    return {row.trial.fault: row for row in rows if row.trial.fault in FAULTS}


def measure(names: Sequence[str], bisect: bool, repro: bool, reduced: Sequence[str]) -> list[Row]:
    """Try faults of one model, in this process."""
    torch.set_num_threads(1)
    rows = []
    for name in names:
        start = time.perf_counter()
        fault, folder = FAULTS[name], cache_dir()
        trial = attempt(fault, folder)
        caught = trial.caught is not None
        found = bisected(fault, trial, folder) if bisect and caught else None
        again = None
        if caught and (repro or name in reduced):
            again = replayed(fault, folder, reduce=name in reduced)
        rows.append(Row(trial, found, again, time.perf_counter() - start))
        with results_file().open("a", encoding="utf-8") as stream:
            stream.write(rows[-1].to_json() + "\n")
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _line(row: Row) -> str:
    trial = row.trial
    parts = [f"{row.seconds:6.1f} s  {trial.fault}: {trial.where} {trial.by}"]
    if row.bisected is not None:
        parts.append("bisected" if row.bisected.right else f"BISECT {row.bisected.answer}")
    if row.replayed is not None:
        parts.append("replayed" if row.replayed.same else f"REPLAY {row.replayed.found}")
        if row.replayed.left is not None:
            parts.append(f"{row.replayed.operators} > {row.replayed.left} operators")
    return ", ".join(parts)


def spread(faults: Iterable[Fault], count: int) -> tuple[str, ...]:
    """``count`` faults of as many kinds and models as there are, in a fixed order."""
    left = sorted(faults, key=lambda fault: fault.name)
    chosen: list[Fault] = []
    while left and len(chosen) < count:
        kinds, models = ([getattr(f, what) for f in chosen] for what in ("kind", "model"))
        best = min(left, key=lambda f: (kinds.count(f.kind), models.count(f.model)))
        chosen.append(best)
        left.remove(best)
    return tuple(fault.name for fault in chosen)


def run(faults: Sequence[Fault], options: argparse.Namespace) -> list[Row]:
    """Try faults, model by model, in ``options.jobs`` processes; or those not done yet."""
    # The pretrained language model takes half a minute a bisection and gigabytes a reduction.
    small = [f for f in faults if not f.silent and f.model != "smollm2-135m"]
    reduced = spread(small, options.reduce)
    models: dict[str, list[str]] = {}
    known = read_results(results_file()) if options.resume else {}
    rows = [
        known[f.name]
        for f in faults
        if f.name in known and _enough(known[f.name], options, reduced)
    ]
    done = {row.trial.fault for row in rows}
    for fault in (fault for fault in faults if fault.name not in done):
        models.setdefault(f"{fault.model} {fault.recipe}", []).append(fault.name)
    # Small groups keep all processes busy to the end; a model's clean run is quickly repeated.
    groups = [
        names[at : at + _GROUP] for names in models.values() for at in range(0, len(names), _GROUP)
    ]
    what = (options.bisect, options.repro, reduced)
    if options.jobs == 1:
        for names in groups:
            rows += measure(names, *what)
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=processes()) as pool:
            for future in as_completed(pool.submit(measure, names, *what) for names in groups):
                rows += future.result()
    order = list(FAULTS)
    return sorted(rows, key=lambda row: order.index(row.trial.fault))


def _enough(row: Row, options: argparse.Namespace, reduced: Sequence[str]) -> bool:
    """Whether a row holds all that is asked for."""
    bisection, replay = row.bisected, row.replayed
    if row.trial.caught is None:
        return True
    if row.trial.fault in reduced and (replay is None or replay.left is None):
        return False
    return (bisection is not None or not options.bisect) and (
        replay is not None or not options.repro
    )


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """What the table says in sum."""
    caught = [row for row in rows if row.trial.where == "guilty pass"]
    silent = [row for row in rows if row.trial.where == "never"]
    bisections = [row.bisected for row in rows if row.bisected is not None]
    replays = [row.replayed for row in rows if row.replayed is not None]
    removed = [found.removed for found in replays if found.left is not None]
    return {
        "faults": len(rows),
        "kinds": len({row.fault.kind for row in rows}),
        "models": len({row.fault.model for row in rows}),
        "passes": len({row.fault.inner for row in rows}),
        "caught_at_the_guilty_pass": len(caught),
        "share": len(caught) / len(rows),
        "later": [row.trial.fault for row in rows if row.trial.where == "later"],
        "silent": {row.trial.fault: row.fault.silent for row in silent},
        "caught_against_the_catalogue": [
            row.trial.fault for row in rows if row.fault.silent and row not in silent
        ],
        "bisected": len(bisections),
        "bisected_right": sum(found.right for found in bisections),
        "bisected_within_the_bound": sum(found.within for found in bisections),
        "replayed": len(replays),
        "replayed_same": sum(found.same for found in replays),
        "reduced": len(removed),
        "reduced_median_share_removed": statistics.median(removed) if removed else None,
    }


def holds(sums: dict[str, Any]) -> bool:
    """Whether all that is demanded was met."""
    median = sums["reduced_median_share_removed"]
    return (
        sums["share"] >= CAUGHT_SHARE
        and all(sums["silent"].values())
        and not sums["caught_against_the_catalogue"]
        and sums["bisected"] == sums["bisected_right"] == sums["bisected_within_the_bound"]
        and sums["replayed"] == sums["replayed_same"]
        and (median is None or median >= REMOVED_SHARE)
    )
