from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.passes.fold.merge_linears import MergeLinears, merged
from tests.passes.fold.layers import assert_is_a_value, convolution, is_still, x
from tests.support.check import check, refuses, unchanged

MERGE = MergeLinears()


# Fires ---------------------------------------------------------------------------------------


def test_merges_a_chain_of_linears() -> None:
    check(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)),
        x(2, 5, 4),
        MERGE,
        """
        program(%input: f32[2, 5, 4])
          const @0.bias: f32[3]
          const @0.weight: f32[3, 4]
          %0: f32[2, 5, 3] = aten.linear(%input, @0.weight, @0.bias)
          return %0
        """,
        changes=2,
    )


def test_merges_a_pointwise_convolution_into_the_one_before() -> None:
    check(
        nn.Sequential(convolution(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)),
        x(2, 3, 7, 7),
        MERGE,
        """
        program(%input: f32[batch, 3, 7, 7])
          const @0.bias: f32[2]
          const @0.weight: f32[2, 3, 3, 3]
          %0: f32[batch, 2, 7, 7] = aten.conv2d(%input, @0.weight, @0.bias, padding=[1, 1])
          return %0
        """,
        dynamic_shapes=({0: torch.export.Dim("batch", max=16)},),
        changes=1,
    )


def test_merges_a_pointwise_convolution_into_the_one_after() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 1, bias=False), convolution(8, 3, 3, padding=1))
    result = check(model, x(2, 2, 6, 6), MERGE, changes=1)
    assert result.changes[0].detail == "232 weights become 54"
    (conv,) = result.program.operators
    assert conv.meta["from"] == ("merge-linears", "merge-layers", ("conv2d_1", "conv2d"))


# Refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "because"),
    [
        (4, "it would save nothing: 16 weights instead of 16"),
        (64, "it would cost more: 4096 weights instead of 256"),
    ],
)
def test_refuses_where_one_layer_is_no_less_work(wide: int, because: str) -> None:
    model = nn.Sequential(nn.Linear(wide, 2), nn.Linear(2, wide))
    refuses(model, x(2, wide), MERGE, because=because)


def test_refuses_where_the_first_has_a_second_user() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(y) + y

    refuses(Twice(), x(2, 4), MERGE, because="linear (aten.linear) has 2 users")


def test_refuses_where_something_takes_the_shape_of_the_first() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            self.b = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(y), torch.zeros_like(y)

    refuses(Alike(), x(2, 4), MERGE, because="linear (aten.linear) has 2 users")


def test_refuses_a_shared_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.a(self.a(x))

    refuses(Shared(), x(2, 4), MERGE, because="a weight is shared with linear")


def test_refuses_two_wide_kernels() -> None:
    model = nn.Sequential(convolution(3, 8), convolution(8, 2))
    because = "neither it nor conv2d (aten.conv2d) is pointwise"
    refuses(model, x(2, 3, 7, 7), MERGE, because=because)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}])
def test_refuses_one_by_one_kernels_that_skip_or_pad(options: dict[str, int]) -> None:
    model = nn.Sequential(convolution(3, 8), nn.Conv2d(8, 2, 1, **options))  # type: ignore[arg-type]
    refuses(model, x(2, 3, 7, 7), MERGE, because="is pointwise")


def test_refuses_other_groups() -> None:
    model = nn.Sequential(convolution(4, 8, groups=4), nn.Conv2d(8, 2, 1))
    because = "it has 1 groups and conv2d (aten.conv2d) has 4"
    refuses(model, x(2, 4, 7, 7), MERGE, because=because)


def test_refuses_a_bias_before_padding() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 1), convolution(8, 3, 3, padding=1))
    because = "it pads with zeros, not with the bias of conv2d"
    refuses(model, x(2, 2, 6, 6), MERGE, because=because)


def test_refuses_a_linear_along_a_spatial_axis() -> None:
    model = nn.Sequential(convolution(3, 3), nn.Linear(5, 2))
    because = "conv2d (aten.conv2d) has its channels on another axis"
    refuses(model, x(2, 3, 7, 7), MERGE, because=because)


def test_refuses_computed_weights() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, weight: Tensor) -> Any:
            return torch.nn.functional.linear(self.a(x), weight)

    refuses(Computed(), (*x(2, 4), *x(3, 4)), MERGE, because="is computed, not constant")


def test_refuses_a_product_that_overflows() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    nn.init.constant_(model[0].weight, 300.0)
    nn.init.constant_(model[1].weight, 300.0)
    args = (torch.full((2, 4), 1e-3, dtype=torch.half),)
    refuses(model, args, MERGE, because="not finite in torch.float16")


def test_leaves_layers_with_an_activation_between_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert unchanged(model, x(2, 4), MERGE).refusals == ()


# Meaning -------------------------------------------------------------------------------------


def test_known_answer() -> None:
    first, second = torch.tensor([[[1.0], [2.0]]]).double(), torch.tensor([[[3.0, 5.0]]]).double()
    rows, bias = merged(first, torch.tensor([1.0, -1.0]), second, torch.tensor([0.5]))
    assert rows.tolist() == [[[13.0]]]
    assert bias is not None
    assert bias.tolist() == [-1.5]


@given(
    dims=st.integers(0, 3),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    first_wide=st.booleans(),
    transposed=st.booleans(),
    biases=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_two_layers_mean_the_same(
    dims: int,
    groups: int,
    kernel: int,
    first_wide: bool,
    transposed: bool,
    biases: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    model: nn.Sequential
    if dims == 0:
        model = nn.Sequential(nn.Linear(4, 6, bias=biases[0]), nn.Linear(6, 2, bias=biases[1]))
    else:
        wide: dict[str, Any] = {
            "kernel": kernel,
            "stride": 2,
            "transposed": transposed,
            "groups": groups,
        }
        if first_wide:
            wide["padding"] = kernel // 2
        elif transposed:
            biases = (False, biases[1])
        point: dict[str, Any] = {"kernel": 1, "groups": groups}
        first, second = (wide, point) if first_wide else (point, wide)
        model = nn.Sequential(
            convolution(2 * groups, 6 * groups, dims=dims, bias=biases[0], **first),
            convolution(6 * groups, 2 * groups, dims=dims, bias=biases[1], **second),
        )
    shape = (2, 3, 4) if dims == 0 else (2, 2 * groups, *[4] * dims)
    check(model.to(dtype), x(*shape, dtype=dtype), MERGE, changes=1)


# Neighbors -----------------------------------------------------------------------------------


def test_leaves_a_shared_bias_as_it_is_elsewhere() -> None:
    class SharedBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x)) + self.a.bias

    model: Any = SharedBias()
    result = check(model, x(2, 4), MERGE, changes=1)
    assert is_still(result.program, "a.bias", model.a.bias)


def test_is_a_value() -> None:
    assert_is_a_value(MERGE)
