from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish.passes.sparsify import obs
from planish.passes.sparsify.obs import (
    cheapest_sets,
    downdate,
    minimum,
    refit,
    removal_loss,
    remove,
    set_scores,
    single_scores,
)
from tests.passes.sparsify.problems import SEEDS, layer, least_squares, loss

TWO = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def pair(correlation: float) -> tuple[Tensor, Tensor]:
    """Four weights, of which the first two read nearly the same."""
    h = torch.eye(4, dtype=torch.float64)
    h[0, 1] = h[1, 0] = correlation
    return torch.tensor([1.0, 1.0, 0.8, 0.9], dtype=torch.float64), h


def gone(size: int, *members: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(members), True)


# Known answers -----------------------------------------------------------------------------------


def test_one_of_two_correlated_weights() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert single_scores(w, TWO.inverse()).tolist() == pytest.approx([0.75, 3.0])
    after = remove(w, TWO.inverse(), gone(2, 0))
    assert after.tolist() == pytest.approx([0.0, 2.5])
    assert after[0] == 0
    assert loss((after - w)[None], TWO) == pytest.approx(0.75)


def test_the_sum_of_single_scores_misleads_and_the_set_score_does_not() -> None:
    w, h = pair(0.9)
    inverse = h.inverse()
    assert single_scores(w, inverse).tolist() == pytest.approx([0.095, 0.095, 0.32, 0.405])
    assert float(removal_loss(w, inverse, gone(4, 0, 1))) == pytest.approx(1.9)
    members, cost = cheapest_sets(w[None], inverse, 2)
    assert float(cost) == pytest.approx(0.415)
    assert members.tolist() in ([0, 2], [1, 2])
    assert remove(w, inverse, gone(4, 0, 2)).tolist() == pytest.approx([0, 1.9, 0, 0.9])


def test_a_pair_that_cancels_is_cheap_together_and_its_weights_become_zero() -> None:
    w, h = pair(-0.9)
    inverse = h.inverse()
    assert float(removal_loss(w, inverse, gone(4, 0, 1))) == pytest.approx(0.1)
    assert remove(w, inverse, gone(4, 0, 1)).tolist() == pytest.approx([0, 0, 0.8, 0.9])
    singles = w - inverse @ (w * gone(4, 0, 1) / inverse.diagonal())
    assert singles[:2].tolist() == pytest.approx([-0.9, -0.9])


def test_independent_inputs_are_weighted_magnitudes() -> None:
    diagonal = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    w = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    inverse = torch.diag(diagonal).inverse()
    assert single_scores(w, inverse).tolist() == pytest.approx((w**2 * diagonal / 2).tolist())
    assert remove(w, inverse, gone(3, 1)).tolist() == [3.0, 0.0, 2.0]


# Against brute force -----------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_set_score_is_the_loss_of_the_set_update_and_of_no_better_weights(
    seed: int, count: int
) -> None:
    rows, h = layer(1, 6, seed=seed)
    w, inverse = rows[0].double(), h.inverse()
    sets = torch.tensor([*combinations(range(6), count)])
    scores = set_scores(w, inverse, sets)
    for members, score in zip(sets.tolist(), scores.tolist(), strict=True):
        out = gone(6, *members)
        after = remove(w, inverse, out)
        assert bool((after[out] == 0).all())
        assert score == pytest.approx(loss((after - w)[None], h), rel=1e-7)
        assert score == pytest.approx(float(removal_loss(w, inverse, out)), rel=1e-7)
        torch.testing.assert_close(after, least_squares(w, h, ~out), rtol=1e-6, atol=1e-8)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_downdate_is_the_inverse_without_the_weight(seed: int) -> None:
    _, h = layer(1, 5, seed=seed)
    inverse = downdate(h.inverse(), 2)
    rest = torch.tensor([0, 1, 3, 4])
    assert bool((inverse[2] == 0).all())
    assert bool((inverse[:, 2] == 0).all())
    torch.testing.assert_close(inverse[rest][:, rest], h[rest][:, rest].inverse())


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_with_a_gradient_the_minimum_takes_the_place_of_the_weights(seed: int) -> None:
    rows, h = layer(2, 5, seed=seed)
    w, g = rows.double()
    inverse, out = h.inverse(), gone(5, 1, 3)
    best = minimum(w, inverse, g)
    after = remove(best, inverse, out)
    # The conditions of the constrained minimum: g + H d vanishes where weights are free.
    torch.testing.assert_close((g + h @ (after - w))[~out], torch.zeros(3, dtype=torch.float64))
    assert bool((after[out] == 0).all())
    d = after - w
    cost = float(g @ d + d @ h @ d / 2)
    constant = -float(g @ inverse @ g) / 2
    assert cost == pytest.approx(float(removal_loss(best, inverse, out)) + constant)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_beyond_the_bound_sets_are_greedy(seed: int) -> None:
    rows, h = layer(3, 6, seed=seed)
    w, inverse = rows.double(), h.inverse()
    exact_members, exact = cheapest_sets(w, inverse, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs, "MOST_CANDIDATES", 1)
        members, cost = cheapest_sets(w, inverse, 3)
    assert len(set(members.tolist())) == 3
    assert len(set(exact_members.tolist())) == 3
    assert float(cost) >= float(exact) - 1e-12
    assert float(cost) == pytest.approx(
        sum(float(removal_loss(row, inverse, gone(6, *members.tolist()))) for row in w)
    )


def test_refit_is_the_set_update_of_every_row() -> None:
    rows, h = layer(5, 9)
    kept = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    kept[0], kept[1] = True, False
    done = refit(rows.double(), h, kept)
    torch.testing.assert_close(done, remove(rows.double(), h.inverse(), ~kept))
    assert torch.equal(done[0], rows[0].double())
    assert bool((done[1] == 0).all())
