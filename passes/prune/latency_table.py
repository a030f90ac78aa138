"""Seconds of a layer by its number of units: measured at some numbers, a line with a flat start.

A layer of few units takes as long as one of a few more: a kernel has a smallest useful size. So
``lat(n) = base`` up to ``flat`` units, ``base + slope (n - flat)`` from there on; where the flat
part ends is chosen by the squared error. A layer without units costs nothing.

Source: Kwon et al., NeurIPS 2022, section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.passes.base import Timer

_POINTS = 8  # numbers of units that are measured


@dataclass(frozen=True)
class Table:
    """A piecewise linear latency.

    Attributes:
        flat: how many units cost no more than one.
        base: seconds of those.
        slope: seconds of each further unit, at least 0.
        error: sum of squared differences from what was measured.
    """

    flat: int
    base: float
    slope: float
    error: float = 0.0

    def __call__(self, units: int) -> float:
        """Seconds of a layer with so many units."""
        return self.base + self.slope * max(units - self.flat, 0) if units else 0.0


def fit(measured: Mapping[int, float]) -> Table:
    """The table with the least squared error; of equals the one with the longest flat part.

    Args:
        measured: seconds by number of units, at least 1 each.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("a table needs at least one measurement")
    numbers = sorted(measured)
    seconds = [measured[n] for n in numbers]
    best: Table | None = None
    for end in range(1, len(numbers) + 1):
        found = _with_end(numbers, seconds, end)
        if best is None or found.error <= best.error:
            best = found
    assert best is not None
    return best


def _with_end(numbers: Sequence[int], seconds: Sequence[float], end: int) -> Table:
    """The table whose flat part is the first ``end`` measurements."""
    flat, base = numbers[end - 1], sum(seconds[:end]) / end
    steps = [(n - flat, s - base) for n, s in zip(numbers[end:], seconds[end:], strict=True)]
    square = sum(n * n for n, _ in steps)
    slope = max(sum(n * s for n, s in steps) / square, 0.0) if square else 0.0
    error = sum((s - base) ** 2 for s in seconds[:end])
    error += sum((s - slope * n) ** 2 for n, s in steps)
    return Table(flat, base, slope, error)


@dataclass(frozen=True)
class Shape:
    """A layer as it is served.

    Attributes:
        kind: "heads" or "neurons".
        units: how many it has.
        rows: samples, tokens and features of what it reads.
        outputs: features that it gives.
        width: features of a head; 1 for neurons.
    """

    kind: str
    units: int
    rows: tuple[int, int, int]
    outputs: int
    width: int = 1


class _Attention(nn.Module):
    def __init__(self, shape: Shape, heads: int):
        super().__init__()
        inner = heads * shape.width
        self.shape, self.heads = shape, heads
        self.query, self.key, self.value = (nn.Linear(shape.rows[2], inner) for _ in range(3))
        self.out = nn.Linear(inner, shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = self.shape.rows
        form = (samples, tokens, self.heads, self.shape.width)
        q, k, v = (f(x).view(form).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y: Tensor = self.out(mixed.reshape(samples, tokens, self.heads * self.shape.width))
        return y


class _FeedForward(nn.Module):
    def __init__(self, shape: Shape, neurons: int):
        super().__init__()
        self.up = nn.Linear(shape.rows[2], neurons)
        self.down = nn.Linear(neurons, shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


def points(units: int) -> list[int]:
    """Numbers of units to measure: all where they are few, evenly spread else, both ends in."""
    if units <= 2 * _POINTS:
        return list(range(1, units + 1))
    return sorted({max(1, round(units * i / _POINTS)) for i in range(1, _POINTS + 1)} | {1})


def small_program(shape: Shape, units: int) -> tuple[Program, tuple[Any, ...]]:
    """One attention or feed-forward unit with so many units, and inputs for it."""
    make: Callable[[Shape, int], nn.Module]
    make = _Attention if shape.kind == "heads" else _FeedForward
    # Weights are drawn from a generator of their own: the caller's randomness stays what it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(units)
        model = make(shape, units).eval()
        x = torch.randn(shape.rows)
    return capture(model, (x,)), (x,)


def measure(shapes: Sequence[Shape], timer: Timer) -> dict[Shape, Table]:
    """A table for every shape, all measured in turns.

    Args:
        shapes: equal ones are measured once.
        timer: of the target.
    """
    tried = [(shape, n) for shape in dict.fromkeys(shapes) for n in points(shape.units)]
    seconds = timer.seconds([small_program(shape, n) for shape, n in tried])
    found: dict[Shape, dict[int, float]] = {}
    for (shape, n), spent in zip(tried, seconds, strict=True):
        found.setdefault(shape, {})[n] = spent
    return {shape: fit(measured) for shape, measured in found.items()}
