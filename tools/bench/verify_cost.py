"""What default verification costs: ``optimize`` with ``verify="each"`` against ``verify="off"``.

    python -m planish.tools.bench.verify_cost [--model minilm] [--rounds 7] [--json]

Time: both sides alternate in one process after a warm-up, and the median of the ratios within a
round counts, with its quartiles; wall time, and the processor time of this process, which a busy
machine disturbs less. The number of threads is that of OMP_NUM_THREADS. The limit is 1.30.

Memory: the bytes of all tensors that operators made and that are alive, counted operator by
operator while the captured program is optimized. What verification adds to the peak may be at most
the peak of running the program once.

Exit code 1 where a limit is exceeded.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch

from planish.tools.console import print_json

MODELS = ("minilm", "efficientnet-lite0")
TIME_LIMIT = 1.30
MEMORY_LIMIT = 1.0  # of the activations of one run


@dataclass(frozen=True)
class Ratio:
    """Time with verification over time without, of rounds.

    Attributes:
        median, low, high: of the ratios within a round: median, first and third quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Cost:
    """What verification of one model costs.

    Attributes:
        model: its id.
        rounds: how many were timed.
        threads: of torch.
        wall: wall time.
        cpu: processor time.
        seconds: median wall seconds: without and with verification.
        run_peak: bytes of live activations when the captured program runs once on the sample.
        off_peak: the peak of live bytes without verification.
        each_peak: the same with it.
    """

    model: str
    rounds: int
    threads: int
    wall: Ratio
    cpu: Ratio
    seconds: tuple[float, float]
    run_peak: int
    off_peak: int
    each_peak: int

    @property
    def added(self) -> float:
        """What verification adds to the peak, in activations of one run."""
        return max(0, self.each_peak - self.off_peak) / self.run_peak

    @property
    def holds(self) -> bool:
        """Whether both limits are kept; of time, by the processor's."""
        return self.cpu.median <= TIME_LIMIT and self.added <= MEMORY_LIMIT

    def __str__(self) -> str:
        mega = 2**20
        return (
            f"{self.model:20} wall {self.wall}, processor {self.cpu}, "
            f"{self.seconds[0]:.2f} s -> {self.seconds[1]:.2f} s, {self.rounds} rounds, "
            f"{self.threads} threads\n"
            f"{'':20} peak of live tensors {self.off_peak / mega:.1f} MiB -> "
            f"{self.each_peak / mega:.1f} MiB: {self.added:.2f} of the "
            f"{self.run_peak / mega:.1f} MiB that one run holds"
        )


def measured(model_id: str, rounds: int = 7) -> Cost:
    """Measure one model.

    Raises:
        RequirementError: the model is not here; says what to install.
    """
    import planish
    from planish.ir.capture import capture
    from planish.tools.bench.real_models import real_model

    real = real_model(model_id)
    model = real.load()
    inputs = real.inputs(*real.sizes[0])

    def optimize(verify: Any) -> planish.Optimized:  # noqa: ANN401 - a literal
        return planish.optimize(model, inputs, dynamic_shapes=real.dynamic_shapes, verify=verify)

    timed = _rounds([lambda: optimize("off"), lambda: optimize("each")], rounds)
    run_peak, off_peak, each_peak = peaks(
        capture(model, *inputs, dynamic_shapes=real.dynamic_shapes)
    )
    return Cost(
        model=model_id,
        rounds=rounds,
        threads=torch.get_num_threads(),
        wall=_ratio([(each[0], off[0]) for off, each in timed]),
        cpu=_ratio([(each[1], off[1]) for off, each in timed]),
        seconds=(
            statistics.median(off[0] for off, _ in timed),
            statistics.median(each[0] for _, each in timed),
        ),
        run_peak=run_peak,
        off_peak=off_peak,
        each_peak=each_peak,
    )


def peaks(program: Any) -> tuple[int, int, int]:  # noqa: ANN401 - a Program
    """Peaks of live bytes of one run, and of ``optimize`` without and with verification."""
    import planish
    from planish.ir.execute import run
    from planish.tools.bench.live_bytes import LiveBytes

    found = []
    for work in (
        lambda: run(program, program.samples[0]),
        lambda: planish.optimize(program, verify="off"),
        lambda: planish.optimize(program, verify="each"),
    ):
        gc.collect()
        with LiveBytes() as live:
            work()
        found.append(live.peak)
    return found[0], found[1], found[2]


def _rounds(sides: Sequence[Callable[[], object]], rounds: int) -> list[list[tuple[float, float]]]:
    """Wall and processor seconds of every side, per round; the order turns every round."""
    for side in sides:
        side()
    found: list[list[tuple[float, float]]] = []
    for number in range(rounds):
        times: list[tuple[float, float]] = [(0.0, 0.0)] * len(sides)
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            sides[index]()
            times[index] = (time.perf_counter() - wall, time.process_time() - cpu)
        found.append(times)
    return found


def _ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    ratios = [each / off for each, off in pairs]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


@click.command()
@click.option("--model", "models", multiple=True, help="A pretrained model's id; may be repeated.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(models: tuple[str, ...], rounds: int, as_json: bool) -> None:
    """Print what default verification costs in time and in peak memory."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = []
    for model in models or MODELS:
        found.append(measured(model, rounds))
        if not as_json:
            print(found[-1], flush=True)
    if as_json:
        print_json([{**asdict(cost), "added": cost.added, "holds": cost.holds} for cost in found])
    sys.exit(0 if all(cost.holds for cost in found) else 1)


if __name__ == "__main__":
    main()
