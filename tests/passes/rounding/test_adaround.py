"""adaround: known answers, what it never does worse, and its neighbors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import PassError
from planish.ir.quantscheme import QuantScheme
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.weights import quantize_weight
from planish.passes.recipe import Recipe
from planish.passes.rounding.adaround import AdaRound, adaround
from planish.passes.rounding.learned import (
    Learning,
    inverse_rectified_sigmoid,
    learn_rounding,
    output_error,
    rectified_sigmoid,
    regularizer_slope,
)
from tests.support.check import check, unchanged

CHANNELS = QuantScheme(dtype="int8", granularity="channel", axis=0, narrow=True)


def _grid(rows: list[list[float]], gram: list[list[float]], **learning: int) -> Tensor:
    steps, ones = torch.tensor([rows]), torch.ones(1, len(rows), len(rows[0]))
    how = Learning(**{"iterations": 100, "sweeps": 2, **learning})
    return learn_rounding(steps, torch.tensor([gram]), ones, (-8, 7), how)[0]


# -- known answers --------------------------------------------------------------------------------


def test_correlated_inputs_share_one_rounding_up() -> None:
    # To the nearest both go down: error .96. One up and one down: .56.
    h = [[2.0, 1.0], [1.0, 2.0]]
    found = _grid([[0.4, 0.4]], h)
    assert sorted(found[0].tolist()) == [0.0, 1.0]
    difference = found - 0.4
    torch.testing.assert_close(output_error(difference[None], torch.tensor([h])).item(), 0.56)


@pytest.mark.parametrize("how", [{"sweeps": 0}, {"iterations": 0}])
def test_gradient_descent_and_coordinate_descent_each_find_better(how: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 16, generator=generator) * 3
    x = torch.randn(40, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    h = x.T @ x
    found = _grid(rows.tolist(), h.tolist(), **how)
    errors = [
        float(output_error((q - rows)[None], h[None]).sum())
        for q in (found, rows.round().clamp(-8, 7))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_with_inputs_that_have_nothing_in_common_the_nearest_is_best() -> None:
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 3
    found = learn_rounding(
        rows[None], torch.eye(6)[None], torch.ones(1, 5, 6), (-127, 127), Learning()
    )
    assert torch.equal(found[0], rows.round())


def test_the_rectified_sigmoid_and_its_regularizer() -> None:
    torch.testing.assert_close(
        rectified_sigmoid(torch.tensor([0.0, 9.0, -9.0])).tolist(), [0.5, 1.0, 0.0]
    )
    h = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)
    # 1 - |2h - 1|^2 falls from the middle to both ends, by 4 (1 - 2h)
    torch.testing.assert_close(regularizer_slope(h, 2.0), 4 * (1 - 2 * h))


def test_integers_stay_within_their_bounds() -> None:
    found = _grid([[7.4, 9.0], [-8.6, -3.2]], [[1.0, 0.9], [0.9, 1.0]])
    assert int(found.max()) <= 7
    assert int(found.min()) >= -8


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 500), st.sampled_from([1, 3]), st.sampled_from(["int8", "int4"]))
def test_the_outputs_are_never_worse_than_to_the_nearest(
    seed: int, groups: int, dtype: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 9, generator=generator)
    x = torch.randn(groups, 20, 9, generator=generator) + 1
    h = (x.transpose(1, 2) @ x).double()
    scheme = QuantScheme(dtype=dtype, granularity="channel", axis=0)  # type: ignore[arg-type]  # one of a Literal
    codes, gain = adaround(rows, h, scheme, Learning(iterations=30), damping=0.0)
    nearest = quantize_weight(rows, scheme, search=dtype == "int4")
    errors = [
        output_error((c.real() - rows).unflatten(0, (groups, -1)).double(), h).sum()
        for c in (codes, nearest)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert gain >= -1e-4


def test_groups_are_solved_each_by_its_own_inputs() -> None:
    rows, h = torch.tensor([[0.4, 0.45], [0.4, 0.45]]), torch.zeros(2, 2, 2)
    h[0], h[1] = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2)
    found = learn_rounding(rows[:, None], h, torch.ones(2, 1, 2), (-8, 7))
    assert float(found[0].sum()) == 1.0
    assert float(found[1].sum()) == 0.0


# -- fires ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A depthwise convolution, a pointwise one, and a linear."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.point(torch.relu(self.deep(x)))).mean((2, 3)))


X = torch.rand(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5


def _context(module: nn.Module, x: Tensor) -> PassContext:
    return PassContext(calibration=spool([(x,), (x.flip(0),)], capture(module.eval(), (x,), {})))


def test_all_layers_become_codes_that_quantize_leaves_alone() -> None:
    context = _context(Net(), X)
    result = check(Net(), (X,), AdaRound(dtype="int4"), changes=3, context=context)
    assert all("dB learned" in change.detail for change in result.changes)
    codes = {n: t for n, t in result.program.constants.items() if n.endswith(".codes")}
    assert sorted(codes) == ["deep.codes", "head.codes", "point.codes"]
    quantized = Quantize().run(result.program.clone(), context).program
    for name, value in codes.items():
        assert torch.equal(quantized.constants[name], value)  # type: ignore[arg-type]  # a tensor, no module


def test_it_is_nearer_to_the_outputs_than_the_nearest() -> None:
    errors = {"learned": 0.0, "nearest": 0.0}
    for seed in range(4):
        program = capture(Net(seed).eval(), (X,), {})
        context = PassContext(calibration=spool([(X,), (X.flip(0),)], program))
        reference = program(X)
        for name, pass_ in (
            ("learned", AdaRound(dtype="int4")),
            ("nearest", Quantize(mode="weight", weights="int4", weight_range="mse")),
        ):
            done = pass_.run(program.clone(), context).program
            errors[name] += float((done(X) - reference).square().sum())
    assert errors["learned"] < 0.5 * errors["nearest"]


# -- refuses, neighbors ---------------------------------------------------------------------------


def test_without_weights_it_has_no_effect_and_says_so() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    context = _context(Sum(), X)
    with pytest.raises(PassError, match="found no weight"):
        AdaRound().run(capture(Sum().eval(), (X,), {}), context)
    only_linear = check(Net(), (X,), AdaRound(convolutions=False), changes=1, context=context)
    assert "head" in only_linear.changes[0].detail
    unchanged(only_linear.program, (X,), AdaRound(convolutions=False), context=context)


def test_options_are_checked_and_round_trip() -> None:
    text = "adaround{dtype=int4,iterations=10,where={include=[head]}}"
    assert str(Recipe.parse(text)) == text
    with pytest.raises(ValueError, match="one of them is not 0"):
        AdaRound(iterations=0, sweeps=0)
