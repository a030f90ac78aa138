"""Pivoted QR and the interpolation it gives: known answers, and what holds of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planish.passes.prune.decompose import decompose, pivoted_qr
from planish.passes.prune.triangle import Triangle


def _random(n: int, m: int, seed: int = 0, rank: int | None = None) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(n, m, generator=drawn, dtype=torch.float64)
    left = torch.randn(n, rank, generator=drawn, dtype=torch.float64)
    return left @ torch.randn(rank, m, generator=drawn, dtype=torch.float64)


def test_known_answer_of_three_columns() -> None:
    a, b = torch.eye(5, dtype=torch.float64)[:2]
    found = decompose(torch.stack([3 * a, 2 * b, 2 * a - b], 1), 2)
    assert found.kept.tolist() == [0, 1]
    wanted = torch.tensor([[1, 0, 2 / 3], [0, 1, -0.5]], dtype=torch.float64)
    assert torch.allclose(found.matrix, wanted, atol=1e-14)
    assert found.error < 1e-14


def test_a_copy_is_a_unit_vector() -> None:
    z = _random(40, 6)
    z[:, 4] = z[:, 1]
    found = decompose(z, 5)
    column = found.matrix[:, 4 if 4 not in found.kept else 1]
    one = found.kept.tolist().index(1 if 1 in found.kept else 4)
    wanted = torch.zeros(5, dtype=torch.float64)
    wanted[one] = 1
    assert torch.allclose(column, wanted, atol=1e-13)


def test_all_columns_kept_is_the_identity() -> None:
    found = decompose(_random(30, 7), 7)
    assert found.kept.tolist() == list(range(7))
    assert torch.equal(found.matrix, torch.eye(7, dtype=torch.float64))
    assert found.error == 0
    assert found.score == 0
    assert found.largest == 1


@pytest.mark.parametrize("k", [1, 3, 9, 11])
@pytest.mark.parametrize("n", [60, 12, 8])
def test_error_is_the_norm_of_the_block_left_out(k: int, n: int) -> None:
    z = _random(n, 12, seed=k)
    found = decompose(z, k)
    left = z - z[:, found.kept] @ found.matrix
    assert float(left.norm()) == pytest.approx(found.error, rel=1e-10, abs=1e-12)
    assert found.relative == pytest.approx(found.error / float(z.norm()), rel=1e-10)
    assert torch.equal(found.matrix[:, found.kept], torch.eye(k, dtype=torch.float64))
    assert bool((found.kept.diff() > 0).all())
    if k < min(n, 12):
        r22 = pivoted_qr(z).r[k:, k:]
        assert float(torch.linalg.matrix_norm(left, 2)) == pytest.approx(
            float(torch.linalg.matrix_norm(r22, 2)), rel=1e-10
        )


def test_r_is_that_of_the_columns_in_their_order() -> None:
    z = _random(50, 20, seed=4)
    found = pivoted_qr(z)
    ordered = z[:, found.order]
    assert torch.allclose(found.r.t() @ found.r, ordered.t() @ ordered, rtol=1e-12, atol=1e-11)
    assert bool((found.diagonal.diff() <= 0).all())
    # No later column is longer, in what is left of it, than the pivot: that is what pivoting means.
    for k in range(20):
        assert float(found.r[k:, k:].square().sum(0).max().sqrt()) <= float(found.diagonal[k]) * (
            1 + 1e-12
        )


def test_pivots_stay_right_where_norms_cancel() -> None:
    # Columns that agree in all but their sixth digit: downdated norms lose every digit.
    z = _random(80, 1) + 1e-6 * _random(80, 15, seed=2)
    found = pivoted_qr(z)
    for k in range(15):
        left = found.r[k:, k:].square().sum(0).sqrt()
        assert float(left.max()) <= float(found.diagonal[k]) * (1 + 1e-9)


def test_blocks_give_the_pivots_and_the_matrix_of_all_rows() -> None:
    z = _random(900, 24, seed=3) * torch.logspace(0, -4, 24, dtype=torch.float64)
    blocks = Triangle(24)
    for part in z.split([1, 300, 7, 592]):
        blocks.add(part)
    assert blocks.rows == 900
    whole, found = pivoted_qr(z), pivoted_qr(blocks.r())
    assert torch.equal(whole.order, found.order)
    assert torch.allclose(whole.keep(15).matrix, found.keep(15).matrix, rtol=1e-8, atol=1e-10)
    assert whole.keep(15).error == pytest.approx(found.keep(15).error, rel=1e-9)


def test_blocks_of_fewer_rows_than_columns() -> None:
    z = _random(5, 9)
    blocks = Triangle(9)
    blocks.add(z.float())
    assert torch.equal(blocks.r(), z.float().double())


def test_rank_is_found_and_columns_behind_it_are_only_copied() -> None:
    z = _random(60, 10, rank=4)
    found = pivoted_qr(z)
    assert found.within(1e-10) == 4
    kept = found.keep(7)
    assert kept.error < 1e-10 * float(z.norm())
    assert kept.largest < 100, "a solve with rounding errors on the diagonal would blow up"
    assert torch.allclose(z[:, kept.kept] @ kept.matrix, z, atol=1e-10)


def test_dead_units_go_first() -> None:
    z = _random(50, 8)
    z[:, [2, 5]] = 0
    found = decompose(z, 6)
    assert found.kept.tolist() == [0, 1, 3, 4, 6, 7]
    assert found.error == 0
    assert not found.matrix[:, [2, 5]].any()


def test_all_units_dead() -> None:
    found = pivoted_qr(torch.zeros(20, 4))
    assert found.within(0.1) == 1
    kept = found.keep(2)
    assert kept.error == kept.relative == kept.score == 0
    assert kept.matrix.sum() == 2
    assert bool(torch.isfinite(kept.matrix).all())


def test_tolerance_takes_the_fewest_columns() -> None:
    z = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    found = pivoted_qr(z)
    assert [found.within(t) for t in (1.0, 0.5, 0.3, 0.13, 0.1, 0.0)] == [1, 1, 2, 3, 4, 4]
    assert found.score(2) == pytest.approx(0.25)
    assert found.score(4) == 0


def test_a_constant_gives_what_is_an_affine_function() -> None:
    z = _random(70, 5)
    z[:, 3] = 2 * z[:, 0] - z[:, 1] + 5
    found = decompose(z, 4, constant=True)
    assert found.constant is not None
    assert len(found.kept) == 4
    assert torch.allclose(z[:, found.kept] @ found.matrix + found.constant, z, atol=1e-12)
    assert found.error < 1e-12
    assert not found.constant[found.kept].any()
    assert decompose(z, 4).error > 1


def test_error_with_a_constant() -> None:
    z = _random(70, 9, seed=5) + 3
    found = decompose(z, 4, constant=True)
    assert found.constant is not None
    left = z - z[:, found.kept] @ found.matrix - found.constant
    assert float(left.norm()) == pytest.approx(found.error, rel=1e-10)
    assert found.error < decompose(z, 4).error
    centered = float((z - z.mean(0)).norm())
    assert found.relative == pytest.approx(found.error / centered, rel=1e-10)


def test_a_unit_that_never_changes_costs_nothing_with_a_constant() -> None:
    z = _random(30, 4)
    z[:, 2] = 7
    found = decompose(z, 3, constant=True)
    assert found.kept.tolist() == [0, 1, 3]
    assert found.error < 1e-12
    assert found.constant is not None
    assert float(found.constant[2]) == pytest.approx(7)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        decompose(torch.tensor([[float("nan"), 1.0]]), 1)
    with pytest.raises(ValueError, match="3 of 2 columns"):
        decompose(torch.eye(2), 3)
