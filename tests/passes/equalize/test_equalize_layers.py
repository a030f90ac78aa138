"""equalize-layers: known answers, chains it takes and chains it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.passes.equalize.equalize_layers import EqualizeLayers, equalized, equalizing_scale
from planish.passes.recipe import Recipe
from tests.support.check import check, refuses

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _wild(module: nn.Module) -> nn.Module:
    """Give the output channels of every layer ranges of their own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                factor = 10 ** (2 * torch.rand(len(layer.weight), generator=generator) - 1)
                layer.weight *= factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
    return module.eval()


def _stack(activation: type[nn.Module]) -> nn.Module:
    """Pointwise, depthwise with padding, pointwise."""
    torch.manual_seed(0)
    return _wild(
        nn.Sequential(
            nn.Conv2d(3, 6, 1),
            activation(),
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(6, 6, 3, groups=6, stride=2),
            activation(),
            nn.Conv2d(6, 4, 1, bias=False),
        )
    )


def _spread(program: Program, first: str, second: str, axis: int) -> float:
    """The largest ratio of the two ranges of a channel."""
    w1, w2 = program.constants[first], program.constants[second]
    assert isinstance(w1, Tensor)
    assert isinstance(w2, Tensor)
    r1, r2 = w1.flatten(1).abs().amax(1), w2.transpose(0, axis).flatten(1).abs().amax(1)
    return float((r1 / r2).max() / (r1 / r2).min())


# -- known answers --------------------------------------------------------------------------------


def test_both_ranges_become_their_geometric_mean() -> None:
    w1, w2 = torch.tensor([[8.0, -2.0], [0.5, 0.25]]), torch.tensor([[2.0, -8.0], [1.0, 4.0]])
    new1, new2, scale = equalized(w1, w2)
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(new1.abs().amax(1), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(new2.abs().amax(0), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(new2 @ new1, w2 @ w1)


def test_dead_channels_keep_a_scale_of_one() -> None:
    scale = equalizing_scale(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, 4.0]))
    assert scale.tolist() == [1.0, 1.0, 0.5]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_relu_lets_every_scale_through(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(5, 4, generator=generator), torch.randn(3, 5, generator=generator)
    x = torch.randn(4, 7, generator=generator)
    new1, new2, _ = equalized(w1, w2)
    torch.testing.assert_close(new2 @ (new1 @ x).relu(), w2 @ (w1 @ x).relu(), rtol=1e-4, atol=1e-4)


# -- fires ----------------------------------------------------------------------------------------


def test_a_chain_with_a_depthwise_middle_is_balanced_throughout() -> None:
    module = _stack(nn.ReLU)
    before = capture(module, (X,), {})
    assert _spread(before, "0.weight", "3.weight", 0) > 5
    result = check(
        module,
        (X,),
        EqualizeLayers(),
        """
        program(%input: f32[2, 3, 8, 8])
          const @0.bias: f32[6]
          const @0.weight: f32[6, 3, 1, 1]
          const @3.bias: f32[6]
          const @3.weight: f32[6, 1, 3, 3]
          const @5.weight: f32[4, 6, 1, 1]
          %0: f32[2, 6, 8, 8] = aten.conv2d(%input, @0.weight, @0.bias)
          %1: f32[2, 6, 8, 8] = aten.relu(%0)
          %2: f32[2, 6, 9, 9] = aten.pad(%1, pad=[0, 1, 0, 1], value=0.0)
          %3: f32[2, 6, 4, 4] = aten.conv2d(%2, @3.weight, @3.bias, stride=[2, 2], groups=6)
          %4: f32[2, 6, 4, 4] = aten.relu(%3)
          %5: f32[2, 4, 4, 4] = aten.conv2d(%4, @5.weight)
          return %5
        """,
        changes=2,
    )
    assert _spread(result.program, "0.weight", "3.weight", 0) < 1.05
    assert _spread(result.program, "3.weight", "5.weight", 1) < 1.05


def test_a_clamp_gets_a_bound_for_each_channel_where_asked() -> None:
    result = check(_stack(nn.ReLU6), (X * 3,), EqualizeLayers(clamp="per-channel"))
    bounds = [v for n, v in result.program.constants.items() if n.endswith(".bound")]
    assert [list(bound.shape) for bound in bounds if isinstance(bound, Tensor)] == [[6, 1, 1]] * 2
    assert not [n for n in result.program.operators if "hardtanh" in str(n.target)]


def test_linears_are_chains_as_well() -> None:
    torch.manual_seed(0)
    module = _wild(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    result = check(module, (X,), EqualizeLayers(), changes=1)
    assert _spread(result.program, "0.weight", "2.weight", 1) < 1.05


# -- refuses --------------------------------------------------------------------------------------


def test_relu6_is_refused_with_its_reason() -> None:
    refuses(_stack(nn.ReLU6), (X,), EqualizeLayers(), "a scale would move the bound")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)), "a scale does not pass aten.silu"),
        ((nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, groups=2)), "2 groups of several channels"),
        ((nn.Conv2d(3, 4, 1), nn.Linear(8, 2)), "change their axis"),
        ((nn.Conv2d(3, 4, 1), nn.Hardtanh(-1, 1), nn.Conv2d(4, 2, 1)), "is no clamp from 0"),
        (
            (nn.Conv2d(3, 4, 1), nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3)),
            "pads with something else than zeros",
        ),
    ],
)
def test_what_no_scale_passes_is_refused(layers: tuple[nn.Module, ...], reason: str) -> None:
    refuses(_wild(nn.Sequential(*layers)), (X,), EqualizeLayers(), reason)


def test_a_second_reader_and_a_shared_weight_are_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y

    class Twice(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.relu(self.a(x)))

    refuses(Branch(), (X,), EqualizeLayers(), "has 2 users")
    refuses(Twice(), (X,), EqualizeLayers(), "is read 2 times")


def test_what_is_balanced_stays_and_options_round_trip() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    with torch.no_grad():
        for conv in (module[0], module[1]):
            conv.weight.fill_(1.0)  # type: ignore[operator]  # a parameter, no module
    refuses(module, (X,), EqualizeLayers(), "balanced already")
    text = "equalize-layers{clamp=per-channel,sweeps=3}"
    assert str(Recipe.parse(text)) == text


class Padded(nn.Module):
    """Zeros among the channels between two layers, which move or add some."""

    def __init__(self, first: nn.Module, second: nn.Module, pad: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second, self.pad = first, second, pad

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.pad(self.first(x), self.pad))
        return y


@pytest.mark.parametrize(
    ("first", "second", "pad", "shape"),
    [
        (nn.Linear(8, 16), nn.Linear(19, 4), (1, 2), (6, 8)),
        (nn.Linear(8, 16), nn.Linear(16, 4), (1, -1), (6, 8)),
        (nn.Conv2d(3, 4, 1), nn.Conv2d(6, 4, 1), (0, 0, 0, 0, 0, 2), (2, 3, 8, 8)),
    ],
)
def test_padded_channels_are_refused(
    first: nn.Module, second: nn.Module, pad: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    module = _wild(Padded(first, second, pad))
    refuses(module, (torch.randn(shape),), EqualizeLayers(), "pads the channels")


def test_zeros_around_an_image_change_nothing() -> None:
    module = _wild(Padded(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), (1, 1, 2, 0)))
    check(module, (X,), EqualizeLayers(), changes=1)


def test_layers_that_see_other_axes_as_channels_are_refused() -> None:
    """An image without a batch is a batch of rows to a layer of one dimension."""
    module = _wild(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv1d(8, 4, 1)))
    refuses(module, (X[0],), EqualizeLayers(), "change their axis")
