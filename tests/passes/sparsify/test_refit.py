"""Refitting the weights that stay: the best for their mask, never worse, zeros untouched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.passes.sparsify.methods import LAYER_METHODS, Task
from planish.passes.sparsify.obs import refit
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.refit import refit_by_gradients
from planish.tools.bench.live_bytes import LiveBytes


def drawn(seed: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a mask and a positive definite H."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * inputs, inputs, generator=g, dtype=torch.float64)
    h = x.t() @ x / inputs + 0.1 * torch.eye(inputs, dtype=torch.float64)
    rows = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
    return rows, torch.rand(outputs, inputs, generator=g) > 0.5, h


def error(change: Tensor, h: Tensor) -> Tensor:
    return ((change @ h) * change).sum(1) / 2


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(2, 24))
def test_enough_steps_give_the_best_weights_for_the_mask(seed: int, outputs: int, n: int) -> None:
    rows, kept, h = drawn(seed, outputs, n)
    start = torch.where(kept, rows, 0)
    found = refit_by_gradients(rows, start, kept, h, steps=60)
    best = refit(rows, h, kept)
    assert torch.equal(found != 0, (found != 0) & kept)
    assert torch.allclose(error(found - rows, h), error(best - rows, h), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_no_row_gets_worse_and_more_steps_are_no_worse(steps: int) -> None:
    rows, kept, h = drawn(3, 40, 64)
    start = torch.where(kept, rows, 0)
    few, more = (refit_by_gradients(rows, start, kept, h, steps=s) for s in (steps, 4 * steps))
    assert bool((error(few - rows, h) < error(start - rows, h)).all())
    assert float(error(more - rows, h).sum()) < float(error(few - rows, h).sum())


def test_weights_that_are_the_best_already_stay_as_they_are() -> None:
    rows, kept, h = drawn(5, 6, 12)
    best = refit(rows, h, kept)
    again = refit_by_gradients(rows, best, kept, h, steps=10)
    assert torch.allclose(again, best, atol=1e-6)
    whole = torch.ones_like(kept)
    assert torch.equal(refit_by_gradients(rows, rows, whole, h, steps=5), rows)
    none = torch.zeros_like(kept)
    assert not refit_by_gradients(rows, rows * 0, none, h, steps=5).any()


def test_what_is_added_to_the_diagonal_needs_no_copy_with_it() -> None:
    rows, kept, h = drawn(11, 40, 64)
    start, asked = torch.where(kept, rows, 0), h.clone()
    found = refit_by_gradients(rows, start, kept, h, added=0.7, steps=20)
    whole = refit_by_gradients(rows, start, kept, h + 0.7 * torch.eye(64), steps=20)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(h, asked)


def test_a_wide_layer_is_pruned_and_refit_in_little_more_than_its_hessian() -> None:
    rows, _, h = drawn(13, 96, 256)  # as wide as the widest layer of SmolLM2, 576 x 1536
    task = Task(rows.float(), h, Pattern.parse("2:4"), 0, refit=3)
    with LiveBytes() as live:
        made = LAYER_METHODS["sparsegpt"](task)
        # U, a float32 copy of H and some of the rows (0.19 each); L, I and L^-1 before that.
        assert live.peak < 3.3 * h.nbytes
        assert live.now < 1.4 * h.nbytes  # U, and the rows
    assert made.rows.shape == rows.shape


def test_sparsegpt_is_refit_to_less_than_greedy_surgery_leaves() -> None:
    rows, _, h = drawn(7, 32, 64)
    pattern = Pattern.parse("2:4")
    losses = {}
    for name, score, steps in (
        ("sweep", "sparsegpt", 0),
        ("refit", "sparsegpt", 30),
        ("obc", "obc", 0),
    ):
        task = Task(rows.float(), h, pattern, 0, refit=steps)
        losses[name] = LAYER_METHODS[score](task).loss(task)  # type: ignore[index]  # one of a Literal
    assert losses["refit"] < 0.9 * losses["sweep"]
    assert losses["refit"] < 1.05 * losses["obc"]
