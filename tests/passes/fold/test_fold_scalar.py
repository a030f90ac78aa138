import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.passes.fold.fold_scalar import FoldScalar, attention_scale
from tests.passes.fold.layers import assert_is_a_value, batch_norm, convolution, x
from tests.support.check import check, refuses, unchanged

FOLD = FoldScalar()


class Between(nn.Module):
    """``last(f(first(x)))``."""

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.f = f
        self.first = first or nn.Identity()
        self.last = last or nn.Identity()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.f(self.first(x)))


class Attention(nn.Module):
    """Scaled queries before attention, written out or not, as many models have it."""

    def __init__(self, *, fused: bool, c: float = 0.25, scale: float | None = 1.0) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)
        self.fused = fused
        self.c = c
        self.scale = scale

    def forward(self, x: Tensor) -> Any:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], 2, 4).transpose(1, 2)

        q, k = heads(self.q(x)) * self.c, heads(self.k(x))
        if self.fused:
            return F.scaled_dot_product_attention(q, k, heads(x), scale=self.scale)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ heads(x)


# Fires ---------------------------------------------------------------------------------------


def test_folds_into_the_linear_before() -> None:
    check(
        Between(lambda y: -y / 2, first=nn.Linear(3, 5), last=nn.ReLU()),
        x(2, 4, 3),
        FOLD,
        """
        program(%x: f32[2, 4, 3])
          const @first.bias: f32[5]
          const @first.weight: f32[5, 3]
          %0: f32[2, 4, 5] = aten.linear(%x, @first.weight, @first.bias)
          %1: f32[2, 4, 5] = aten.relu(%0)
          return %1
        """,
        changes=2,
    )


def test_folds_the_scale_of_queries_through_the_split_into_heads() -> None:
    dims = ({0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", max=32)},)
    result = check(Attention(fused=False), x(2, 5, 8), FOLD, dynamic_shapes=dims, changes=1)
    assert "aten.mul" not in str(result.program)


def test_folds_into_the_scale_of_attention_rather_than_into_weights() -> None:
    result = check(Attention(fused=True), x(2, 5, 8), FOLD, changes=1)
    assert result.changes[0].rule == "scalar-into-attention"
    assert "scale=0.25" in str(result.program)


def test_folds_into_the_default_scale_of_attention() -> None:
    result = check(Attention(fused=True, c=3.0, scale=None), x(2, 5, 8), FOLD, changes=1)
    assert "scale=1.5" in str(result.program)


@pytest.mark.parametrize("role", [0, 1])
def test_folds_a_factor_of_query_or_key(role: int) -> None:
    class OfRole(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            q, k = (q * 0.5, k) if role == 0 else (q, k * 0.5)
            return F.scaled_dot_product_attention(q, k, v)

    check(OfRole(), x(2, 2, 5, 4) * 3, FOLD, changes=1)


def test_folds_into_the_layers_after() -> None:
    last = convolution(4, 6, padding=1)
    check(
        Between(lambda y: y / 255, last=last),
        x(2, 4, 5, 5),
        FOLD,
        """
        program(%x: f32[2, 4, 5, 5])
          const @last.bias: f32[6]
          const @last.weight: f32[6, 4, 3, 3]
          %0: f32[2, 6, 5, 5] = aten.conv2d(%x, @last.weight, @last.bias, padding=[1, 1])
          return %0
        """,
        changes=1,
    )


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4), nn.GroupNorm(1, 3, affine=False)],
    ids=str,
)
def test_folds_into_the_norm_before(norm: nn.Module) -> None:
    check(Between(lambda y: 3 * y, first=norm), x(2, 3, 4), FOLD, changes=1)


def test_folds_a_constant_of_one_element_on_either_side() -> None:
    module: Any = Between(lambda y: y, first=nn.Linear(3, 5))
    module.f = lambda y: (module.factor * (y * module.factor)) / module.factor
    check(module, x(2, 3), FOLD, changes=3)


# Refuses -------------------------------------------------------------------------------------


def test_refuses_where_the_linear_has_a_second_user() -> None:
    module = Between(lambda y: 2 * y + y, first=nn.Linear(3, 5))
    refuses(module, x(2, 3), FOLD, because="linear (aten.linear) has 2 users")


def test_refuses_when_not_only_layers_read_it() -> None:
    class AlsoRead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = x.relu() * 2
            return self.fc(y) + y

    refuses(AlsoRead(), x(2, 3), FOLD, because="it is read by add (aten.add.Tensor)")


def test_refuses_a_shared_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.fc(x).relu()) * 2

    because = "its weight is shared with linear (aten.linear)"
    refuses(Shared(), x(2, 3), FOLD, because=because)


@pytest.mark.parametrize("f", [lambda y: y / 0, lambda y: y * math.inf])
def test_refuses_a_factor_that_is_not_finite(f: Callable[[Tensor], Tensor]) -> None:
    module = Between(f, first=nn.Linear(3, 5), last=nn.Tanh())
    refuses(module, x(2, 3), FOLD, because="it multiplies by inf")


@pytest.mark.parametrize(
    ("dtype", "c", "because"),
    [(torch.half, 1e5, "not finite in torch.float16"), (torch.float, 1e-38, "too small for")],
)
def test_refuses_numbers_that_the_weight_cannot_hold(
    dtype: torch.dtype, c: float, because: str
) -> None:
    linear = nn.Linear(3, 5, bias=False).to(dtype)
    nn.init.constant_(linear.weight, 1.0 if c > 1 else 0.5)
    module = Between(lambda y: y * c, first=linear)
    args = (torch.full((2, 3), 1e-3, dtype=dtype),)
    refuses(module, args, FOLD, because=because)


def test_refuses_a_negative_scale_of_attention() -> None:
    class Negative(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return F.scaled_dot_product_attention(-q, k, v)

    because = "the factor -1.0 is not positive"
    refuses(Negative(), x(2, 2, 5, 4) * 3, FOLD, because=because)


def test_refuses_a_factor_of_several_operands_of_attention() -> None:
    class Selfish(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x * 0.5
            return F.scaled_dot_product_attention(y, y, x) + F.scaled_dot_product_attention(
                x, x, x * 0.5
            )

    result = refuses(Selfish(), x(2, 2, 5, 4), FOLD, because="reads it as query and key")
    assert any("reads it as value" in r.reason for r in result.refusals)


def test_refuses_attention_that_is_not_alone() -> None:
    class AlsoRead(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x * 0.5
            return F.scaled_dot_product_attention(y, x, x) + y

    refuses(AlsoRead(), x(2, 2, 5, 4), FOLD, because="it has 2 users")


def test_refuses_a_default_scale_of_dynamic_width() -> None:
    class Wide(nn.Module):
        def forward(self, q: Tensor) -> Any:
            return F.scaled_dot_product_attention(q * 0.5, q, q)

    dims = ({3: torch.export.Dim("width", min=2, max=16)},)
    because = "the scale of scaled_dot_product_attention (aten.scaled_dot_product_attention) is not"
    refuses(Wide(), x(2, 2, 5, 4), FOLD, because=because, dynamic_shapes=dims)


def test_leaves_factors_elsewhere_alone() -> None:
    module = Between(lambda y: torch.relu(y * 2) * 3)
    assert unchanged(module, x(2, 3), FOLD).refusals == ()
    integers = Between(lambda y: y * 2)
    assert unchanged(integers, (torch.arange(6),), FOLD).refusals == ()


# Meaning -------------------------------------------------------------------------------------


def test_known_answers() -> None:
    assert attention_scale(0.5, None, 64) == 0.0625
    assert attention_scale(0.5, 3.0, 64) == 1.5


LAYERS: list[Callable[[bool], tuple[nn.Module, tuple[int, ...]]]] = [
    lambda bias: (nn.Linear(4, 4, bias=bias), (2, 3, 4)),
    lambda bias: (convolution(4, 4, groups=2, padding=1, bias=bias), (2, 4, 3, 3)),
    lambda bias: (convolution(4, 4, groups=2, transposed=True, bias=bias), (2, 4, 3, 3)),
    lambda bias: (convolution(4, 4, dims=3, stride=2, bias=bias), (2, 4, 3, 3, 3)),
    lambda bias: (batch_norm(4, affine=bias), (2, 4, 3, 3)),
]


@given(
    kind=st.integers(0, len(LAYERS) - 1),
    bias=st.booleans(),
    number=st.floats(0.01, 100.0) | st.floats(-100.0, -0.01),
    divides=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    before=st.booleans(),
)
def test_any_factor_of_any_layer_means_the_same(
    kind: int, bias: bool, number: float, divides: bool, dtype: torch.dtype, before: bool
) -> None:
    layer, shape = LAYERS[kind](bias)
    if before and kind == len(LAYERS) - 1:
        layer = nn.Conv2d(4, 2, 1, bias=bias)

    def f(y: Tensor) -> Tensor:
        y = torch.tanh(y) if before else y
        return y / number if divides else number * y

    module = Between(f, **{"last" if before else "first": layer}).to(dtype)
    check(module, x(*shape, dtype=dtype), FOLD, changes=1)


# Neighbors -----------------------------------------------------------------------------------


def test_leaves_other_layers_as_they_are() -> None:
    result = check(Attention(fused=False), x(2, 5, 8), FOLD, changes=1)
    assert set(result.program.constants) == {"q.weight", "q.bias", "k.weight", "k.bias"}
    linear = result.program.operators[0]
    assert linear.meta["from"][2] == ("linear", "mul")
    assert result.changes[0].rule == "scalar-into-producer"


def test_is_a_value() -> None:
    assert_is_a_value(FOLD)
