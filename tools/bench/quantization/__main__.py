"""Speed and fidelity of quantized files, beside those of other tools, in one run.

    python -m planish.tools.bench.quantization [--only MODEL] [--rounds 40] [--rivals PYTHON]

Every model: the plain ``torch.onnx.export`` file in ONNX Runtime is the base, one thread, batch 1.
Fidelity is measured on data that nothing was calibrated with. ``--rivals`` names the Python of an
environment with NNCF and OpenVINO; without it only ONNX Runtime's own quantizers are beside ours.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click
from rich import box
from rich.table import Table
from rich.text import Text

from planish.ir.errors import PlanishError
from planish.tools.bench.quantization.cases import CASES, Case
from planish.tools.bench.quantization.rivals import Worker
from planish.tools.bench.quantization.table import Row, measure, to_json, verdicts
from planish.tools.console import stderr, stdout


@click.command()
@click.option("--only", default=".*", help="Regular expression for model names.")
@click.option("--rounds", default=40, show_default=True, type=click.IntRange(min=3))
@click.option(
    "--rivals",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The Python of an environment with nncf and openvino.",
)
@click.option("--recipe", help="Of our file for ONNX Runtime, instead of each model's own.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep all files in this folder.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@click.option("--list", "listing", is_flag=True, help="Print the names of the models and stop.")
def main(
    only: str,
    rounds: int,
    rivals: Path | None,
    recipe: str | None,
    keep: Path | None,
    output: Path | None,
    as_json: bool,
    listing: bool,
) -> None:
    """Measure the table; exit code 1 where our file misses what is asked of it.

    \b
    Examples:
      python -m planish.tools.bench.quantization --only minilm --rounds 60
      python -m planish.tools.bench.quantization --rivals /tmp/rivals/bin/python --output t.json
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # quantizers warn of every norm that they leave alone
    chosen = [case for case in CASES if re.search(only, case.name)]
    if listing or not chosen:
        stdout().print("\n".join(case.name for case in CASES), markup=False)
        sys.exit(0 if listing else 2)
    console = stderr()
    results: dict[str, list[Row]] = {}
    held = True
    with Worker(rivals) if rivals is not None else nullcontext() as worker:
        for case in chosen:
            try:
                rows = measure(
                    case,
                    rounds=rounds,
                    worker=worker,
                    recipe=recipe,
                    keep=keep / _folder(case) if keep is not None else None,
                    tell=lambda sentence: console.print(sentence, style="dim", markup=False),
                )
            except PlanishError as error:  # a model that is not here: the others are
                console.print(f"{case.name}: {error}", style="red", markup=False)
                held = False
                continue
            results[case.name] = rows
            found = verdicts(case, rows)
            held &= all(good for _, good in found)
            if not as_json:
                _print(case, rows, found)
    text = to_json(results)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(text + "\n")
    sys.exit(0 if held else 1)


def _folder(case: Case) -> str:
    return re.sub(r"\W+", "-", case.name).strip("-")


def _print(case: Case, rows: Sequence[Row], found: Sequence[tuple[str, bool]]) -> None:
    """The rows of one model as a table, and what was asked."""
    figures = list(dict.fromkeys(name for row in rows for name in row.scores))
    table = Table(title=case.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("file, runtime")
    for title in ("speed", "fastest", "ms", "MB", *figures):
        table.add_column(title, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        cells = [
            _number(row.ratio, "{:.2f}x"),
            _number(row.best, "{:.2f}x"),
            _number(row.milliseconds, "{:.2f}"),
            _number(row.megabytes, "{:.1f}"),
            *(_number(row.scores.get(name), "{:.4g}") for name in figures),
        ]
        table.add_row(Text(row.name), *cells, Text(row.note))
    console = stdout()
    console.print(table, highlight=False)
    for sentence, good in found:
        console.print(f"{'holds ' if good else 'MISSES'}  {sentence}", highlight=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
