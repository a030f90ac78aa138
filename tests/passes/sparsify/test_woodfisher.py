"""Optimal brain surgeon on blocks of a Fisher matrix: known answers, and brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish.passes.sparsify.fisher import to_blocks
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.scores import magnitude, undecayed
from planish.passes.sparsify.woodfisher import Diagonal, WoodFisher
from tests.passes.sparsify.problems import SEEDS

TWO_OF_FOUR = Pattern.parse("2:4")
FLAT = Pattern.parse("unstructured")


def curvature(blocks: int, size: int, seed: int) -> Tensor:
    """Positive matrices ``[blocks, size, size]``."""
    made = torch.Generator().manual_seed(seed)
    g = torch.randn(blocks, size + 2, size, generator=made, dtype=torch.float64)
    return g.mT @ g / size + 0.1 * torch.eye(size).double()


def drawn(*shape: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed + 1)
    return torch.randn(*shape, generator=made, dtype=torch.float64)


def best(w: Tensor, f: Tensor, g: Tensor, gone: Tensor) -> tuple[Tensor, float]:
    """The least of ``g d + d F d / 2`` with ``w + d = 0`` where gone, and what it is."""
    d = torch.where(gone, -w, 0)
    free = ~gone
    if bool(free.any()):
        right = -(g + f @ d)[free]
        d[free] = torch.linalg.solve(f[free][:, free], right)
    return w + d, float(g @ d + d @ f @ d / 2)


def correlated(off: float) -> WoodFisher:
    """The example of four weights, of which 0 and 1 may stand in for each other."""
    h = torch.eye(4).double()
    h[0, 1] = h[1, 0] = off
    return WoodFisher(
        torch.tensor([[1.0, 1.0, 0.8, 0.9]], dtype=h.dtype), torch.linalg.inv(h)[None]
    )


def test_the_pair_that_is_cheapest_alone_is_not_taken() -> None:
    wood = correlated(0.9)
    known = torch.tensor([[0.095, 0.095, 0.32, 0.405]]).double()
    torch.testing.assert_close(wood.scores(), known)
    _, cost = wood.repair(torch.tensor([[False, False, True, True]]))
    assert cost == pytest.approx(1.9)
    kept = wood.keep_groups(TWO_OF_FOUR)
    assert kept.tolist() == [[False, True, False, True]]
    rows, loss = wood.repair(kept)
    assert loss == pytest.approx(0.415)
    torch.testing.assert_close(rows, torch.tensor([[0.0, 1.9, 0.0, 0.9]]).double())


def test_the_sum_of_single_updates_is_not_the_update_of_the_set() -> None:
    wood = correlated(-0.9)
    kept = wood.keep_groups(TWO_OF_FOUR)
    assert kept.tolist() == [[False, False, True, True]]
    assert wood.repair(kept)[1] == pytest.approx(0.1)
    summed = WoodFisher(wood.rows, wood.inverse, exact=False)
    rows, _ = summed.repair(kept)
    assert rows.tolist() == [[0.0, 0.0, 0.8, 0.9]]  # what is not zero (-0.9 twice) is cut off


def test_a_diagonal_matrix_weighs_squares_and_changes_nothing_else() -> None:
    h = torch.tensor([1.0, 4.0, 0.5, 2.0]).double()
    w = torch.tensor([[1.0, -0.75, 2.0, 0.5]]).double()
    wood = WoodFisher(w, torch.diag(1 / h)[None])
    torch.testing.assert_close(wood.scores(), w.square() * h / 2)
    kept = FLAT.keep(wood.scores(), 2)
    rows, _ = wood.repair(kept)
    assert torch.equal(rows, torch.where(kept, w, 0))
    alike = WoodFisher(w, (torch.eye(4).double() / 3)[None])
    assert torch.equal(alike.scores().argsort(), magnitude(w).argsort())


@given(
    outputs=st.integers(1, 4), inputs=st.integers(1, 6), size=st.integers(1, 7), seed=SEEDS,
    taylor=st.booleans(), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_update_is_the_constrained_minimum(
    outputs: int, inputs: int, size: int, seed: int, *, taylor: bool, share: float
) -> None:
    numel = outputs * inputs
    size = min(size, numel)
    f = curvature(-(-numel // size), size, seed)
    rows, g = drawn(outputs, inputs, seed=seed), drawn(numel, seed=seed + 7)
    kept = drawn(outputs, inputs, seed=seed + 9).abs().sigmoid() * 2 - 1 >= share
    # Behind the end there is nothing, as fisher makes it.
    short = numel % size or size
    f[-1, short:, :] = f[-1, :, short:] = 0
    f[-1].diagonal()[short:] = 1
    wood = WoodFisher(rows, torch.linalg.inv(f), g if taylor else None)
    found, loss = wood.repair(kept)
    assert not bool(found[~kept].any())
    known, total = [], 0.0
    parts = [to_blocks(v.flatten(), size) for v in (rows, g * taylor, (~kept).double())]
    for w, gradient, gone, block in zip(*parts, f, strict=True):
        made, rise = best(w, block, gradient, gone.bool())
        known.append(made)
        total += rise + float(gradient @ torch.linalg.solve(block, gradient)) / 2
    flat = torch.cat(known)[:numel].reshape(rows.shape)
    torch.testing.assert_close(found, flat, rtol=1e-8, atol=1e-9)
    assert loss == pytest.approx(total, rel=1e-8, abs=1e-9)


@given(seed=SEEDS, taylor=st.booleans(), m=st.sampled_from([2, 3, 4]))
@settings(max_examples=30, deadline=None)
def test_sets_of_groups_are_the_best_of_all(seed: int, m: int, *, taylor: bool) -> None:
    """Inside of larger blocks, in the presence of all other weights, which adapt."""
    n = 1 if m == 2 else 2
    pattern = Pattern("grouped", n, m)
    f = curvature(2, 2 * m, seed)
    rows, g = drawn(2, 2 * m, seed=seed), 0.2 * drawn(4 * m, seed=seed + 3)
    wood = WoodFisher(rows, torch.linalg.inv(f), g if taylor else None)
    kept = wood.keep_groups(pattern)
    gradient = (g if taylor else 0 * g).reshape(2, -1)
    for row in range(2):
        for start in (0, m):
            losses = {}
            for members in combinations(range(m), m - n):
                gone = torch.zeros(2 * m, dtype=torch.bool)
                gone[[start + i for i in members]] = True
                losses[members] = best(rows[row], f[row], gradient[row], gone)[1]
            away = (~kept[row, start : start + m]).nonzero().flatten().tolist()
            assert losses[tuple(away)] == pytest.approx(min(losses.values()), abs=1e-12)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_units_of_blocks_are_scored_as_sets(seed: int) -> None:
    """Two rows of two entries: the sum over rows, each row's pair going together."""
    f = curvature(4, 4, seed)
    rows = drawn(4, 4, seed=seed)
    wood = WoodFisher(rows, torch.linalg.inv(f))
    found = wood.unit_scores(Pattern.parse("2x2"))
    for i in range(2):
        for j in range(2):
            gone = torch.zeros(4, dtype=torch.bool)
            gone[2 * j : 2 * j + 2] = True
            nothing = torch.zeros(4).double()
            pair = sum(best(rows[r], f[r], nothing, gone)[1] for r in (2 * i, 2 * i + 1))
            assert float(found[i, j]) == pytest.approx(pair, rel=1e-9)


def test_units_of_the_diagonal_are_sums() -> None:
    single = torch.arange(16.0).double().reshape(4, 4)
    units = Diagonal(single, single, True).unit_scores(Pattern.parse("2x2"))
    assert units.tolist() == [[10, 18], [42, 50]]
    rows, loss = Diagonal(single, single, True).repair(single >= 3)
    assert loss == 3
    assert torch.equal(rows, torch.where(single >= 3, single, 0))
    assert Diagonal(single, single, False).repair(single >= 3)[1] is None


def lowest(scores: Tensor) -> int:
    return int((~FLAT.keep(scores, 1)).nonzero())


def test_undecayed_lies_between_magnitude_and_gradient() -> None:
    w = torch.tensor([1.0, 0.1, 0.5]).double()
    g = torch.tensor([1e-4, 2e-3, -4e-4]).double()
    scores = undecayed(w, g, 5e-4)
    torch.testing.assert_close(scores, torch.tensor([4.00e-4, 1.95e-4, 3.25e-4]).double())
    products = torch.tensor([1e-4, 2e-4, 2e-4]).double()
    torch.testing.assert_close(undecayed(w, g, 0.0), products)
    assert [lowest(s) for s in (scores, undecayed(w, g, 0.0), magnitude(w))] == [1, 0, 1]


@given(seed=SEEDS, decay=st.floats(1e-5, 1.0))
@settings(max_examples=20, deadline=None)
def test_undecayed_is_magnitude_where_training_is_done(seed: int, decay: float) -> None:
    w = drawn(20, seed=seed)
    scores = undecayed(w, -decay * w, decay)
    assert torch.equal(scores.argsort(stable=True), magnitude(w).argsort(stable=True))
