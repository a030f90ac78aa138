"""Linears of 2:4 weights on sparse tensor cores, against the same ones dense.

    python -m planish.tools.bench.sparsity.cuda [--widths 1024,2048,4096] [--tokens 2048] [--json]

Needs an NVIDIA GPU of compute capability 8.0 or later; says so and ends with 4 elsewhere. A net of
two linears, as in a transformer's feed-forward part, is pruned to 2:4 and computed in f16 twice on
the same inputs: by the dense kernels, and by ``result.sparse_model("cuda")``. The times are the
least of interleaved rounds, so that what else the GPU does meets both alike.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import planish
from planish.ir.errors import UnsupportedError
from planish.model import OptimizedModule
from planish.sparse_cuda import check_gpu, on_device
from planish.tools.console import stderr, stdout

RECIPE = "sparsify{score=magnitude}, cast-half"
_PER_ROUND = 20  # runs between two looks at the clock


@dataclass(frozen=True)
class Row:
    """One width.

    Attributes:
        width: of the net; its hidden layer has four times as many features.
        tokens: rows of the input.
        dense_ms: least time of one run.
        sparse_ms: likewise, with packed weights.
        speedup: the first by the second.
        error: of the outputs, relative to their norm.
        dense_mb: what the weights take on the GPU.
        sparse_mb: likewise, packed.
    """

    width: int
    tokens: int
    dense_ms: float
    sparse_ms: float
    speedup: float
    error: float
    dense_mb: float
    sparse_mb: float


class FeedForward(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, width]`` to the same."""
        y: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return y


def measure(width: int, tokens: int, rounds: int) -> Row:
    """Prune one net and run it both ways.

    Raises:
        UnsupportedError: the GPU has no sparse tensor cores.
    """
    device = check_gpu("cuda")
    x = torch.randn(tokens, width)
    result = planish.optimize(
        FeedForward(width).eval(), x, recipe=RECIPE, calibration=[x], verify="off"
    )
    before = torch.cuda.memory_allocated()
    dense = OptimizedModule(on_device(result.program, device))
    between = torch.cuda.memory_allocated()
    sparse = result.sparse_model("cuda")
    after = torch.cuda.memory_allocated()
    given = x.to(device)
    expected, found = dense(given), sparse(given)
    error = float((found - expected).norm() / expected.norm())
    times = _interleaved([lambda: dense(given), lambda: sparse(given)], rounds)
    return Row(
        width, tokens, times[0], times[1], times[0] / times[1], error,
        (between - before) / 1e6, (after - between) / 1e6,
    )  # fmt: skip


def _interleaved(runs: list[Callable[[], Tensor]], rounds: int) -> list[float]:
    """Least milliseconds of each, measured by the GPU's own clock in turn."""
    best = [float("inf")] * len(runs)
    for round_ in range(rounds + 1):
        for i, run in enumerate(runs):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_PER_ROUND):
                run()
            stop.record()
            torch.cuda.synchronize()
            if round_:  # the first one chooses kernels
                best[i] = min(best[i], start.elapsed_time(stop) / _PER_ROUND)
    return best


@click.command(help=__doc__)
@click.option("--widths", default="1024,2048,4096", show_default=True, help="Multiples of 64.")
@click.option("--tokens", default=2048, show_default=True, help="Rows of the input.")
@click.option("--rounds", default=20, show_default=True, help="Interleaved, the least counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def main(widths: str, tokens: int, rounds: int, as_json: bool) -> None:
    """Print a row for each width; exit code 4 where no GPU can do it."""
    try:
        check_gpu("cuda")
    except UnsupportedError as error:
        stderr().print(str(error), style="red", markup=False)
        sys.exit(4)
    rows = [measure(int(width), tokens, rounds) for width in widths.split(",")]
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if as_json:
        click.echo(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, allow_nan=False))
        return
    table = Table(title=f"{facts['gpu']}, torch {facts['torch']}, f16", box=box.SIMPLE)
    for title in ("width", "tokens", "dense ms", "2:4 ms", "faster", "error", "MB", "2:4 MB"):
        table.add_column(title, justify="right")
    for r in rows:
        table.add_row(
            str(r.width), str(r.tokens), f"{r.dense_ms:.3f}", f"{r.sparse_ms:.3f}",
            f"{r.speedup:.2f}x", f"{r.error:.1e}", f"{r.dense_mb:.1f}", f"{r.sparse_mb:.1f}",
        )  # fmt: skip
    stdout().print(table)


if __name__ == "__main__":
    main()
