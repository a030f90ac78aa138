"""SmolLM2-135M at 2:4: perplexity, time and memory.

    python -m planish.tools.bench.sparsity.smollm2 [--methods magnitude,sparsegpt] [--json]

All linears are pruned but the output layer, whose weight is the table of tokens as well. Perplexity
is that of windows of 512 tokens that no pass was calibrated with. The peak counts the model and all
tensors that the pass has made and that are alive at once, exactly.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from planish.ir.execute import run
from planish.ir.program import Program
from planish.tools.bench.fetch import locate
from planish.tools.bench.quantization.weight_only import perplexity
from planish.tools.bench.real_inputs import smollm2_tokenizer
from planish.tools.bench.real_models import real_model
from planish.tools.bench.sparsity.runs import captured, pruned, step
from planish.tools.console import stderr, stdout

LENGTH = 512
MINUTES, MODELS, SHARE = 10.0, 2.0, 0.5


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: a score of the pass, or "dense".
        perplexity: on held windows.
        increase: of perplexity over dense.
        seconds: of the pass.
        cpu_seconds: of the process meanwhile, which other programs on the machine do not change.
        peak_mb: the model, and what the pass holds at once; 0 where not counted.
        bound_mb: twice the model and the largest layer's Hessian in float64.
    """

    method: str
    perplexity: float
    increase: float
    seconds: float
    cpu_seconds: float
    peak_mb: float
    bound_mb: float


def windows(held: int, calibration: int) -> tuple[list[Tensor], list[Tensor]]:
    """Windows ``[1, 512]`` to judge by, then others to calibrate with, 20 windows apart."""
    path = locate("gensim", "gensim/test/test_data/lee_background.cor")
    ids = torch.tensor(smollm2_tokenizer()(path.read_text(encoding="utf-8"))["input_ids"])
    cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    return list(cut[:held]), list(cut[held + 20 :][:calibration])


def bytes_of(program: Program) -> int:
    """Of all constants, shared storage once."""
    storages = {
        c.untyped_storage()._cdata: c.untyped_storage().nbytes()
        for c in program.constants.values()
        if isinstance(c, Tensor)
    }
    return sum(storages.values())


def measure(methods: Sequence[str], held: int, calibration: int, memory: bool) -> list[Row]:
    """Prune by every method.

    Args:
        methods: scores of the pass.
        held: windows to judge by.
        calibration: windows to calibrate with; all of them are in memory at once.
        memory: whether to count bytes, in a second run, as that slows the many small steps.
    """
    description = real_model("smollm2-135m")
    args = description.inputs(*description.sizes[0])[0]
    program = captured(description.load(), args, description.dynamic_shapes)
    test, seen = windows(held, calibration)
    model = bytes_of(program)
    widest = max(
        c.shape[-1]
        for n, c in program.constants.items()
        if "down_proj" in n and isinstance(c, Tensor)
    )
    bound = float(MODELS * model + 8 * widest**2)

    def judged(of: Program) -> float:
        return perplexity(lambda ids: run(of, (ids,))[0], test)

    dense = judged(program)
    rows = [Row("dense", dense, 0.0, 0.0, 0.0, model / 1e6, bound / 1e6)]
    calls = [(window,) for window in seen]
    for method in methods:
        done = pruned(program, step(method), calls)
        times, weights, found = (done.seconds, done.cpu_seconds), done.weights, judged(done.program)
        del done
        row = Row(method, found, found - dense, *times, 0.0, bound / 1e6)
        stderr().print(f"  {row}, {weights} weights", style="dim", markup=False)
        if memory:
            made = pruned(program, step(method), calls, count_bytes=True).peak_bytes
            row = replace(row, peak_mb=(model + made) / 1e6)
        rows.append(row)
    return rows


def verdicts(rows: Sequence[Row]) -> dict[str, bool]:
    """What is required of sparsegpt, and whether it holds."""
    by_name = {row.method: row for row in rows}
    row = by_name.get("sparsegpt")
    if row is None:
        return {}
    found = {
        f"sparsegpt under {MINUTES:g} minutes": row.seconds < 60 * MINUTES,
    }
    if row.peak_mb:
        found["sparsegpt under twice the model and a Hessian"] = row.peak_mb < row.bound_mb
    if "magnitude" in by_name:
        most = SHARE * by_name["magnitude"].increase
        found["increase at most half of that of magnitude"] = row.increase <= most
    return found


@click.command(help=__doc__)
@click.option("--methods", default="magnitude,wanda,sparsegpt", show_default=True)
@click.option("--windows", "held", default=8, show_default=True, help="Judged, of 512 tokens.")
@click.option("--calibrate", default=8, show_default=True, help="Windows for calibration.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Count bytes too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def main(
    methods: str, held: int, calibrate: int, threads: int, memory: bool, as_json: bool
) -> None:
    """Print the table; exit code 1 where a bound does not hold."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    rows = measure(methods.split(","), held, calibrate, memory)
    checked = verdicts(rows)
    if as_json:
        document = {"rows": [asdict(row) for row in rows], "verdicts": checked}
        click.echo(json.dumps(document, allow_nan=False))
    else:
        table = Table(title="SmolLM2-135M, 2:4", box=box.SIMPLE)
        table.add_column("method")
        for heading in ("perplexity", "increase", "seconds", "CPU s", "peak MB", "bound MB"):
            table.add_column(heading, justify="right")
        for r in rows:
            figures = (r.perplexity, r.increase, r.seconds, r.cpu_seconds, r.peak_mb, r.bound_mb)
            table.add_row(r.method, *[f"{figure:.1f}" for figure in figures])
        stdout().print(table)
        for what, holds in checked.items():
            stdout().print(f"{'yes' if holds else 'NO'}: {what}", markup=False)
    sys.exit(0 if all(checked.values()) else 1)


if __name__ == "__main__":
    main()
