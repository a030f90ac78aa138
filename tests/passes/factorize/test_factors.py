"""Factors against known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planish.passes.factorize.factors import Moments, Task, solve


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(), dtype=torch.float64)


def _moments(x: Tensor, before: Tensor | None = None) -> Moments:
    """Of samples in rows."""
    n = len(x)
    if before is None:
        return Moments(x.t() @ x / n, x.mean(0), rows=n)
    return Moments(x.t() @ x / n, x.mean(0), before.t() @ x / n, before.mean(0), n)


def test_the_error_of_a_diagonal_is_its_tail() -> None:
    w = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    basis = solve(Task(w), "svd")
    made = basis.factors(3)
    error = torch.linalg.norm(w.double() - made.second @ made.first)
    assert float(error) == pytest.approx(5**0.5)
    assert basis.error(3) == pytest.approx((5 / 55) ** 0.5)
    assert made.shift is None


def test_full_rank_is_exact() -> None:
    w, x = _random(6, 9), _random(40, 9)
    for task, method in (
        (Task(w), "svd"),
        (Task(w, _moments(x)), "whitened"),
        (Task(w, fisher=torch.arange(6.0)), "fisher"),
    ):
        made = solve(task, method).factors(6)  # type: ignore[arg-type]  # a literal in a table
        torch.testing.assert_close(made.second @ made.first, w)


@pytest.mark.parametrize("center", [False, True])
def test_the_predicted_error_is_the_measured_one(center: bool) -> None:
    w, x = _random(7, 10), _random(50, 10) @ _random(10, 10) + 2
    basis = solve(Task(w, _moments(x), center=center), "whitened")
    for rank in (1, 3, 6):
        made = basis.factors(rank)
        shift = 0 if made.shift is None else made.shift
        got = x @ (made.second @ made.first).t() + shift
        measured = (x @ w.t() - got).square().sum().div(len(x)).sqrt()
        predicted = basis.spectrum[rank:].square().sum().sqrt()
        assert float(measured) == pytest.approx(float(predicted), rel=1e-10)


def test_whitened_is_the_best_and_centering_better_still() -> None:
    w, x = _random(8, 12), _random(60, 12) @ torch.diag(torch.arange(1.0, 13).double()) + 3

    def error(task: Task, method: str) -> float:
        made = solve(task, method).factors(3)  # type: ignore[arg-type]  # a literal
        shift = 0 if made.shift is None else made.shift
        return float((x @ w.t() - x @ (made.second @ made.first).t() - shift).square().sum())

    plain = error(Task(w), "svd")
    whitened = error(Task(w, _moments(x), center=False), "whitened")
    centered = error(Task(w, _moments(x)), "whitened")
    assert centered < whitened < plain


def test_a_dead_input_is_ignored() -> None:
    w, x = _random(4, 5), _random(30, 5)
    x[:, 2] = 0
    alive = [0, 1, 3, 4]
    made = solve(Task(w, _moments(x)), "whitened").factors(2)
    other = solve(Task(w[:, alive], _moments(x[:, alive])), "whitened").factors(2)
    torch.testing.assert_close((made.second @ made.first)[:, alive], other.second @ other.first)


def test_fewer_rows_than_columns_lose_nothing_on_those_rows() -> None:
    w, x = _random(9, 12), _random(4, 12)
    made = solve(Task(w, _moments(x), center=False), "whitened").factors(4)
    torch.testing.assert_close(x @ (made.second @ made.first).t(), x @ w.t())


def test_all_dead_inputs_give_zeros_and_the_bias() -> None:
    w = _random(3, 4)
    made = solve(Task(w, _moments(torch.ones(5, 4).double())), "whitened").factors(2)
    assert made.shift is not None
    torch.testing.assert_close(
        made.second @ (made.first @ torch.ones(4).double()) + made.shift, w.sum(1)
    )


def test_whitened_equals_the_cholesky_form() -> None:
    w, x = _random(6, 8), _random(40, 8)
    gram = x.t() @ x / len(x)
    factor = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(w @ factor, full_matrices=False)
    expected = u[:, :3] * s[:3] @ v[:3] @ torch.linalg.inv(factor)
    made = solve(Task(w, _moments(x), center=False), "whitened").factors(3)
    torch.testing.assert_close(made.second @ made.first, expected)


def test_fitting_to_what_is_read_now_beats_ignoring_it() -> None:
    w, before = _random(8, 10), _random(400, 10)
    now = before @ (torch.eye(10).double() + 0.4 * _random(10, 10)) + 0.3 * _random(400, 10)

    def error(moments: Moments) -> float:
        made = solve(Task(w, moments, damping=1e-9), "whitened").factors(4)
        assert made.shift is not None
        got = now @ (made.second @ made.first).t() + made.shift
        return float((before @ w.t() - got).square().sum())

    fitted, plain = error(_moments(now, before)), error(_moments(now))
    assert fitted < 0.9 * plain


def test_unchanged_inputs_need_no_fit() -> None:
    w, x = _random(5, 7), _random(50, 7)
    torch.testing.assert_close(
        solve(Task(w, _moments(x, x)), "whitened").target, w, rtol=1e-9, atol=1e-9
    )


def test_fisher_weighs_outputs() -> None:
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    made = solve(Task(w, fisher=torch.tensor([1.0, 1.0, 100.0])), "fisher").factors(1)
    product = made.second @ made.first
    assert float(product[2, 2]) == pytest.approx(1.0)  # 1 * 10 is more than 3 and 2
    assert float(product[0, 0]) == pytest.approx(0.0, abs=1e-12)


def test_an_output_without_gradient_is_not_divided_by_zero() -> None:
    made = solve(Task(_random(4, 4), fisher=torch.tensor([0.0, 1, 1, 1])), "fisher").factors(3)
    assert bool((made.second @ made.first).isfinite().all())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="not finite"):
        solve(Task(torch.tensor([[float("nan")]])), "svd")
    with pytest.raises(ValueError, match="needs inputs"):
        solve(Task(torch.ones(2, 2)), "whitened")
    with pytest.raises(ValueError, match="needs gradients"):
        solve(Task(torch.ones(2, 2)), "fisher")
    with pytest.raises(ValueError, match="rank is 3"):
        solve(Task(torch.ones(2, 2)), "svd").factors(3)


def test_a_layer_makes_up_for_what_its_sum_has_lost() -> None:
    w, x, lost = _random(5, 7), _random(60, 7) + 1, _random(5, 7) + 0.5
    drift = x @ lost.t() + 2
    n = len(x)
    moments = Moments(
        x.t() @ x / n, x.mean(0), x.t() @ x / n, x.mean(0), n, drift.t() @ x / n, drift.mean(0)
    )
    made = solve(Task(w, moments, damping=1e-12), "whitened").factors(5)
    assert made.shift is not None
    got = x @ (made.second @ made.first).t() + made.shift
    torch.testing.assert_close(got, x @ w.t() + drift, rtol=1e-6, atol=1e-6)
