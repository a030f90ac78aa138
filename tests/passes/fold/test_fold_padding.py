from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.passes.fold.fold_padding import FoldPadding, same_padding, symmetric
from tests.passes.fold.layers import assert_is_a_value, convolution, is_still, x
from tests.support.check import check, refuses

FOLD = FoldPadding()
INF = float("inf")


class Padded(nn.Module):
    """A layer over a padded input."""

    def __init__(self, layer: nn.Module, *pads: int, value: float = 0, mode: str = "constant"):
        super().__init__()
        self.layer = layer
        self.pads = pads
        self.value = value
        self.mode = mode

    def forward(self, x: Tensor) -> Any:
        value = self.value if self.mode == "constant" else None
        return self.layer(F.pad(x, self.pads, mode=self.mode, value=value))


# Fires ---------------------------------------------------------------------------------------


def test_folds_into_the_convolution_after() -> None:
    check(
        nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), convolution(3, 4, padding=1), nn.ReLU()),
        x(2, 3, 6, 6),
        FOLD,
        """
        program(%input: f32[2, 3, height, 6])
          const @1.bias: f32[4]
          const @1.weight: f32[4, 3, 3, 3]
          %0: f32[2, 4, height + 2, 10] = aten.conv2d(%input, @1.weight, @1.bias, padding=[2, 3])
          %1: f32[2, 4, height + 2, 10] = aten.relu(%0)
          return %1
        """,
        dynamic_shapes=({2: torch.export.Dim("height", min=4, max=32)},),
        changes=1,
    )


def test_folds_minus_infinity_into_the_max_pool_after() -> None:
    check(
        Padded(nn.MaxPool1d(3, 2), 1, 1, value=-INF),
        x(2, 3, 7),
        FOLD,
        """
        program(%x: f32[2, 3, 7])
          %0: f32[2, 3, 4] = aten.max_pool1d(%x, kernel_size=[3], stride=[2], padding=[1])
          return %0
        """,
        changes=1,
    )


def test_folds_into_the_average_pool_after_which_then_counts_it() -> None:
    check(
        Padded(nn.AvgPool1d(2, 2, count_include_pad=False), 1, 1),
        x(2, 3, 6),
        FOLD,
        """
        program(%x: f32[2, 3, 6])
          %0: f32[2, 3, 4] = aten.avg_pool1d(%x, kernel_size=[2], stride=[2], padding=[1])
          return %0
        """,
        changes=1,
    )


@pytest.mark.parametrize("words", ["same", "valid"])
def test_writes_words_as_numbers_and_then_folds(words: str) -> None:
    conv = convolution(3, 4, 5, padding=words, dilation=2)
    padding = "[7, 5]" if words == "same" else "[3, 1]"
    result = check(Padded(conv, 1, 1, 3, 3), x(2, 3, 12, 12), FOLD, changes=2)
    assert {c.rule for c in result.changes} == {"number-padding", "padding-into-consumer"}
    assert f"padding={padding}" in str(result.program)
    assert "aten.conv2d(" in str(result.program)


def test_folds_decomposed_programs() -> None:
    model = Padded(convolution(3, 4, stride=2), 1, 1, 1, 1).eval()
    core_aten = torch.export.export(model, x(2, 3, 6, 6)).run_decompositions()
    program = capture(core_aten)
    assert "aten.constant_pad_nd" in str(program)
    assert "aten.convolution(" in str(program)
    check(program, (), FOLD, changes=1)


# Refuses -------------------------------------------------------------------------------------


def test_refuses_asymmetric_padding() -> None:
    module = Padded(convolution(3, 4), 0, 1, 1, 1)
    because = "asymmetric: 0 before and 1 after on spatial axis 1"
    refuses(module, x(2, 3, 6, 6), FOLD, because=because)


def test_refuses_same_padding_of_an_even_kernel() -> None:
    because = "asymmetric: 0 before and 1 after on axis 0"
    refuses(convolution(3, 4, 2, padding="same"), x(2, 3, 6, 6), FOLD, because=because)


def test_refuses_to_crop() -> None:
    module = Padded(convolution(3, 4), -1, -1)
    refuses(module, x(2, 3, 6, 6), FOLD, because="a negative amount crops")


def test_refuses_to_pad_channels() -> None:
    module = Padded(convolution(5, 4), 0, 0, 0, 0, 1, 1)
    refuses(module, x(2, 3, 6, 6), FOLD, because="it pads more than the spatial axes")


def test_refuses_computed_amounts() -> None:
    class ToEven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(3, 4)

        def forward(self, x: Tensor) -> Any:
            extra = x.shape[2] % 2 + 1
            return self.conv(F.pad(x, (0, 0, extra, extra)))

    dims = ({2: torch.export.Dim("height", min=5, max=32)},)
    because = "the amounts are computed, not constant"
    refuses(ToEven(), x(2, 3, 7, 7), FOLD, because=because, dynamic_shapes=dims)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_refuses_other_modes(mode: str) -> None:
    module = Padded(convolution(3, 4), 1, 1, 1, 1, mode=mode)
    refuses(module, x(2, 3, 6, 6), FOLD, because=f"it pads by {mode}")


@pytest.mark.parametrize(
    ("layer", "value", "wanted"),
    [
        (convolution(3, 4), 1.0, "0"),
        (nn.MaxPool2d(3), 0.0, "-inf"),
        (nn.AvgPool2d(3), -INF, "0"),
    ],
)
def test_refuses_another_value(layer: nn.Module, value: float, wanted: str) -> None:
    module = Padded(layer, 1, 1, 1, 1, value=value)
    result = refuses(module, x(2, 3, 6, 6), FOLD, because="it pads with ")
    assert result.refusals[0].reason.endswith(f" with {wanted}")


def test_refuses_a_second_user() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(3, 3, 1)

        def forward(self, x: Tensor) -> Any:
            y = F.pad(x, (1, 1))
            return self.conv(y) + y

    refuses(Twice(), x(2, 3, 6, 6), FOLD, because="it has 2 users")


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.AdaptiveAvgPool2d(2), convolution(3, 4, transposed=True)], ids=str
)
def test_refuses_consumers_that_cannot_pad_so(layer: nn.Module) -> None:
    because = "which cannot take it over"
    refuses(Padded(layer, 1, 1, 1, 1), x(2, 3, 6, 6), FOLD, because=because)


def test_refuses_a_decomposed_transposed_convolution() -> None:
    model = Padded(convolution(3, 4, transposed=True), 1, 1, 1, 1).eval()
    program = capture(torch.export.export(model, x(2, 3, 6, 6)).run_decompositions())
    refuses(program, (), FOLD, because="a transposed convolution's padding crops")


@pytest.mark.parametrize("pool", [nn.AvgPool2d, nn.MaxPool2d])
def test_refuses_ceil_mode(pool: type[nn.Module]) -> None:
    value = -INF if pool is nn.MaxPool2d else 0
    module = Padded(pool(3, 2, ceil_mode=True), 1, 1, 1, 1, value=value)
    refuses(module, x(2, 3, 6, 6), FOLD, because="ceil_mode")


def test_refuses_more_than_half_the_kernel_of_a_pool() -> None:
    module = Padded(nn.AvgPool2d(3, padding=1), 1, 1, 0, 0)
    refuses(module, x(2, 3, 6, 6), FOLD, because="by half of its kernel [3, 3] at most")


def test_refuses_an_average_that_does_not_count_its_own_padding() -> None:
    module = Padded(nn.AvgPool2d(4, padding=1, count_include_pad=False), 1, 1, 1, 1)
    refuses(module, x(2, 3, 6, 6), FOLD, because="does not count its own padding")


# Meaning -------------------------------------------------------------------------------------


def test_known_answers() -> None:
    assert symmetric([2, 2, 1, 1], 2) == (1, 2)
    assert symmetric([2, 2], 3) == (0, 0, 2)
    assert symmetric([1, 1, 0, 0, 0, 0], 1) == (1,)
    assert same_padding([3, 5], [1, 2]) == (1, 4)
    assert same_padding([2, 3], [2]) == (1, 2)


@given(
    kind=st.sampled_from(["conv", "max", "avg"]),
    dims=st.integers(1, 3),
    kernel=st.integers(2, 4),
    stride=st.integers(1, 2),
    own=st.integers(0, 1),
    counts=st.booleans(),
    data=st.data(),
)
def test_any_consumer_means_the_same(
    kind: str, dims: int, kernel: int, stride: int, own: int, counts: bool, data: st.DataObject
) -> None:
    room = 2 if kind == "conv" else kernel // 2 - own
    pads = data.draw(st.lists(st.integers(0, room), min_size=1, max_size=dims))
    layer: nn.Module
    if kind == "conv":
        layer = convolution(2, 2, kernel, dims=dims, stride=stride, padding=own, groups=2)
    elif kind == "max":
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
        layer = pool(kernel, stride, padding=own)
    else:
        mean = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1]
        layer = mean(kernel, stride, padding=own, count_include_pad=counts or own > 0)
    value = -INF if kind == "max" else 0.0
    module = Padded(layer, *[p for p in pads for _ in range(2)], value=value)
    check(module, x(2, 2, *[5] * dims), FOLD, changes=1)


# Neighbors -----------------------------------------------------------------------------------


def test_keeps_the_constants_and_says_where_the_layer_comes_from() -> None:
    module: Any = Padded(convolution(3, 4), 1, 1, 1, 1)
    result = check(module, x(2, 3, 6, 6), FOLD, changes=1)
    assert is_still(result.program, "layer.weight", module.layer.weight)
    (conv,) = result.program.operators
    assert conv.meta["from"][2] == ("conv2d", "pad")


def test_is_a_value() -> None:
    assert_is_a_value(FOLD)
