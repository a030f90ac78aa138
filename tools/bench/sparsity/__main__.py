"""What each method of 2:4 pruning keeps of a pretrained model, without any training.

    python -m planish.tools.bench.sparsity [--only MODEL] [--methods magnitude,wanda] [--json]

Every linear and convolution whose reduction axis allows it, but the first and the last, loses half
of its weights; the program is then run in PyTorch on data that nothing was calibrated with.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from planish.ir.errors import PlanishError
from planish.tools.bench.quantization.cases import CASES, Case, Inputs
from planish.tools.bench.sparsity.runs import captured, ends, outputs, pruned, step
from planish.tools.console import stderr, stdout

MODELS = ("minilm", "dinov2-s", "efficientnet-lite0")
METHODS = ("magnitude", "wanda", "sparsegpt", "obc")
# The goal: the best method over magnitude, dB of the output.
GAIN_DB = {"minilm": 4.0}


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        method: a score of the pass.
        scores: figures on held data.
        weights: how many were pruned.
        refused: how many could not be.
        seconds: of the pass.
    """

    method: str
    scores: Mapping[str, float]
    weights: int
    refused: int
    seconds: float


def measure(case: Case, methods: Sequence[str], samples: int, pattern: str) -> list[Row]:
    """Prune one model by every method.

    Args:
        case: the model, its data and its judge.
        methods: scores of the pass.
        samples: how many to calibrate with, at most, spread over all there are.
        pattern: as the pass takes it.
    """
    held = case.held()
    seen = spread(case.calibration(), samples)
    program = captured(case.load(), (*seen[0], *case.extra), case.dynamic_shapes)
    reference = outputs(program, held)
    rows = []
    for method in methods:
        recipe = step(
            method, pattern=pattern, exclude=ends(program), padding_mask=case.padding_mask or ""
        )
        done = pruned(program, recipe, [(*inputs, *case.extra) for inputs in seen])
        found = outputs(done.program, held)
        scores = case.judge(held, reference, found)
        scores.setdefault("cosine", mean_cosine(reference, found))
        rows.append(Row(method, scores, done.weights, done.refused, done.seconds))
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        stderr().print(f"  {method}: {figures} ({done.seconds:.0f} s)", style="dim", markup=False)
    return rows


def spread(batches: Sequence[Inputs], samples: int) -> list[Inputs]:
    """Batches of at most so many samples in all, evenly from what is there."""
    count = max(1, samples // len(batches[0][0]))
    count = min(count, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]


def mean_cosine(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Of every output row with what it was."""
    parts = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(found, reference, strict=True)]
    return float(torch.cat([p.flatten() for p in parts]).double().mean())


def verdicts(name: str, rows: Sequence[Row]) -> dict[str, bool]:
    """What is required of the order of methods, and whether it holds."""
    sqnr = {row.method: row.scores["sqnr_db"] for row in rows}
    second = [sqnr[m] for m in ("sparsegpt", "obc") if m in sqnr]
    found = {}
    if second and "wanda" in sqnr:
        found["sparsegpt or obc above wanda"] = max(second) > sqnr["wanda"]
    if "wanda" in sqnr and "magnitude" in sqnr:
        found["wanda above magnitude"] = sqnr["wanda"] > sqnr["magnitude"]
    if name in GAIN_DB and "magnitude" in sqnr and len(sqnr) > 1:
        gain = max(sqnr.values()) - sqnr["magnitude"]
        found[f"best {gain:+.1f} dB over magnitude, {GAIN_DB[name]:g} asked"] = (
            gain >= GAIN_DB[name]
        )
    return found


@click.command(help=__doc__)
@click.option("--only", default=".*", help="Regular expression for model names.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Of the pass.")
@click.option("--samples", default=256, show_default=True, help="For calibration, at most.")
@click.option("--pattern", default="2:4", show_default=True, help="As sparsify takes it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def main(only: str, methods: str, samples: int, pattern: str, as_json: bool) -> None:
    """Print the table of every model; exit code 1 where an order does not hold."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    named = {case.name: case for case in CASES}
    chosen = [name for name in MODELS if re.search(only, name)]
    if not chosen:
        raise click.UsageError("no such model: " + ", ".join(MODELS))
    results: dict[str, list[Row]] = {}
    for name in chosen:
        stderr().print(f"{name} ...", style="dim", markup=False)
        try:
            results[name] = measure(named[name], methods.split(","), samples, pattern)
        except PlanishError as error:  # a model that is not here: the others are
            stderr().print(f"{name}: {error}", style="red", markup=False)
            continue
        if not as_json:
            _print(name, results[name], pattern)
    checked = {name: verdicts(name, rows) for name, rows in results.items()}
    if as_json:
        document = {
            name: {"rows": [asdict(row) for row in rows], "verdicts": checked[name]}
            for name, rows in results.items()
        }
        click.echo(json.dumps(document, allow_nan=False))
    holds = all(all(found.values()) for found in checked.values())
    sys.exit(0 if holds and len(results) == len(chosen) else 1)


def _print(name: str, rows: Sequence[Row], pattern: str) -> None:
    title = f"{name}, {pattern}: {rows[0].weights} weights, {rows[0].refused} left dense"
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("method")
    figures = list(dict.fromkeys(figure for row in rows for figure in row.scores))
    for heading in (*figures, "gain dB", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        gain = row.scores["sqnr_db"] - rows[0].scores["sqnr_db"]
        cells = [f"{row.scores[f]:.4f}" for f in figures]
        table.add_row(row.method, *cells, f"{gain:+.1f}", f"{row.seconds:.1f}")
    stdout().print(table)
    for what, holds in verdicts(name, rows).items():
        stdout().print(f"{'yes' if holds else 'NO'}: {what}", markup=False)


if __name__ == "__main__":
    main()
