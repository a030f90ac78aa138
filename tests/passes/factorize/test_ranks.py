"""Ranks by every rule, against brute force."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from planish.passes.factorize.ranks import (
    Choice,
    by_budget,
    by_error,
    by_fraction,
    candidates,
    rounded,
)


@dataclass(frozen=True)
class Toy:
    """A layer of two sides."""

    name: str
    outputs: int
    inputs: int

    @property
    def largest(self) -> int:
        return min(self.outputs, self.inputs)

    @property
    def break_even(self) -> float:
        return self.outputs * self.inputs / (self.outputs + self.inputs)

    @property
    def limit(self) -> float:
        return self.break_even


@pytest.mark.parametrize(
    ("sides", "rank"),
    [((768, 768), 384), ((3072, 768), 614), ((4096, 4096), 2048), ((11008, 4096), 2985)],
)
def test_break_even_is_as_published(sides: tuple[int, int], rank: int) -> None:
    assert int(Toy("w", *sides).break_even) == rank


def test_a_fraction_is_never_exceeded() -> None:
    layer = Toy("w", 384, 1536)
    rank = by_fraction([layer], 0.5, 8).rank["w"]
    assert rank == 152
    assert rank * (384 + 1536) <= 0.5 * 384 * 1536
    assert rounded(5.9, 8, 100) == 5
    assert rounded(0.2, 8, 100) == 1


def test_candidates_stay_below_break_even() -> None:
    assert candidates(Toy("w", 16, 16), 4) == [4]  # 8 is the rank of no gain
    assert candidates(Toy("w", 3, 3), 8) == [1]
    assert candidates(Toy("w", 2, 2), 8) == []


def test_the_smallest_rank_within_the_error() -> None:
    errors = [1.0, 0.8, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01]
    layer = Toy("w", 8, 100)
    found = by_error([layer], lambda _, r: errors[r], 0.3, 1)
    assert found.rank == {"w": 3}
    up = by_error([layer], lambda _, r: errors[r], 0.3, 4)
    assert up.rank == {"w": 4}
    refused = by_error([layer], lambda _, r: errors[r], 0.01, 1)
    assert refused.rank == {"w": None}
    assert "from 7 on" in refused.dense["w"]


def _choices(seed: int) -> dict[str, list[Choice]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in "abc":
        energy = torch.rand(4, generator=generator).sort(descending=True).values ** 3
        energy = energy / energy.sum()
        factored = [Choice(r, 2.0 * r, float(energy[r:].sum())) for r in range(1, 4)]
        found[name] = [*factored, Choice(None, 7.0, 0.0)]
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("keep", [0.4, 0.5, 0.8])
def test_a_budget_is_kept_and_nearly_best(seed: int, keep: float) -> None:
    options = _choices(seed)
    layers = [Toy(n, 10, 10) for n in options]
    found = by_budget(layers, options, keep, "parameters").rank
    taken = [next(c for c in options[n] if c.rank == r) for n, r in found.items()]
    budget = keep * 21
    assert sum(c.cost for c in taken) <= budget
    best = min(
        sum(c.error for c in combination)
        for combination in product(*options.values())
        if sum(c.cost for c in combination) <= budget
    )
    # Convex choices on a grid: the price finds the best up to the last step, which is filled.
    assert sum(c.error for c in taken) <= best + 0.02


def test_a_layer_that_matters_more_keeps_more() -> None:
    spectrum = torch.tensor([4.0, 3, 2, 1])
    tail = [float(spectrum[r:].square().sum()) / 30 for r in range(5)]
    options = {
        name: [*(Choice(r, 2.0 * r, weight * tail[r]) for r in (1, 2, 3)), Choice(None, 8, 0.0)]
        for name, weight in (("quiet", 0.01), ("loud", 1.0))
    }
    found = by_budget([Toy("quiet", 4, 4), Toy("loud", 4, 4)], options, 0.5, "parameters").rank
    assert found["loud"] == 3
    assert found["quiet"] == 1


def test_a_budget_out_of_reach_is_said() -> None:
    options = {"a": [Choice(1, 5.0, 0.4), Choice(None, 8.0, 0.0)]}
    found = by_budget([Toy("a", 4, 4)], options, 0.1, "multiply-accumulates")
    assert found.rank == {"a": 1}
    assert "10% of the multiply-accumulates cannot be met" in found.remarks[0]
    assert "62.5%" in found.remarks[0]


def test_a_layer_that_gets_no_faster_stays_dense() -> None:
    options = {
        "slow": [Choice(8, 3.0, 0.1), Choice(None, 2.0, 0.0)],
        "good": [Choice(8, 3.0, 0.1), Choice(None, 9.0, 0.0)],
    }
    found = by_budget([Toy("slow", 9, 9), Toy("good", 9, 9)], options, 0.6, "microseconds")
    assert found.rank == {"slow": None, "good": 8}
    assert "would not get faster: at rank 8 the microseconds are 1.50" in found.dense["slow"]
