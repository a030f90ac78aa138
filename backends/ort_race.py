"""Time files against each other in their runtimes, in alternation, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planish.backends.registry import load_backend

_WARM_UP = 3
_FEWEST, _MOST = 8, 200  # rounds


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Latency of one file beside the first one, from the same rounds.

    Attributes:
        best_ms: fastest run: what the machine can do; all above it is other processes.
        median_ms: median run.
        ratio: fastest run of the first file over that of this one: above 1 is faster.
        median_ratio: median over rounds of (the first's run / this one's).
        rounds: how many runs of each.
    """

    best_ms: float
    median_ms: float
    ratio: float
    median_ratio: float
    rounds: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain values for JSON."""
        return {name: round(value, 6) for name, value in vars(self).items()}


def race(
    paths: Sequence[Path],
    inputs: Sequence[Any],
    *,
    seconds: float = 3.0,
    target: str = "onnxruntime-cpu",
) -> list[Speed]:
    """Run every file once in each round, in an order that turns by one.

    Comparing within a round cancels what the machine does over time, and turning the order cancels
    what a neighbor leaves in the caches.

    Args:
        paths: the files; the first is what the others are compared with.
        inputs: flat inputs, the same for all.
        seconds: about how long to run altogether; at least eight rounds are run.
        target: whose files they are.

    Raises:
        ExportError: the runtime refuses a file, or it fails on the inputs.
    """
    opened = load_backend(target).opened
    runs = [opened(path) for path in paths]
    start = time.perf_counter()
    for run in runs:
        for _ in range(_WARM_UP):
            run(inputs)
    one_round = (time.perf_counter() - start) / _WARM_UP
    rounds = max(_FEWEST, min(_MOST, int(seconds / max(one_round, 1e-6))))
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        shift = number % len(runs)
        for index in (*range(shift, len(runs)), *range(shift)):
            start = time.perf_counter()
            runs[index](inputs)
            times[index].append(time.perf_counter() - start)
    return [_speed(times[0], own) for own in times]


def _speed(base: Sequence[float], own: Sequence[float]) -> Speed:
    return Speed(
        best_ms=1e3 * min(own),
        median_ms=1e3 * statistics.median(own),
        ratio=min(base) / min(own),
        median_ratio=statistics.median(b / o for b, o in zip(base, own, strict=True)),
        rounds=len(own),
    )
