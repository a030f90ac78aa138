"""split-outliers: the known answer, what quantize leaves in float, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.restore import quantized_operators
from planish.passes.recipe import Recipe
from planish.passes.rounding.split_outliers import SplitOutliers, outlier_features, split_product
from tests.support.check import check, refuses

X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
X[..., 3] *= 30


class Two(nn.Module):
    """Two linears on one value, which is no input of the program."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 4)
        self.b = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x / 60) * 60
        return self.a(x) + self.b(x)


def _context(module: nn.Module) -> PassContext:
    return PassContext(calibration=spool([(X,)], capture(module.eval(), (X,), {})))


def test_the_example_keeps_ten_in_float_and_leaves_a_half() -> None:
    x, weight = torch.tensor([[10.0, 0.5]]), torch.tensor([[1.0, 1.0]])
    features = outlier_features(x.abs().amax(0), 6.0)
    assert features.tolist() == [0]
    quiet, kept, side = split_product(x, weight, features)
    assert quiet.tolist() == [[0.0, 0.5]]
    assert kept.tolist() == [[0.0, 1.0]]
    assert side.tolist() == [[10.0]]
    assert (F.linear(quiet, kept) + side).tolist() == [[10.5]]


def test_a_feature_that_reaches_the_threshold_is_an_outlier() -> None:
    assert outlier_features(torch.tensor([5.9, 6.0, 6.1, 0.0]), 6.0).tolist() == [1, 2]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_both_parts_together_are_the_product(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, 3, 6, generator=generator), torch.randn(5, 6, generator=generator)
    quiet, kept, side = split_product(x, w, torch.randperm(6, generator=generator)[:count])
    torch.testing.assert_close(F.linear(quiet, kept) + side, F.linear(x, w), rtol=1e-4, atol=1e-4)


def test_products_on_one_value_share_its_loud_features() -> None:
    context = _context(Two())
    result = check(Two(), (X,), SplitOutliers(), changes=1, context=context)
    assert result.changes[0].detail == "features 3 of mul in float"
    targets = [str(n.target) for n in result.program.operators]
    assert targets.count("aten.index_select.default") == 1
    assert targets.count("aten.sum.dim_IntList") == 2
    weight = result.program.constants["a.weight"]
    assert isinstance(weight, Tensor)
    assert float(weight[:, 3].abs().max()) == 0.0


def test_quantize_leaves_the_side_in_float_and_comes_out_nearer() -> None:
    program, context = capture(Two().eval(), (X,), {}), _context(Two())
    split = SplitOutliers().run(program.clone(), context).program
    reference, errors = program(X), []
    for start in (program, split):
        quantized = Quantize().run(start.clone(), context).program
        assert [n.name for n in quantized_operators(quantized)] == ["linear", "linear_1"]
        errors.append(float((quantized(X) - reference).norm()))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(
    ("pass_", "reason"),
    [
        (SplitOutliers(threshold=100.0), "none of its features reaches 100"),
        (SplitOutliers(threshold=0.5, max_features=2), "8 of its features are outliers, over 2"),
    ],
)
def test_too_few_and_too_many_outliers_are_refused(pass_: SplitOutliers, reason: str) -> None:
    refuses(Two(), (X,), pass_, reason, context=_context(Two()))


def test_options_are_checked_and_round_trip() -> None:
    text = "split-outliers{threshold=4.0,max_features=3}"
    assert str(Recipe.parse(text)) == text
    with pytest.raises(ValueError, match="threshold is positive"):
        SplitOutliers(threshold=0.0)
