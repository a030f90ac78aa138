"""smooth-quant: known answers, folds and compensation, and what it is worth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import RequirementError
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.equalize._scales import candidates, outlier_scale, search, smooth_scale
from planish.passes.equalize.smooth_quant import SmoothQuant, smoothed
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe
from tests.support.check import check, refuses, run_checked


def _outliers(*shape: int, factor: float = 40.0) -> Tensor:
    """Normal values of which channel 1 is much larger."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    x[..., 1] *= factor
    return x


class PreNorm(nn.Module):
    """A norm with one loud gain, read by two linears and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        with torch.no_grad():
            self.norm.weight[1] = 50.0
        self.gate = nn.Linear(8, 4)
        self.up = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.gate(x) + self.up(x)


class PostNorm(PreNorm):
    """The norm's output is the residual as well."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.down(self.gate(x))


class Gelu(nn.Module):
    """What the second linear reads has no maker that a scale could move into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        with torch.no_grad():
            self.first.weight[1] *= 60

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Relu(Gelu):
    """A relu passes positive scales on."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Attention(nn.Module):
    """Two heads of four channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            self.v.weight[5] *= 60

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


def _captured(module: nn.Module, x: Tensor) -> tuple[Program, PassContext]:
    program = capture(module.eval(), (x,), {})
    return program, PassContext(calibration=spool([(x,)], program))


X = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(1))


# -- known answers --------------------------------------------------------------------------------


def test_the_example_of_two_channels() -> None:
    x = torch.tensor([[16.0, 1.0], [-3.0, 0.5]])
    w = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
    new_x, (new_w,), scale = smoothed(x, [w], 0.5)
    torch.testing.assert_close(scale, torch.tensor([4.0, 0.5]))
    torch.testing.assert_close(new_x.abs().amax(0), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(new_w.abs().amax(0), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(F.linear(new_x, new_w), F.linear(x, w), rtol=1e-6, atol=1e-6)


def test_alpha_one_makes_all_channels_equally_loud() -> None:
    x = _outliers(20, 6)
    new_x, _, _ = smoothed(x, [torch.randn(3, 6)], 1.0)
    torch.testing.assert_close(new_x.abs().amax(0), torch.ones(6))


def test_weights_that_share_the_input_take_part_by_their_maximum() -> None:
    x = torch.tensor([[16.0, 1.0]])
    parts = [torch.tensor([[1.0, 0.1]]), torch.tensor([[0.2, 4.0]])]
    _, _, scale = smoothed(x, parts, 0.5)
    torch.testing.assert_close(scale, torch.tensor([4.0, 0.5]))


def test_floors_keep_scales_positive_for_dead_channels() -> None:
    scale = smooth_scale(torch.zeros(3), torch.zeros(3), 0.5)
    assert 0 < float(scale.min()) <= float(scale.max()) < torch.inf
    quiet = dict(candidates(torch.tensor([0.0, 1, 1, 1]), torch.ones(4), [1.0], outliers=False))
    # A channel that calibration never stirred is not blown up by more than 20.
    assert 1 / float(quiet["alpha 1"][0]) <= 20.0


def test_outliers_alone_leave_all_other_columns_as_they_are() -> None:
    scale = outlier_scale(torch.tensor([1.0, 2.0, 3.0, 40.0, 2.0]), 0.75)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 1.0, 40 / 3, 1.0]))
    half = outlier_scale(torch.tensor([1.0, 2.0, 3.0, 12.0, 2.0]), 0.75, 0.5)
    torch.testing.assert_close(half[3], torch.tensor(2.0))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_the_product_stays_whatever_alpha_is(seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    new_x, (new_w,), _ = smoothed(x, [w], alpha)
    torch.testing.assert_close(F.linear(new_x, new_w), F.linear(x, w), rtol=1e-4, atol=1e-4)


def test_the_search_finds_what_an_outlier_costs_and_nothing_where_there_is_none() -> None:
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    loud = _outliers(200, 32)
    found = search(loud, loud.abs().amax(0), w, [0.0, 0.5, 1.0])
    assert found.gain_db > 10
    fixed = search(loud, loud.abs().amax(0), w, [0.5], outliers=False)
    assert found.sqnr_db >= fixed.sqnr_db
    even = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    assert search(even, even.abs().amax(0), w, [0.0, 0.5, 1.0]).gain_db < 2.0


# -- fires ----------------------------------------------------------------------------------------


def test_a_scale_moves_into_the_norm_before() -> None:
    _, context = _captured(PreNorm(), X)
    result = check(
        PreNorm(),
        (X,),
        SmoothQuant(min_gain_db=3),
        """
        program(%x: f32[4, 64, 8])
          const @gate.bias: f32[4]
          const @gate.weight: f32[4, 8]
          const @norm.bias: f32[8]
          const @norm.weight: f32[8]
          const @up.weight: f32[4, 8]
          %0: f32[4, 64, 8] = aten.layer_norm(%x, normalized_shape=[8], weight=@norm.weight, bias=@norm.bias, cudnn_enable=False)
          %1: f32[4, 64, 4] = aten.linear(%0, @gate.weight, @gate.bias)
          %2: f32[4, 64, 4] = aten.linear(%0, @up.weight)
          %3: f32[4, 64, 4] = aten.add.Tensor(%1, %2)
          return %3
        """,  # noqa: E501 - the program's own text
        changes=1,
        context=context,
    )
    gain = result.program.constants["norm.weight"]
    assert isinstance(gain, Tensor)
    assert float(gain.max()) < 25
    assert "folded into layer_norm" in result.changes[0].detail


def test_a_residual_gets_its_values_back_by_a_multiplication() -> None:
    _, context = _captured(PostNorm(), X)
    result = check(PostNorm(), (X,), SmoothQuant(where=Where(include=("gate",))), context=context)
    (restored,) = [n for n in result.program.operators if str(n.target) == "aten.mul.Tensor"]
    assert str(restored.args[0]) == "layer_norm"
    assert [str(user.target) for user in restored.users] == ["aten.add.Tensor"]
    assert "1 others multiplied back" in result.changes[0].detail


def test_without_a_maker_the_value_is_multiplied() -> None:
    _, context = _captured(Gelu(), X)
    result = check(Gelu(), (X,), SmoothQuant(min_gain_db=3), changes=1, context=context)
    (divided,) = [n for n in result.program.operators if str(n.target) == "aten.mul.Tensor"]
    assert str(divided.args[0]) == "gelu"
    assert "multiplied by itself" in result.changes[0].detail


@pytest.mark.parametrize(("module", "maker"), [(Relu, "linear"), (Attention, "linear_2")])
def test_scales_pass_through_a_relu_and_through_attention(
    module: type[nn.Module], maker: str
) -> None:
    _, context = _captured(module(), X)
    result = check(module(), (X,), SmoothQuant(min_gain_db=3), changes=1, context=context)
    assert f"folded into {maker}" in result.changes[0].detail
    assert not [n for n in result.program.operators if str(n.target) == "aten.mul.Tensor"]


# -- refuses --------------------------------------------------------------------------------------


def test_a_multiplication_is_refused_where_it_is_not_wanted() -> None:
    _, context = _captured(Gelu(), X)
    refuses(
        Gelu(), (X,), SmoothQuant(explicit=False), "a multiplication of its own", context=context
    )


def test_a_site_that_gains_too_little_is_refused() -> None:
    _, context = _captured(PreNorm(), X)
    refuses(PreNorm(), (X,), SmoothQuant(min_gain_db=90), "less than 90", context=context)


def test_a_weight_read_twice_is_refused() -> None:
    class Tied(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.norm(x)) + self.gate(x)

    _, context = _captured(Tied(), X)
    refuses(
        Tied(), (X,), SmoothQuant(min_gain_db=3), "2 operators read its weight", context=context
    )


def test_calibration_is_required_and_options_are_checked() -> None:
    program = capture(PreNorm().eval(), (X,), {})
    with pytest.raises(RequirementError, match="smooth-quant requires calibrated"):
        run_pipeline(program, Recipe((SmoothQuant(min_gain_db=3),)))
    with pytest.raises(ValueError, match="not within 0 and 1"):
        SmoothQuant(alpha=1.5)


# -- neighbors ------------------------------------------------------------------------------------


def test_other_readers_of_a_weight_and_options_survive() -> None:
    recipe = "smooth-quant{alpha=0.7,min_gain_db=2,where={include=[gate]}}"
    assert str(Recipe.parse(recipe)) == recipe.replace("min_gain_db=2,", "min_gain_db=2.0,")
    program, context = _captured(PreNorm(), X)
    only = run_checked(program, SmoothQuant(where=Where(include=("gate",))), context)
    # `up` is no chosen product, so it is compensated like any other reader.
    assert torch.equal(only.program.constants["up.weight"], program.constants["up.weight"])  # type: ignore[arg-type]  # a tensor, no module


def test_padding_has_no_part_in_the_scale() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = PreNorm()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x) * mask.unsqueeze(-1)

    mask = torch.ones(4, 64)
    mask[:, 3:] = 0
    loud = X.clone()
    loud[:, 3:, 4] = 1e4
    program = capture(Masked().eval(), (X, mask), {})
    one, other = (
        SmoothQuant(padding_mask="mask").run(
            program.clone(), PassContext(calibration=spool([(x, mask)], program))
        )
        for x in (X, loud)
    )
    assert text(one.program, values=True) == text(other.program, values=True)


class Square(Gelu):
    """What scales its operand by s scales a square by s * s."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.second.weight[:, 1] /= 3600

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y * y)


class Across(nn.Module):
    """The channels of the linear are as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(x).transpose(0, 1))


def test_a_square_takes_no_scale_of_what_it_squares() -> None:
    x = _outliers(6, 8)
    program, context = _captured(Square(), x)
    result = check(program, (x,), SmoothQuant(), changes=1, context=context)
    assert "multiplied by itself" in result.changes[0].detail


def test_channels_as_many_as_samples_are_no_samples() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x[2] *= 300
    program, context = _captured(Across(), x)
    check(program, (x,), SmoothQuant(alpha=0.5), changes=1, context=context)
