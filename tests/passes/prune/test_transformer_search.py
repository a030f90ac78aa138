"""Which heads and neurons stay: never over the budget, and never worse than trying everything."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from planish.passes.prune.latency_table import Table
from planish.passes.prune.transformer_search import Layer, by_latency, by_macs


def _worth(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _lists(kept: list[Tensor]) -> list[list[int]]:
    return [k.tolist() for k in kept]


def test_known_answer() -> None:
    layers = [
        Layer("heads", _worth(10, 1), 3.0),
        Layer("neurons", _worth(4, 3, 2, 2.5), 1.0),
    ]
    found = by_macs(layers, 5.0)
    assert _lists(found.kept) == [[0], [0, 1]]
    assert (found.worth, found.cost, found.met) == (17.0, 5.0, True)


def test_no_head_may_be_the_answer() -> None:
    layers = [Layer("heads", _worth(1, 1), 4.0), Layer("neurons", _worth(9, 8, 7, 6), 1.0)]
    assert _lists(by_macs(layers, 4.0).kept) == [[], [0, 1, 2, 3]]


def test_heads_that_do_not_fit_are_no_candidate() -> None:
    layers = [Layer("heads", _worth(100, 100), 3.0), Layer("neurons", _worth(1), 1.0)]
    found = by_macs(layers, 2.0)
    assert _lists(found.kept) == [[], [0]]
    assert found.cost <= 2.0


def _every(layers: list[Layer], budget: float) -> float:
    """The most that any choice is worth."""
    sizes = [len(layer.worth) for layer in layers]
    best = 0.0
    for bits in product((0, 1), repeat=sum(sizes)):
        parts = torch.tensor(bits, dtype=torch.float64).split(sizes)
        cost = sum(layer.cost * float(p.sum()) for layer, p in zip(layers, parts, strict=True))
        if cost <= budget + 1e-9:
            worth = sum(float((x.worth * p).sum()) for x, p in zip(layers, parts, strict=True))
            best = max(best, worth)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_is_worth_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def worth(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    layers = [
        Layer("heads", worth(2), 2.5),
        Layer("heads", worth(2), 2.5),
        Layer("neurons", worth(3), 1.0),
        Layer("neurons", worth(3), 1.0),
    ]
    for budget in (1.0, 4.0, 6.5, 9.0):
        found = by_macs(layers, budget)
        assert found.worth == pytest.approx(_every(layers, budget))
        assert found.cost <= budget + 1e-9


def test_a_budget_below_the_least_gives_the_least() -> None:
    layers = [Layer("heads", _worth(1, 5), 3.0, least=1), Layer("neurons", _worth(2, 1), 1.0, 1)]
    found = by_macs(layers, 1.0)
    assert not found.met
    assert _lists(found.kept) == [[1], [0]]
    assert found.cost == 4.0


def test_every_candidate_of_a_latency_has_the_whole_budget() -> None:
    """The best drops the second attention and no feed-forward unit: not the first candidate."""
    heads, neurons = Table(1, 2.0, 1.0), Table(1, 1.0, 0.5)
    layers = [
        Layer("heads", _worth(9, 8), table=heads),
        Layer("heads", _worth(0.1, 0.1), table=heads),
        Layer("neurons", _worth(5, 4, 3), table=neurons),
    ]
    found = by_latency(layers, 5.0)  # 2 + 1 for both heads, 1 + 2 * 0.5 for all neurons
    assert _lists(found.kept) == [[0, 1], [], [0, 1, 2]]
    assert found.cost == pytest.approx(5.0)
    assert found.met


def test_a_flat_table_costs_nothing() -> None:
    layers = [
        Layer("heads", _worth(3, 2, 1), table=Table(1, 1.0, 0.0)),
        Layer("neurons", _worth(1, 2), table=Table(1, 1.0, 1.0)),
    ]
    found = by_latency(layers, 2.0)
    assert _lists(found.kept) == [[0, 1, 2], [1]]


def test_layers_that_must_stay_are_not_dropped() -> None:
    layers = [
        Layer("heads", _worth(1, 1), least=1, table=Table(1, 5.0, 1.0)),
        Layer("neurons", _worth(9, 9), least=0, table=Table(1, 1.0, 1.0)),
    ]
    found = by_latency(layers, 2.0)
    assert not found.met
    assert _lists(found.kept) == [[0], []]
    assert found.cost == 5.0
