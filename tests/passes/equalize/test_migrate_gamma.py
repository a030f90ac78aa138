"""migrate-gamma: the known answer, residuals, and gains that stay."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.passes.equalize.migrate_gamma import MigrateGamma, migrated
from planish.passes.recipe import Recipe
from tests.support.check import check, refuses

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A norm that a linear and perhaps a residual read."""

    def __init__(self, *, residual: bool, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm or nn.LayerNorm(6)
        self.residual = residual
        self.linear = nn.Linear(6, 6)
        if norm is None:
            with torch.no_grad():
                self.norm.weight.copy_(torch.tensor([10.0, 1, -2, 0.5, 3, 1e-9]))  # type: ignore[operator]  # a parameter, no module
                self.norm.bias.copy_(torch.randn(6))  # type: ignore[operator]  # a parameter, no module

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.linear(y) + y if self.residual else self.linear(y)


def test_the_example_of_two_channels_gives_the_same_either_way() -> None:
    gain, bias = torch.tensor([10.0, 1.0]), torch.tensor([1.0, 0.0])
    normed, weight = torch.tensor([0.2, 0.3]), torch.tensor([[1.0, 1.0]])
    new_gain, new_bias, moved = migrated(gain, bias)
    assert new_bias is not None
    assert new_gain.tolist() == [1.0, 1.0]
    torch.testing.assert_close(new_bias, torch.tensor([0.1, 0.0]))
    torch.testing.assert_close(weight @ (gain * normed + bias), torch.tensor([3.3]))
    torch.testing.assert_close(
        (weight * moved.float()) @ (new_gain * normed + new_bias), torch.tensor([3.3])
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_what_the_norm_gives_is_the_same_after_multiplying_back(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain, bias, normed = (torch.randn(7, generator=generator) for _ in range(3))
    new_gain, new_bias, moved = migrated(gain, bias)
    assert new_bias is not None
    back = (new_gain * normed + new_bias) * moved.float()
    torch.testing.assert_close(back, gain * normed + bias, rtol=1e-4, atol=1e-5)


def test_a_gain_near_zero_stays_where_it_is() -> None:
    new_gain, new_bias, moved = migrated(torch.tensor([10.0, 1e-9]), torch.tensor([1.0, 5.0]))
    assert new_bias is not None
    assert moved.tolist() == [10.0, 1.0]
    torch.testing.assert_close(new_gain, torch.tensor([1.0, 1e-9]))
    torch.testing.assert_close(new_bias, torch.tensor([0.1, 5.0]))


def test_the_gain_moves_into_the_weight_behind() -> None:
    result = check(Block(residual=False), (X,), MigrateGamma(), changes=1)
    gain = result.program.constants["norm.weight"]
    assert isinstance(gain, Tensor)
    torch.testing.assert_close(gain, torch.tensor([1.0, 1, 1, 1, 1, 1e-9]))
    assert result.changes[0].detail == "gains of up to 10"
    assert "aten.mul.Tensor" not in {str(n.target) for n in result.program.operators}


def test_a_residual_is_multiplied_back_or_refused() -> None:
    result = check(Block(residual=True), (X,), MigrateGamma(), changes=1)
    (back,) = [n for n in result.program.operators if str(n.target) == "aten.mul.Tensor"]
    assert [str(user.target) for user in back.users] == ["aten.add.Tensor"]
    refuses(Block(residual=True), (X,), MigrateGamma(explicit=False), "1 others read it")


def test_norms_without_a_gain_to_move_are_refused() -> None:
    plain = nn.LayerNorm(6, elementwise_affine=False)
    refuses(Block(residual=False, norm=plain), (X,), MigrateGamma(), "it has no gain")
    refuses(Block(residual=False, norm=nn.LayerNorm(6)), (X,), MigrateGamma(), "1 already")
    square = nn.LayerNorm([4, 6])
    refuses(Block(residual=False, norm=square), (X,), MigrateGamma(), "more than one axis")


def test_options_round_trip() -> None:
    text = "migrate-gamma{explicit=false}"
    assert str(Recipe.parse(text)) == text
