"""Scales of the units that stay, by least squares."""

from __future__ import annotations

import pytest
import torch

from planish.passes.prune.tuning import Moments, normal_equations, scales


def _one_head() -> tuple[torch.Tensor, torch.Tensor]:
    """Two identical heads of which one stays: it gives a, and 2 a were given."""
    a = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)  # one token, three features
    weight, x = a.T.clone(), torch.ones(1, 1, dtype=torch.float64)
    moments = Moments.of(x, 2 * a - a)
    return normal_equations(moments, weight, torch.tensor([[0]]))


def test_a_twin_takes_over() -> None:
    square, right = _one_head()
    found = scales(square, right)
    assert found is not None
    assert found.tolist() == pytest.approx([2.0], abs=1e-12)


def test_damping_of_the_public_code() -> None:
    """Theirs, 1 on the squared normal equations, is a ridge of 1 / 14 here."""
    square, right = _one_head()
    found = scales(square, right, ridge=1 / 14)
    assert found is not None
    assert float(found) == pytest.approx(1.994924, abs=1e-6)


def test_nothing_lacking_gives_ones_exactly() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    moments = Moments.of(x, torch.zeros(20, 4))
    square, right = normal_equations(moments, torch.randn(4, 6), torch.arange(6).reshape(3, 2))
    found = scales(square, right, 0.1)
    assert found is not None
    assert torch.equal(found, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("each", [1, 2])
def test_the_tall_matrix_is_not_needed(each: int) -> None:
    generator = torch.Generator().manual_seed(each)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w, lacking = draw(11, 3 * each), draw(5, 3 * each), draw(11, 5)
    columns = torch.arange(3 * each).reshape(3, each)
    tall = torch.stack([(x[:, c] @ w[:, c].T).flatten() for c in columns], 1)
    square, right = normal_equations(Moments.of(x, lacking), w, columns)
    assert torch.allclose(square, tall.T @ tall, atol=1e-13, rtol=1e-13)
    assert torch.allclose(right, tall.T @ lacking.flatten(), atol=1e-13, rtol=1e-13)
    found = scales(square, right)
    assert found is not None
    best = 1 + torch.linalg.lstsq(tall, lacking.flatten()).solution
    assert torch.allclose(found, best)


def test_moments_of_batches_add_up() -> None:
    x, lacking = torch.randn(8, 3), torch.randn(8, 2)
    whole = Moments.of(x, lacking)
    parts = Moments.of(x[:5], lacking[:5]) + Moments.of(x[5:], lacking[5:])
    assert torch.allclose(whole.inputs, parts.inputs, atol=1e-5)
    assert torch.allclose(whole.cross, parts.cross, atol=1e-5)


def test_scales_that_explode_are_not_trusted() -> None:
    near = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-9]], dtype=torch.float64)
    right = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert scales(near, right) is None
    damped = scales(near, right, ridge=1.0)
    assert damped is not None
    assert float(damped.abs().max()) <= 10


def test_a_singular_matrix_is_not_trusted() -> None:
    assert scales(torch.zeros(2, 2).double(), torch.ones(2).double()) is None
    assert scales(torch.eye(2).double(), torch.tensor([1.0, torch.nan])) is None
