"""Plant every fault of the catalogue, one at a time, and print where each was caught.

    python -m planish.tools.bench.faults [--jobs N] [--only REGEX] [--bisect] [--repro] [--reduce N]
                                          [--resume] [--json]

One line of JSON a fault goes to ``build/faults/results.jsonl`` as it is done. The exit code is 1 if
fewer than 95% are caught at the guilty pass, a fault passes silently without a reason in the
catalogue, or ``bisect`` or ``repro`` fails for one that was caught.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from planish.tools.bench.faults.catalogue import FAULTS
from planish.tools.bench.faults.table import Row, holds, run, totals


def show(rows: Sequence[Row], sums: dict[str, Any]) -> None:
    """Print the table and the totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table("fault", "kind", "model", "pass", "caught at", "by", title="seeded faults")
    for name in ("bisected", "replayed", "reduced"):
        table.add_column(name)
    for row in rows:
        trial = row.trial
        table.add_row(
            trial.fault,
            row.fault.kind,
            trial.model,
            trial.inner,
            trial.where,
            trial.by,
            *_tools(row),
        )
    console.print(table)
    for name, reason in sums["silent"].items():
        console.print(f"silent: {name}: {reason or 'NO REASON IN THE CATALOGUE'}", markup=False)
    for name, value in sums.items():
        if name != "silent":
            console.print(f"{name.replace('_', ' ')}: {value}", markup=False)


def _tools(row: Row) -> tuple[str, str, str]:
    bisection, replay = row.bisected, row.replayed
    looked = ""
    if bisection is not None:
        right = f"yes, {bisection.evaluations} evaluations"
        looked = right if bisection.right else f"NO: {bisection.answer}"
    again = "" if replay is None else "same" if replay.same else f"NO: {replay.found}"
    shrunk = "" if replay is None or replay.left is None else f"{replay.operators} > {replay.left}"
    return looked, again, shrunk


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m planish.tools.bench.faults",
        description="Plant wrong rewrites in copies of real passes, and see that each is caught.",
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="name, kind, model or pass")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--bisect", action="store_true", help="bisect every caught fault")
    parser.add_argument("--repro", action="store_true", help="replay every bundle elsewhere")
    parser.add_argument("--reduce", type=int, default=0, metavar="N", help="reduce N failures")
    parser.add_argument("--resume", action="store_true", help="keep what results.jsonl holds")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the table; see the module's docstring for the exit code."""
    options = _parser().parse_args(arguments)
    chosen = [
        fault
        for fault in FAULTS.values()
        if re.search(options.only, f"{fault.name} {fault.kind} {fault.model} {fault.inner}")
    ]
    if not chosen:
        print("no fault of the catalogue matches", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = run(chosen, options)
    sums = totals(rows)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "totals": sums}, indent=2))
    else:
        show(rows, sums)
    return 0 if holds(sums) else 1


if __name__ == "__main__":
    sys.exit(main())
