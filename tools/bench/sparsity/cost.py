"""Time and memory of pruning one layer, against its width.

    python -m planish.tools.bench.sparsity.cost [--widths 512,1024,2048,4096] [--method sparsegpt]

A layer is random, with inputs that are correlated. d_col is what is summed over; d_row is as large,
or four times that. The exponent is that of the growth of time with the width, from all widths; a
method of O(d_row d_col^2 + d_col^3) has 3, obc of O(d_row d_col^3) has 4. Memory counts what the
method makes and holds at once, exactly: O(d_row d_col + d_col^2) has 2. Of obc every row of a batch
holds an inverse, which has 3 until a batch of 192 MiB is full.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from planish.passes.sparsify.methods import LAYER_METHODS, LayerMethod, Task
from planish.passes.sparsify.patterns import Pattern
from planish.tools.bench.live_bytes import LiveBytes
from planish.tools.console import stderr, stdout

# method -> exponents of time and memory that the cost model gives, for widths that go to infinity
ORDERS = {"magnitude": (2.0, 2.0), "wanda": (2.0, 2.0), "sparsegpt": (3.0, 2.0), "obc": (4.0, 3.0)}
SPARE = 0.25  # by which a measured exponent of time may be above


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        d_row: outputs.
        d_col: inputs.
        seconds: of the CPU, the best of the rounds.
        peak_mb: made and alive at once, beside the weight and H.
        scaled: nanoseconds per unit of the cost model.
    """

    d_row: int
    d_col: int
    seconds: float
    peak_mb: float
    scaled: float


def layer(d_row: int, d_col: int) -> tuple[Tensor, Tensor]:
    """Weights ``[d_row, d_col]``, and ``H`` of inputs that share an eighth of their directions."""
    made = torch.Generator().manual_seed(d_col)
    rows = torch.randn(d_row, d_col, generator=made) / math.sqrt(d_col)
    mixing = torch.randn(d_col, d_col // 8, generator=made) / math.sqrt(d_col // 8)
    own = torch.rand(d_col, generator=made) + 0.1
    h = (mixing @ mixing.t() + torch.diag(own)).double()
    return rows, 2 * h


def measure(name: str, shapes: Sequence[tuple[int, int]], rounds: int) -> list[Row]:
    """Prune layers of these shapes (d_row, d_col) at 2:4."""
    method = LAYER_METHODS[name]  # type: ignore[index]  # a literal
    rows = []
    for d_row, d_col in shapes:
        given, h = layer(d_row, d_col)
        seconds = min(_timed(method, given, h) for _ in range(rounds))
        watch = LiveBytes()
        with watch:
            method(_task(given, h))
        units = _units(name, d_row, d_col)
        rows.append(Row(d_row, d_col, seconds, watch.peak / 1e6, 1e9 * seconds / units))
        stderr().print(f"  {rows[-1]}", style="dim", markup=False)
    return rows


def _task(rows: Tensor, h: Tensor) -> Task:
    pattern = Pattern.parse("2:4")
    return Task(rows, h, pattern, pattern.zeros(rows.numel(), 0.5))


def _timed(method: LayerMethod, rows: Tensor, h: Tensor) -> float:
    start = time.process_time()  # one thread computes: the wall time of an idle machine
    method(_task(rows, h))
    return time.process_time() - start


def _units(name: str, d_row: int, d_col: int) -> float:
    """What the cost model counts."""
    if name == "obc":
        return float(d_row * d_col**3)
    return float(d_row * d_col**2 + d_col**3) if name == "sparsegpt" else float(d_row * d_col)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost on log size, by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, costs))
    x = x - x.mean()
    return float((x @ (y - y.mean())) / (x @ x))


def verdicts(name: str, rows: Sequence[Row]) -> dict[str, bool]:
    """Whether time and memory grow no faster than the cost model, for each ratio of d_row."""
    of_time, of_memory = ORDERS[name]
    found = {}
    for ratio in sorted({r.d_row // r.d_col for r in rows}):
        part = [r for r in rows if r.d_row == ratio * r.d_col]
        if len(part) < 2:
            continue
        sizes = [float(r.d_col) for r in part]
        grown = exponent(sizes, [r.seconds for r in part])
        held = exponent(sizes, [r.peak_mb for r in part])
        shape = f"d_row = {ratio} d_col"
        found[f"{shape}: time d^{grown:.2f}, model d^{of_time:g}"] = grown <= of_time + SPARE
        found[f"{shape}: memory d^{held:.2f}, model d^{of_memory:g}"] = held <= of_memory + SPARE
    return found


@click.command(help=__doc__)
@click.option("--method", "name", type=click.Choice(sorted(ORDERS)), default="sparsegpt")
@click.option("--widths", default="512,1024,2048,4096", show_default=True, help="Of d_col.")
@click.option("--ratios", default="1,4", show_default=True, help="d_row over d_col.")
@click.option("--rounds", default=2, show_default=True, help="The best of them counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def main(name: str, widths: str, ratios: str, rounds: int, as_json: bool) -> None:
    """Print the table; exit code 1 where the cost grows faster than the model."""
    torch.set_num_threads(1)
    shapes = [(int(r) * int(w), int(w)) for r in ratios.split(",") for w in widths.split(",")]
    rows = measure(name, shapes, rounds)
    checked = verdicts(name, rows)
    if as_json:
        document = {"method": name, "rows": [asdict(r) for r in rows], "verdicts": checked}
        click.echo(json.dumps(document, allow_nan=False))
    else:
        table = Table(title=f"{name}, 2:4, one thread", box=box.SIMPLE)
        for heading in ("d_row", "d_col", "seconds", "peak MB", "ns per unit"):
            table.add_column(heading, justify="right")
        for r in rows:
            figures = (f"{r.seconds:.2f}", f"{r.peak_mb:.0f}", f"{r.scaled:.3f}")
            table.add_row(str(r.d_row), str(r.d_col), *figures)
        stdout().print(table)
        for what, holds in checked.items():
            stdout().print(f"{'yes' if holds else 'NO'}: {what}", markup=False)
    sys.exit(0 if all(checked.values()) else 1)


if __name__ == "__main__":
    main()
