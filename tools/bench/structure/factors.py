"""What each method of factoring keeps of MiniLM's feed-forward layers, without any training.

    python -m planish.tools.bench.structure.factors [--keep 0.5] [--calibrate 256] [--json]

Judged on sentences that nothing was calibrated with: signal to noise of the sentence embeddings.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings

import click
import torch
from rich import box
from rich.table import Table

from planish.tools.bench.quantization.cases import CASES
from planish.tools.bench.sparsity.__main__ import spread
from planish.tools.bench.sparsity.runs import captured, outputs, pruned
from planish.tools.console import stderr, stdout

WHERE = "where={include=[*intermediate*,*output.dense*],exclude=[*attention*]}"
PLAIN = "aim=layer,sequential=false"
METHODS = {
    "svd": "method=svd",
    "whitened": PLAIN,
    "whitened, in sequence": "aim=layer,compensate=false",
    "aimed at the outputs": "compensate=false",
    "and fitted to the sums before": "",
    "and ranks under one budget": "rule=parameters",
}
# The goals, dB: whitened over svd, and the best over whitened.
OVER_SVD, OVER_WHITENED = 3.5, 2.0


@click.command(help=__doc__)
@click.option("--keep", default=0.5, show_default=True, help="Share of parameters that stays.")
@click.option("--calibrate", default=256, show_default=True, help="Sentences, at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(keep: float, calibrate: int, as_json: bool) -> None:
    """Print the table; exit code 1 where a goal is missed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == "minilm")
    held, seen = case.held(), spread(case.calibration(), calibrate)
    program = captured(case.load(), (*seen[0], *case.extra), case.dynamic_shapes)
    reference = outputs(program, held)
    rows: dict[str, dict[str, float]] = {}
    for name, options in METHODS.items():
        stderr().print(f"{name} ...", style="dim", markup=False)
        given = ",".join(
            filter(None, (f"keep={keep}", options, f"padding_mask={case.padding_mask}", WHERE))
        )
        done = pruned(program, f"factorize{{{given}}}", [(*i, *case.extra) for i in seen])
        scores = dict(case.judge(held, reference, outputs(done.program, held)))
        rows[name] = {**scores, "seconds": done.seconds}
    gains = [rows[n]["sqnr_db"] for n in ("svd", "whitened", "and ranks under one budget")]
    verdicts = {
        f"whitened at least {OVER_SVD} dB above svd": gains[1] - gains[0] >= OVER_SVD,
        f"the best at least {OVER_WHITENED} dB above whitened": gains[2] - gains[1]
        >= OVER_WHITENED,
    }
    if as_json:
        click.echo(json.dumps({"rows": rows, "verdicts": verdicts}, allow_nan=False))
    else:
        table = Table(title=f"MiniLM, 12 feed-forward layers, keep={keep}", box=box.SIMPLE)
        table.add_column("method")
        for heading in rows["svd"]:
            table.add_column(heading, justify="right")
        for name, row in rows.items():
            table.add_row(name, *(f"{value:.3f}" for value in row.values()))
        stdout().print(table)
        for what, holds in verdicts.items():
            stdout().print(f"{'yes' if holds else 'NO'}: {what}", markup=False)
    sys.exit(0 if all(verdicts.values()) else 1)


if __name__ == "__main__":
    main()
