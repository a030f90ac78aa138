"""Structured pruning over every architecture of the zoo: is what was cut what was to be zero?

    python -m planish.tools.bench.structure.coverage [--only REGEX] [--seed 0] [--json]

Of every kind of group that a program has, one at random loses 30% of its units. Where cutting
equals setting them to zero, the outputs are compared with those of the masked program (1e-4); the
cut program is verified and run in any case. The exit code is 1 if fewer than 40 architectures pass,
or any is wrong.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field

import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor

import planish
from planish.ir.capture import capture
from planish.ir.errors import PlanishError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.groups import Group
from planish.tools.bench.structure.masking import masked, share_kept, without
from planish.tools.bench.zoo import ZooEntry, zoo
from planish.tools.console import stderr, stdout

WANTED, BOUND, SHARE = 40, 1e-4, 0.7


@dataclass
class Row:
    """One architecture.

    Attributes:
        name: of the entry.
        groups: kind -> how many groups were found.
        cut: names of the groups that were cut.
        compared: how many of those were compared with the masked program.
        refusals: reason -> how many times.
        worst: largest relative difference.
        problem: what was wrong, or None.
        seconds: in all.
    """

    name: str
    groups: dict[str, int] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)
    compared: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    problem: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether something was cut, compared and right."""
        return self.problem is None and self.compared > 0


def measure(entry: ZooEntry, seed: int) -> Row:
    """Cut one group of each kind from an architecture."""
    row, start = Row(entry.name), time.perf_counter()
    try:
        args, kwargs = entry.inputs()
        captured = capture(entry.build(), args, kwargs, dynamic_shapes=entry.dynamic_shapes)
        program = planish.optimize(captured, recipe="exact", target="onnx", verify="off").program
        flat = program.signature.flatten(args, kwargs)
        groups, refusals = find_groups(program)
        row.groups = dict(Counter(g.kind for g in groups))
        row.refusals = dict(Counter(_plain(r.reason) for r in refusals))
        for kind in row.groups:
            chosen = random.Random(f"{seed} {entry.name}").choice(
                [g for g in groups if g.kind == kind]
            )
            if chosen.size > 1:
                _cut(program, flat, chosen, seed, row)
    except PlanishError as error:
        row.problem = f"{type(error).__name__}: {error.what}"
    except Exception as error:  # whatever goes wrong in one architecture, the others go on
        row.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row.seconds = time.perf_counter() - start
    return row


def _cut(program: Program, flat: object, group: Group, seed: int, row: Row) -> None:
    kept = share_kept(group, SHARE, seed)
    after = without(program, {group: kept})
    verify(after)
    found = run(after, flat)  # type: ignore[arg-type]  # flat inputs
    row.cut.append(group.name)
    if not group.exact:
        return
    wanted = run(masked(program, {group: kept}), flat)  # type: ignore[arg-type]  # flat inputs
    row.compared += 1
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            row.problem = f"{group.name}: shape {list(a.shape)}, not {list(b.shape)}"
        elif b.is_floating_point() and b.numel():
            scale = max(1e-6, float(b.nan_to_num().abs().max()))
            worst = float((a - b).nan_to_num().abs().max()) / scale
            row.worst = max(row.worst, worst)
            if worst > BOUND:
                row.problem = f"{group.name}: differs by {worst:.2g}"


def _plain(reason: str) -> str:
    """A reason without the numbers of one node."""
    return re.sub(r"\d+", "N", reason)


@click.command(help=__doc__)
@click.option("--only", default="", help="A regular expression of names.")
@click.option("--seed", default=0, show_default=True, help="Of what is cut.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(only: str, seed: int, as_json: bool) -> None:
    """Print a table of kinds and reasons."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for entry in (e for e in zoo() if re.search(only, e.name)):
        with torch.random.fork_rng(devices=[]):
            rows.append(measure(entry, seed))
        last = rows[-1]
        said = last.problem or f"{last.compared} of {len(last.cut)} compared, {last.worst:.1g}"
        stderr().print(f"{last.name}: {said}", style="dim", markup=False)
    wrong = [row for row in rows if row.problem is not None]
    passed = sum(row.passed for row in rows)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], allow_nan=False))
    else:
        _print(rows)
        stdout().print(
            f"{passed} of {len(rows)} pass, {len(wrong)} wrong, "
            f"{sum(not row.groups and row.problem is None for row in rows)} without groups"
        )
        for row in wrong:
            stdout().print(f"WRONG {row.name}: {row.problem}", markup=False)
    sys.exit(0 if not wrong and (only or passed >= WANTED) else 1)


def _print(rows: list[Row]) -> None:
    for title, counts in (
        ("groups found", _added(row.groups for row in rows)),
        ("refusals", _added(row.refusals for row in rows)),
    ):
        table = Table(title=title, box=box.SIMPLE)
        table.add_column("what")
        table.add_column("times", justify="right")
        for what, times in counts.most_common(25):
            table.add_row(what, str(times))
        stdout().print(table)


def _added(counts: object) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in counts:  # type: ignore[attr-defined]  # an iterable of mappings
        total.update(part)
    return total


if __name__ == "__main__":
    main()
