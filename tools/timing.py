"""Fair timing on a noisy machine: interleaved rounds, compared by the median of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate beside the first one, from the same rounds.

    Attributes:
        median_ms: median latency.
        ratio: median over rounds of (first's latency / this one's): above 1 is faster.
        low, high: first and third quartile of that ratio.
        rounds: how many rounds were timed.
    """

    median_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


def interleave(
    candidates: Sequence[Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    on_round: Callable[[int], None] = lambda done: None,
) -> list[Timing]:
    """Time candidates in alternation; the order turns by one every round.

    Comparing only within a round cancels what the machine does over time, and turning the order
    cancels what a neighbor leaves in the caches.
    """
    for candidate in candidates:
        for _ in range(warmup):
            candidate()
    seconds: list[list[float]] = [[] for _ in candidates]
    for number in range(rounds):
        shift = number % len(candidates)
        for index in (*range(shift, len(candidates)), *range(shift)):
            start = time.perf_counter()
            candidates[index]()
            seconds[index].append(time.perf_counter() - start)
        on_round(number + 1)
    return [_summary(seconds[0], own) for own in seconds]


def _summary(base: Sequence[float], own: Sequence[float]) -> Timing:
    ratios = sorted(b / o for b, o in zip(base, own, strict=True))
    if len(ratios) > 1:
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    else:
        low = ratio = high = ratios[0]
    return Timing(1e3 * statistics.median(own), ratio, low, high, len(own))
