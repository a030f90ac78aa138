"""Latency against fidelity on MiniLM for factors, pruned units, int8, and both together.

    python -m planish.tools.bench.structure [--only REGEX] [--rounds 40] [--calibrate 160]

Speed is the median over rounds of the latency of the plain export by that of a file, ONNX Runtime,
one thread, all files in alternation. A star marks what no other row beats in speed and cosine.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from planish.ir.errors import PlanishError
from planish.tools.bench.quantization.table import Row
from planish.tools.bench.structure.pareto import (
    Entry,
    beyond,
    entries,
    frontier,
    measure,
    setting,
)
from planish.tools.console import stderr, stdout

_FIGURES = ("cosine", "sqnr_db", "lee50", "lee50_loss")


@click.command()
@click.option("--only", default=".*", help="Regular expression for names of rows.")
@click.option("--recipe", "recipes", multiple=True, help="One more row: a recipe as text.")
@click.option("--rounds", default=40, show_default=True, type=click.IntRange(min=3))
@click.option(
    "--calibrate", default=160, show_default=True, type=click.IntRange(min=4), help="Sentences."
)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep all files in this folder.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@click.option("--list", "listing", is_flag=True, help="Print the rows' recipes and stop.")
def main(
    only: str,
    recipes: Sequence[str],
    rounds: int,
    calibrate: int,
    keep: Path | None,
    seed: int,
    as_json: bool,
    listing: bool,
) -> None:
    """Measure the table; exit code 1 where a row failed.

    \b
    Examples:
      python -m planish.tools.bench.structure --only 'int8|interpolate' --rounds 20
      python -m planish.tools.bench.structure --only '^int8' \\
          --recipe 'exact,prune-transformer{macs=0.9},quantize{mode=dynamic}'
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    chosen = [entry for entry in entries() if re.search(only, entry.name)]
    chosen += [Entry(text, text, "quantize" if "quantize" in text else "") for text in recipes]
    if listing or not chosen:
        for entry in chosen or entries():
            stdout().print(f"{entry.name}: {entry.recipe}", markup=False, soft_wrap=True)
        sys.exit(0 if listing else 2)

    def tell(sentence: str) -> None:
        stderr().print(sentence, style="dim", markup=False)

    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    opened = tempfile.TemporaryDirectory(prefix="planish-") if keep is None else nullcontext(keep)
    try:
        with opened as folder:
            rows = measure(setting(calibrate, rounds, seed), chosen, Path(folder), tell)
    except PlanishError as error:  # the model or its texts are not here
        stderr().print(str(error), style="red", markup=False)
        sys.exit(error.exit_code)
    better = beyond(rows, chosen)
    if as_json:
        document = {"rows": [row.to_dict() for row in rows], "beyond_int8": better}
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        _print(rows, better)
    sys.exit(0 if all(row.ratio is not None for row in rows) else 1)


def _print(rows: Sequence[Row], better: Sequence[str]) -> None:
    best = frontier(rows)
    table = Table(title="minilm", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("recipe")
    for title in ("speed", "fastest", "ms", "MB", *_FIGURES):
        table.add_column(title, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        cells = [
            _number(row.ratio, "{:.2f}x"),
            _number(row.best, "{:.2f}x"),
            _number(row.milliseconds, "{:.2f}"),
            _number(row.megabytes, "{:.1f}"),
            *(_number(row.scores.get(name), "{:.4f}") for name in _FIGURES),
        ]
        table.add_row("*" if row.name in best else "", Text(row.name), *cells, Text(row.note))
    stdout().print(table, highlight=False)
    sentence = ", ".join(better) or "none"
    stdout().print(f"faster than int8 alone at no less cosine: {sentence}", markup=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
