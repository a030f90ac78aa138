"""Units that go together: never worse than the units worth least by themselves."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from planish.passes.prune.rearrange import joint_cost, rearrange


def _gone(kept: torch.Tensor, size: int) -> torch.Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone


def test_known_answer() -> None:
    g = torch.tensor([[1.0, -1.0, 0.5]])
    kept = rearrange(g, 1)
    assert kept.tolist() == [2]
    assert joint_cost((g.T @ g).double(), _gone(kept, 3)) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_the_diagonal(seed: int) -> None:
    g = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fisher = g.T @ g
    for kept in range(10):
        found = rearrange(g, kept)
        assert len(found) == kept
        least = torch.argsort(fisher.diagonal(), stable=True)[: 9 - kept]
        start = torch.zeros(9, dtype=torch.bool)
        start[least] = True
        assert joint_cost(fisher, _gone(found, 9)) <= joint_cost(fisher, start) + 1e-9


def test_no_single_exchange_is_better() -> None:
    g = torch.randn(4, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fisher = g.T @ g
    gone = _gone(rearrange(g, 3), 7)
    here = joint_cost(fisher, gone)
    for out, back in combinations(range(7), 2):
        if bool(gone[out]) != bool(gone[back]):
            other = gone.clone()
            other[[out, back]] = ~other[[out, back]]
            assert joint_cost(fisher, other) >= here - 1e-9
