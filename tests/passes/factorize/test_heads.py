"""Products of attention heads at a lower rank: the mathematics, then whole programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import NothingToDoError
from planish.ir.execute import run
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.factorize.factorize import Factorize
from planish.passes.factorize.heads import factor_heads
from planish.passes.factorize.products import (
    Projections,
    Seen,
    bias_of_mean,
    refitted,
    turn_scores,
    turn_values,
    turned,
)
from planish.passes.quantize.where import Where


def _double(*shape: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made, dtype=torch.float64)


def _seen(x: Tensor) -> Seen:
    return Seen(x.t() @ x / len(x), x.mean(0))


def _scores(p: Projections, x: Tensor, y: Tensor) -> Tensor:
    """[query heads, queries, keys]."""
    q = torch.einsum("nhd,td->nth", p.queries, x) + p.query_bias[:, None]
    return q @ (y @ p.key.t()).t()


def _inputs(rows: int = 300, width: int = 12, seed: int = 5) -> Tensor:
    return _double(rows, width, seed=seed) @ _double(width, width, seed=9) + 0.7


class TestScores:
    given = Projections(_double(2, 6, 12, seed=1), _double(2, 6, seed=2), _double(6, 12, seed=3))

    @pytest.mark.parametrize("calibrated", [False, True])
    def test_full_rank_is_exact(self, calibrated: bool) -> None:
        x = _inputs()
        seen = _seen(x) if calibrated else None
        new, turn = turn_scores(self.given, 6, seen, seen)
        torch.testing.assert_close(_scores(new, x, x), _scores(self.given, x, x))
        assert turn.error < 1e-12

    def test_known_rank_is_found_and_exact(self) -> None:
        # the key has 2 dimensions that differ; 4 of its 6 rows repeat them
        key = _double(6, 2, seed=4) @ _double(2, 12, seed=3)
        given = Projections(self.given.queries, self.given.query_bias, key)
        new, turn = turn_scores(given, 2, None, None)
        x = _inputs()
        torch.testing.assert_close(_scores(new, x, x), _scores(given, x, x))
        assert float(turn.spectrum[2]) < 1e-9 * float(turn.spectrum[0])

    def test_predicted_error_is_the_measured_one(self) -> None:
        x = _inputs()
        new, turn = turn_scores(self.given, 3, _seen(x), _seen(x), damping=0)
        centered = x - x.mean(0)
        wrong = _scores(new, x, centered) - _scores(self.given, x, centered)
        whole = _scores(self.given, x, centered)
        assert turn.error == pytest.approx(float(wrong.norm() / whole.norm()), rel=1e-9)

    def test_plain_error_is_that_of_the_product(self) -> None:
        new, turn = turn_scores(self.given, 3, None, None)

        def product(p: Projections) -> Tensor:
            wide = torch.cat([p.queries, p.query_bias[..., None]], 2)
            return torch.cat([a.t() @ p.key for a in wide])

        exact = product(self.given)
        best = torch.linalg.svdvals(exact)[3:].norm() / exact.norm()
        assert turn.error == pytest.approx(float(best), rel=1e-9)
        assert float((product(new) - exact).norm() / exact.norm()) == pytest.approx(float(best))

    def test_calibration_beats_plain_on_what_is_read(self) -> None:
        x = _inputs(width=12) * torch.logspace(0, -3, 12, dtype=torch.float64)
        exact = _scores(self.given, x, x - x.mean(0))

        def wrong(seen: Seen | None) -> float:
            new, _ = turn_scores(self.given, 3, seen, seen)
            return float((_scores(new, x, x - x.mean(0)) - exact).norm())

        assert wrong(_seen(x)) < 0.9 * wrong(None)

    def test_key_bias_does_not_count(self) -> None:
        x, bias = _inputs(20), _double(6, seed=8)
        q = torch.einsum("nhd,td->nth", self.given.queries, x)
        k = x @ self.given.key.t()
        torch.testing.assert_close((q @ k.t()).softmax(-1), (q @ (k + bias).t()).softmax(-1))

    def test_both_sides_are_balanced(self) -> None:
        x = _inputs()
        new, turn = turn_scores(self.given, 4, _seen(x), _seen(x), damping=0)
        k = (x - x.mean(0)) @ new.key.t()
        torch.testing.assert_close(k.t() @ k / len(x), torch.diag(turn.spectrum[:4]))


class TestValues:
    value, bias = _double(6, 12, seed=1), _double(6, seed=2)
    outputs = (_double(10, 6, seed=3), _double(10, 6, seed=4))

    @pytest.mark.parametrize("calibrated", [False, True])
    def test_full_rank_is_exact(self, calibrated: bool) -> None:
        y = _inputs() @ self.value.t()
        new, turn = turn_values(self.value, self.outputs, 6, y.t().cov() if calibrated else None)
        for o in self.outputs:
            torch.testing.assert_close((o @ turn.left.t()) @ new, o @ self.value)

    def test_predicted_error_is_the_measured_one(self) -> None:
        z = _inputs() @ self.value.t()
        z = z - z.mean(0)
        _, turn = turn_values(self.value, self.outputs, 3, z.t() @ z / len(z), damping=0)
        both = torch.cat(self.outputs)
        product = both @ turn.left.t() @ turn.right
        wrong, whole = z @ (product - both).t(), z @ both.t()
        assert turn.error == pytest.approx(float(wrong.norm() / whole.norm()), rel=1e-9)

    def test_value_bias_folds_exactly(self) -> None:
        y, o = _inputs(30), self.outputs[0]
        weights = F.softmax(_double(30, 30, seed=7), -1)
        before = (weights @ (y @ self.value.t() + self.bias)) @ o.t()
        new, turn = turn_values(self.value, [o], 6, None)
        changed = o @ turn.left.t()
        gained = bias_of_mean(o, changed @ turn.right, self.bias, self.bias)
        after = (weights @ (y @ new.t())) @ changed.t() + gained
        torch.testing.assert_close(after, before)

    def test_the_mean_of_the_output_stays(self) -> None:
        z, o = _inputs() @ self.value.t() + self.bias, self.outputs[0]
        _, turn = turn_values(self.value, [o], 2, z.t().cov())
        product = o @ turn.left.t() @ turn.right
        gained = bias_of_mean(o, product, z.mean(0), self.bias)
        after = (z - self.bias) @ product.t() + gained
        torch.testing.assert_close(after.mean(0), (z @ o.t()).mean(0))

    def test_refit_is_never_worse_and_exact_at_full_rank(self) -> None:
        mixed = _double(400, 12, seed=3) @ _double(12, 12, seed=6)  # two heads of 6, correlated
        z, o = mixed - mixed.mean(0), torch.cat(self.outputs, 1)
        s = z.t() @ z / len(z)

        def pieces(rank: int) -> tuple[Tensor, Tensor]:
            turns = [
                turn_values(self.value, [o[:, i : i + 6]], rank, s[i : i + 6, i : i + 6])[1]
                for i in (0, 6)
            ]
            d = torch.block_diag(*[t.right for t in turns])
            return d, o @ torch.block_diag(*[t.left for t in turns]).t()

        d, alone = pieces(6)
        torch.testing.assert_close(refitted(o, d, s) @ d, o)
        d, alone = pieces(3)
        exact = z @ o.t()
        fitted = refitted(o, d, s, damping=0)
        assert (z @ (fitted @ d).t() - exact).norm() < 0.99 * (z @ (alone @ d).t() - exact).norm()


class TestBadInput:
    def test_dead_heads_give_zeros(self) -> None:
        turn = turned([torch.zeros(4, 5)], _double(4, 5), 2)
        assert not turn.left.any()
        assert not turn.right.any()
        assert turn.error == 0

    @pytest.mark.parametrize("rank", [0, 5])
    def test_rank_out_of_bounds(self, rank: int) -> None:
        with pytest.raises(ValueError, match=f"rank is {rank}, not between 1 and 4"):
            turned([_double(4, 5)], _double(4, 5), rank)

    def test_weights_that_are_not_finite(self) -> None:
        with pytest.raises(ValueError, match="not finite"):
            turned([_double(4, 4)], torch.full((4, 4), torch.nan), 2)


# How large the features of what programs read are.
FEATURES = torch.logspace(0, -2, 16)


class Attention(nn.Module):
    """Attention with grouped key heads, whose query heads are 8 wide."""

    def __init__(self, heads: int = 4, shared: int = 2, *, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.query = nn.Linear(16, heads * 8, bias=bias)
        self.key = nn.Linear(16, shared * 8, bias=bias)
        self.value = nn.Linear(16, shared * 8, bias=bias)
        self.output = nn.Linear(heads * 8, 16, bias=bias)

    def between(self, x: Tensor) -> Tensor:
        """What stands between a projection and the attention."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 16], likewise."""
        batch, tokens, _ = x.shape
        q, k, v = (
            linear(x).view(batch, tokens, n, 8).transpose(1, 2)
            for linear, n in (
                (self.query, self.heads),
                (self.key, self.shared),
                (self.value, self.shared),
            )
        )
        y = F.scaled_dot_product_attention(
            self.between(q), self.between(k), v, enable_gqa=self.heads != self.shared
        )
        result: Tensor = self.output(y.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class Rotary(Attention):
    """Queries and keys are scaled by their position."""

    def between(self, x: Tensor) -> Tensor:
        """As rotary positions do, in one operator."""
        return x * torch.linspace(0.5, 1, 8)


class Fused(nn.Module):
    """One weight for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.output = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 16], likewise."""
        parts = self.qkv(x).split(16, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return result


def thin(model: Attention, rank: int) -> Attention:
    """Rows of the keys and values of a head repeat each other but for so many dimensions."""
    with torch.no_grad():
        for linear in (model.key, model.value):
            heads = linear.weight.unflatten(0, (-1, 8))
            mixed = torch.randn(len(heads), 8, rank) @ heads[:, :rank]
            linear.weight.copy_(mixed.flatten(0, 1))
    return model


def factored(
    model: nn.Module, calibrated: bool, keep: float = 0.5, multiple: int = 4
) -> tuple[Program, Program, list[str], list[Refusal]]:
    batches = [(torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(i)),)
               for i in range(8)]  # fmt: skip
    batches = [(x * FEATURES,) for (x,) in batches]
    before = capture(model.eval(), batches[0])
    program = before.clone()
    rewriter = Rewriter(program, "factorize")
    context = PassContext(calibration=spool(batches, program) if calibrated else None)
    names, refusals = factor_heads(
        rewriter, context, keep=keep, multiple=multiple, calibrated=calibrated, where=Where()
    )
    return before, rewriter.finish(), names, refusals


class TestPrograms:
    @pytest.mark.parametrize("calibrated", [False, True])
    @pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (4, 1)])
    @pytest.mark.parametrize("bias", [False, True])
    def test_known_rank_is_exact(
        self, heads: int, shared: int, bias: bool, calibrated: bool
    ) -> None:
        torch.manual_seed(0)
        model = thin(Attention(heads, shared, bias=bias), 4)
        before, after, names, refusals = factored(model, calibrated)
        assert not refusals
        assert len(names) == 4
        assert after.constants["query.weight"].shape == (heads * 4, 16)
        assert after.constants["value.weight"].shape == (shared * 4, 16)
        assert after.constants["output.weight"].shape == (16, heads * 4)
        x = (torch.randn(3, 10, 16) * FEATURES,)
        torch.testing.assert_close(run(after, x)[0], run(before, x)[0], atol=1e-4, rtol=1e-4)

    def test_scale_stays_that_of_the_width_before(self) -> None:
        _, after, _, _ = factored(thin(Attention(2, 2), 4), False)
        (node,) = [n for n in after.operators if "scaled_dot_product" in n.name]
        assert node.kwargs["scale"] == pytest.approx(8**-0.5)

    def test_calibration_loses_less(self) -> None:
        torch.manual_seed(0)
        model = Attention(2, 2)
        x = (torch.randn(3, 10, 16) * FEATURES,)

        def wrong(calibrated: bool) -> float:
            before, after, _, _ = factored(model, calibrated)
            return float((run(after, x)[0] - run(before, x)[0]).norm())

        assert wrong(True) < wrong(False)

    def test_rotary_positions_are_refused_but_values_are_not(self) -> None:
        _, after, names, refusals = factored(Rotary(2, 2), False)
        assert names == ["value.weight", "output.weight"]
        (refusal,) = refusals
        assert "aten.mul.Tensor stands between the query's projection" in refusal.reason
        assert after.constants["query.weight"].shape == (16, 16)

    def test_one_weight_for_all_is_refused(self) -> None:
        before, after, names, refusals = factored(Fused(), False)
        assert not names
        assert len(refusals) == 2
        assert all("fused with" in r.reason for r in refusals)
        assert len(list(after.operators)) == len(list(before.operators))

    def test_a_share_is_never_exceeded(self) -> None:
        for keep, multiple, rank in ((0.5, 8, 4), (0.9, 4, 4), (0.2, 4, 1), (0.8, 1, 6)):
            _, after, names, refusals = factored(Attention(2, 2), False, keep, multiple)
            assert (len(names), refusals) == (4, [])
            assert after.constants["key.weight"].shape == (2 * rank, 16)


class TestPass:
    def test_heads_of_the_pass(self) -> None:
        torch.manual_seed(0)
        model = thin(Attention(2, 2), 4).eval()
        x = (torch.randn(3, 10, 16) * FEATURES,)
        before = capture(model, x)
        found = Factorize(method="svd", keep=0.5, rank_multiple=4, heads=True).run(
            before.clone(), PassContext()
        )
        constants = found.program.constants
        assert constants["query.weight"].shape == (8, 16)  # and not factored once more
        assert constants["output.weight"].shape == (16, 8)
        assert not found.refusals
        assert len(found.changes) == 4  # turned and cut, twice
        torch.testing.assert_close(
            run(found.program, x)[0], run(before, x)[0], atol=1e-4, rtol=1e-4
        )

    @pytest.mark.parametrize("options", [{"method": "fisher"}, {"rule": "macs"}])
    def test_heads_take_a_plain_share(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="heads=true takes"):
            Factorize(heads=True, **options)

    def test_heads_alone(self) -> None:
        torch.manual_seed(0)
        before = capture(thin(Attention(2, 2), 4).eval(), (torch.randn(3, 10, 16),))
        where = Where(include=("aten.scaled_dot_product_attention",))
        found = Factorize(method="svd", rank_multiple=4, heads=True, where=where).run(
            before.clone(), PassContext()
        )
        assert found.program.constants["key.weight"].shape == (8, 16)
        with pytest.raises(NothingToDoError):
            Factorize(method="svd", rank_multiple=4, where=where).run(before.clone(), PassContext())
