"""Scores of units against what they are defined as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planish.ir.capture import capture
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.groups import Group
from planish.passes.prune.scores import best, leveled, magnitude, of_gradients, writers
from tests.passes.rounding.nets import tensor


def _gated() -> nn.Module:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up = nn.Linear(4, 6), nn.Linear(4, 6)
            self.down = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            return y

    return Gated().eval()


def test_magnitude_is_the_norm_of_all_rows_that_make_a_unit() -> None:
    module = _gated()
    program = capture(module, (torch.randn(3, 4),))
    (group,), _ = find_groups(program)
    assert sorted(str(p.node.target) for p in writers(program, group)) == [
        "gate.weight",
        "up.weight",
    ]
    both = torch.cat([tensor(program, "gate.weight"), tensor(program, "up.weight")], 1)
    found = magnitude(program, group)
    assert found is not None
    assert torch.allclose(found, both.double().norm(dim=1))


def test_magnitude_of_convolutions_counts_taps_not_readers() -> None:
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1)).eval()
    program = capture(module, (torch.randn(1, 2, 6, 6),))
    (group,), _ = find_groups(program)
    weight: torch.Tensor = module[0].weight  # type: ignore[assignment]  # of a linear
    found = magnitude(program, group)
    assert found is not None
    assert torch.allclose(found, weight.double().flatten(1).norm(dim=1))


def test_no_magnitude_where_no_matrix_makes_the_units() -> None:
    program = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    group = Group("none", "neurons", 4, (), (), True, program.operators[0])
    assert magnitude(program, group) is None


def test_taylor_and_fisher_of_two_batches() -> None:
    program = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    group = Group("two", "neurons", 2, (), (), True, program.operators[0])
    batches = [{group: torch.tensor([1.0, -2.0])}, {group: torch.tensor([-3.0, -2.0])}]
    taylor = of_gradients(iter(batches), [group], squared=False)[group]
    fisher = of_gradients(iter(batches), [group], squared=True)[group]
    assert taylor.tolist() == [2.0, 2.0]
    assert fisher.tolist() == [2.5, 2.0]
    with pytest.raises(ValueError, match="no batch"):
        of_gradients([], [group], squared=True)


def test_best_units_ascend_and_ties_go_to_the_first() -> None:
    assert best(torch.tensor([1.0, 5.0, 3.0, 5.0]), 3).tolist() == [1, 2, 3]
    assert best(torch.tensor([2.0, 2.0, 2.0]), 2).tolist() == [0, 1]


def test_leveled_scores_have_mean_square_one() -> None:
    found = leveled(torch.tensor([30.0, 40.0]))
    assert float(found.square().mean()) == pytest.approx(1)
    assert not leveled(torch.zeros(3)).any()
