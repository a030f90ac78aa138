"""absorb-bias: known answers, chains it takes and chains it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.equalize.absorb_bias import AbsorbBias, absorbed
from planish.passes.equalize.equalize_layers import EqualizeLayers
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.quantize import Quantize
from planish.passes.recipe import Recipe, resolve
from tests.support.check import check, refuses, run_checked

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HIGH = torch.tensor([0.0, 9.0, 40.0, -3.0])


def _net(*middle: nn.Module, second: nn.Module | None = None) -> nn.Module:
    """Two layers, the first with channels far above zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *middle, second or nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net.get_parameter("0.bias").copy_(HIGH)
    return net.eval()


def _context(module: nn.Module | Program, x: Tensor = X) -> PassContext:
    program = module if isinstance(module, Program) else capture(module.eval(), (x,))
    return PassContext(calibration=spool([(x,)], program))


def _value(program: Program, name: str) -> Tensor:
    value = program.constants[name]
    assert isinstance(value, Tensor)
    return value


# -- known answers --------------------------------------------------------------------------------


def test_three_deviations_below_the_mean_or_nothing() -> None:
    mean, deviation = torch.tensor([5.0, 2.0, -4.0]), torch.tensor([1.0, 1.0, 0.5])
    assert absorbed(mean, deviation).tolist() == [2.0, 0.0, 0.0]
    assert absorbed(mean, deviation, 1.0).tolist() == [4.0, 1.0, 0.0]


def test_two_channels_by_hand() -> None:
    """Values 9 and 11: mean 10, deviation 1, so that c = 7; the other channel lies around 0."""
    first, second = nn.Linear(1, 2), nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [1.0]]))
        first.bias.copy_(torch.tensor([10.0, 0.0]))
        second.weight.copy_(torch.tensor([[2.0, 5.0]]))
        second.bias.copy_(torch.tensor([0.5]))
    x = torch.tensor([[1.0], [-1.0]])
    module = nn.Sequential(first, nn.ReLU(), second)
    result = check(module, (x,), AbsorbBias(), changes=1, context=_context(module, x))
    assert _value(result.program, "0.bias").tolist() == [3.0, 0.0]
    assert _value(result.program, "2.bias").tolist() == [14.5]
    (out,) = run(result.program, (x,))
    assert out.tolist() == [[2 * 11 + 5 * 1 + 0.5], [2 * 9 + 0.5]]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_it_is_exact_where_values_stay_above(seed: int) -> None:
    """``relu(y) = relu(y - c) + c`` for y >= c: no values below, no difference."""
    generator = torch.Generator().manual_seed(seed)
    y, w = torch.rand(6, 50, generator=generator) + 4, torch.randn(3, 6, generator=generator)
    c = absorbed(y.mean(1), y.std(1, correction=0))
    assert bool((c > 0).all())
    assert bool((y >= c[:, None]).all())
    moved = w @ (y - c[:, None]).relu() + (w @ c)[:, None]
    torch.testing.assert_close(moved, w @ y.relu(), rtol=1e-4, atol=1e-4)


# -- fires ----------------------------------------------------------------------------------------


def test_high_channels_move_into_the_bias_behind() -> None:
    module = _net(nn.ReLU())
    result = check(
        module,
        (X,),
        AbsorbBias(),
        """
        program(%input: f32[4, 3, 8, 8])
          const @0.bias: f32[4]
          const @0.weight: f32[4, 3, 1, 1]
          const @2.bias: f32[2]
          const @2.weight: f32[2, 4, 3, 3]
          %0: f32[4, 4, 8, 8] = aten.conv2d(%input, @0.weight, @0.bias)
          %1: f32[4, 4, 8, 8] = aten.relu(%0)
          %2: f32[4, 2, 6, 6] = aten.conv2d(%1, @2.weight, @2.bias)
          return %2
        """,
        changes=1,
        context=_context(module),
    )
    moved = HIGH - _value(result.program, "0.bias")
    assert [bool(m > 0) for m in moved] == [False, True, True, False]
    (before,), (after,) = run(capture(module, (X,)), (X,)), run(result.program, (X,))
    assert float((after - before).norm() / before.norm()) < 1e-3
    assert "2 of 4 channels" in str(result.changes[0].detail)


@pytest.mark.parametrize(
    "second",
    [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(4, 2, 3, stride=2)],
)
def test_depthwise_and_layers_without_a_bias_take_it(second: nn.Module) -> None:
    module = _net(nn.LeakyReLU(0.1), second=second)
    result = check(module, (X,), AbsorbBias(), changes=1, context=_context(module))
    (before,), (after,) = run(capture(module, (X,)), (X,)), run(result.program, (X,))
    assert float((after - before).norm() / before.norm()) < 1e-3


# -- refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("middle", "second", "reason"),
    [
        ((nn.ReLU6(),), None, "absorbing would move the bound"),
        ((), None, "no relu follows it"),
        ((nn.ReLU(),), nn.Conv2d(4, 2, 3, padding=1), "zeros are padded"),
        ((nn.ReLU(),), nn.Conv2d(4, 2, 3, padding="same"), "zeros are padded"),
        ((nn.ReLU(), nn.ZeroPad2d(1)), None, "zeros are padded"),
        ((nn.SiLU(),), None, "does not pass aten.silu"),
    ],
)
def test_what_a_constant_does_not_pass_is_refused(
    middle: tuple[nn.Module, ...], second: nn.Module | None, reason: str
) -> None:
    module = _net(*middle, second=second)
    refuses(module, (X,), AbsorbBias(), reason, context=_context(module))


def test_channels_around_zero_and_no_calibration_are_refused() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    reason = "no channel stays 3 deviations above zero"
    refuses(module, (X,), AbsorbBias(), reason, context=_context(module))
    with pytest.raises(RequirementError):
        run_checked(capture(_net(nn.ReLU()), (X,)), AbsorbBias())


# -- neighbors ------------------------------------------------------------------------------------


def test_behind_equalizing_it_lowers_the_error_of_quantizing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).eval()
    with torch.no_grad():
        module.get_parameter("0.bias").add_(20)
        module.get_parameter("2.bias").add_(30)
    program = capture(module, (X,))
    (exact,) = run(program, (X,))
    errors = []
    for repairs in ((EqualizeLayers(),), (EqualizeLayers(), AbsorbBias())):
        recipe = Recipe((*repairs, Quantize()))
        done = run_pipeline(program, recipe, _context(program)).program
        errors.append(float((run(done, (X,))[0] - exact).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_a_second_run_absorbs_nothing_and_options_round_trip() -> None:
    program = capture(_net(nn.ReLU()), (X,))
    once = run_checked(program, AbsorbBias(), _context(program)).program
    again = run_checked(once, AbsorbBias(), _context(once))
    left = [abs(float(m)) for m in _value(once, "0.bias") - _value(again.program, "0.bias")]
    assert max(left) < 1e-3
    (parsed,) = resolve("absorb-bias{sigmas=2.0}").passes
    assert parsed == AbsorbBias(sigmas=2.0)
    with pytest.raises(ValueError, match="no bound below"):
        AbsorbBias(sigmas=-1)
