from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import PassError
from planish.passes.base import PassContext
from planish.passes.fold.fold_batch_norm import FoldBatchNorm, scale_and_shift
from tests.passes.fold.layers import assert_is_a_value, batch_norm, convolution, is_still, x
from tests.support.check import check, refuses

FOLD = FoldBatchNorm()


# Fires ---------------------------------------------------------------------------------------


def test_folds_into_the_convolution_before() -> None:
    model = nn.Sequential(convolution(4, 6, padding=1, bias=False), batch_norm(6), nn.ReLU())
    check(
        model,
        x(2, 4, 5, 5),
        FOLD,
        """
        program(%input: f32[2, 4, 5, 5])
          const @0.bias: f32[6]
          const @0.weight: f32[6, 4, 3, 3]
          %0: f32[2, 6, 5, 5] = aten.conv2d(%input, @0.weight, @0.bias, padding=[1, 1])
          %1: f32[2, 6, 5, 5] = aten.relu(%0)
          return %1
        """,
        changes=1,
    )


def test_folds_into_the_linear_before() -> None:
    check(
        nn.Sequential(nn.Linear(3, 5), batch_norm(5, 1)),
        x(4, 3),
        FOLD,
        """
        program(%input: f32[4, 3])
          const @0.bias: f32[5]
          const @0.weight: f32[5, 3]
          %0: f32[4, 5] = aten.linear(%input, @0.weight, @0.bias)
          return %0
        """,
        changes=1,
    )


class Sequence(nn.Module):
    """Batch norm over the channels of a sequence, brought to axis 1 in some way."""

    def __init__(self, route: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.norm = batch_norm(5, 1)
        self.route = route

    def forward(self, x: Tensor) -> Any:
        return self.route(self.norm, self.fc(x))


def test_folds_through_a_reshape_that_keeps_the_channels_whole() -> None:
    check(
        Sequence(lambda norm, y: norm(y.flatten(0, 1)).reshape_as(y)),  # as LeViT has it
        x(2, 4, 3),
        FOLD,
        """
        program(%x: f32[batch, 4, 3])
          const @fc.bias: f32[5]
          const @fc.weight: f32[5, 3]
          %0: f32[batch, 4, 5] = aten.linear(%x, @fc.weight, @fc.bias)
          %1: f32[4*batch, 5] = aten.flatten.using_ints(%0, end_dim=1)
          %2: f32[batch, 4, 5] = aten.reshape_as(%1, %0)
          return %2
        """,
        dynamic_shapes=({0: torch.export.Dim("batch", max=32)},),
        changes=1,
    )


def test_folds_through_a_transpose_that_moves_the_channels() -> None:
    module = Sequence(lambda norm, y: norm(y.transpose(1, 2)))
    check(module, x(2, 4, 3), FOLD, changes=1)


def test_folds_into_the_linears_after() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batch_norm(3, 1)
            self.a = nn.Linear(3, 2)
            self.b = nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(x)
            return self.a(y), self.b(y)

    check(
        Heads(),
        x(4, 3),
        FOLD,
        """
        program(%x: f32[4, 3])
          const @a.bias: f32[2]
          const @a.weight: f32[2, 3]
          const @b.bias: f32[4]
          const @b.weight: f32[4, 3]
          %0: f32[4, 2] = aten.linear(%x, @a.weight, @a.bias)
          %1: f32[4, 4] = aten.linear(%x, @b.weight, @b.bias)
          return %0, %1
        """,
        changes=1,
    )


def test_folds_a_pure_scale_into_the_padded_convolution_after() -> None:
    norm = batch_norm(4, affine=False)
    norm.running_mean.zero_()
    check(nn.Sequential(norm, convolution(4, 6, padding=1)), x(2, 4, 5, 5), FOLD, changes=1)


@pytest.mark.parametrize("options", [{}, {"padding": "valid"}])
def test_folds_into_the_convolution_after_that_does_not_pad(options: dict[str, Any]) -> None:
    model = nn.Sequential(batch_norm(4), convolution(4, 6, **options))
    check(model, x(2, 4, 5, 5), FOLD, changes=1)


def test_folds_decomposed_programs() -> None:
    model = nn.Sequential(convolution(4, 6, groups=2, stride=2), batch_norm(6)).eval()
    core_aten = torch.export.export(model, x(2, 4, 7, 7)).run_decompositions()
    program = capture(core_aten)
    assert "aten.convolution(" in str(program)
    check(program, (), FOLD, changes=1)


def test_folds_every_batch_norm_of_residual_blocks() -> None:
    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.one = convolution(inputs, outputs, stride=stride, padding=1, bias=False)
            self.one_norm = batch_norm(outputs)
            self.two = convolution(outputs, outputs, padding=1, bias=False)
            self.two_norm = batch_norm(outputs)
            self.down = nn.Sequential(
                convolution(inputs, outputs, 1, stride=stride), batch_norm(outputs)
            )

        def forward(self, x: Tensor) -> Any:
            y = F.relu_(self.one_norm(self.one(x)))
            return F.relu_(self.two_norm(self.two(y)) + self.down(x))

    model = nn.Sequential(Block(3, 4, 1), Block(4, 8, 2))
    dims = ({0: torch.export.Dim("batch", max=16), 2: torch.export.Dim("height", min=8, max=64)},)
    result = check(model, x(2, 3, 9, 10), FOLD, dynamic_shapes=dims, changes=6)
    assert "batch_norm" not in str(result.program)


# Refuses -------------------------------------------------------------------------------------


def test_refuses_statistics_of_the_batch() -> None:
    model = nn.Sequential(convolution(4, 6), nn.BatchNorm2d(6, track_running_stats=False))
    refuses(model, x(2, 4, 5, 5), FOLD, because="statistics of the batch")


def test_refuses_where_the_linear_has_a_second_user() -> None:
    module = Sequence(lambda norm, y: norm(y.flatten(0, 1)).reshape_as(y) + y)
    refuses(module, x(2, 4, 3), FOLD, because="linear (aten.linear) has 2 users")


def test_leaves_a_batch_norm_alone_that_stands_between_others() -> None:
    model = nn.Sequential(nn.ReLU(), batch_norm(4), nn.Sigmoid())
    result = refuses(model, x(2, 4, 5, 5), FOLD, because="it comes from relu (aten.relu)")
    assert any("it is read by sigmoid (aten.sigmoid)" in r.reason for r in result.refusals)


def test_refuses_a_batch_norm_over_tokens() -> None:
    model = nn.Sequential(nn.Linear(3, 5), batch_norm(4, 1))
    because = "acts on axis 1 of linear (aten.linear), whose channels are axis 2"
    refuses(model, x(2, 4, 3), FOLD, because=because)


def test_refuses_a_batch_norm_over_tokens_before_a_linear() -> None:
    model = nn.Sequential(nn.ReLU(), batch_norm(4, 1), nn.Linear(3, 5))
    refuses(model, x(2, 4, 3), FOLD, because="acts on axis 1 of linear (aten.linear)")


def test_refuses_where_channels_are_regrouped() -> None:
    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(4, 6)
            self.norm = batch_norm(3)
            self.after = convolution(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.conv(x).view(4, 3, 3, 3))
            return self.after(y.view(2, 6, 3, 3))

    result = refuses(Regrouped(), x(2, 4, 5, 5), FOLD, because="are regrouped before it")
    reasons = [r.reason for r in result.refusals]
    assert "the channels are regrouped before conv2d_1 (aten.conv2d)" in reasons


def test_refuses_an_unbatched_convolution() -> None:
    model = nn.Sequential(convolution(4, 6, dims=1), batch_norm(3, 1))
    refuses(model, x(4, 5), FOLD, because="acts on axis 1 of conv1d (aten.conv1d)")


def test_refuses_a_shared_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(4, 4)
            self.norm = batch_norm(4)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.norm(self.conv(x)), self.conv(y)

    args = x(2, 4, 5, 5) * 2
    refuses(Shared(), args, FOLD, because="its weight is shared with conv2d_1 (aten.conv2d)")


class Functional(nn.Module):
    """A convolution and a batch norm whose numbers come in as inputs."""

    def forward(self, x: Tensor, weight: Tensor, mean: Tensor) -> Any:
        return F.batch_norm(F.conv2d(x, weight), mean, mean.abs() + 1)


def test_refuses_computed_statistics() -> None:
    args = (*x(2, 4, 5, 5), *x(6, 4, 3, 3), *x(6))
    refuses(Functional(), args, FOLD, because="its running_mean is computed, not constant")


def test_refuses_a_computed_weight() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batch_norm(6)

        def forward(self, x: Tensor, weight: Tensor) -> Any:
            return self.norm(F.conv2d(x, weight))

    because = "the weight of conv2d (aten.conv2d) is computed, not constant"
    refuses(Computed(), (*x(2, 4, 5, 5), *x(6, 4, 3, 3)), FOLD, because=because)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same"}, {"transposed": True}])
def test_refuses_a_shift_before_a_border(options: dict[str, object]) -> None:
    model = nn.Sequential(batch_norm(4), convolution(4, 6, **options))  # type: ignore[arg-type]
    refuses(model, x(2, 4, 5, 5), FOLD, because="pads with zeros, which a shift before it")


def test_refuses_a_mean_that_would_cancel_in_the_layer_after() -> None:
    norm = batch_norm(3, 1)
    norm.running_mean.fill_(300.0)
    norm.running_var.fill_(1.0)
    model = nn.Sequential(norm, nn.Linear(3, 2))
    refuses(model, x(4, 3), FOLD, because="a mean is 300 deviations")


def test_refuses_numbers_that_the_weight_cannot_hold() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), batch_norm(5, 1)).half()
    model[1].weight.data.fill_(6e4)
    nn.init.constant_(model[0].weight, 3.0)
    refuses(model, x(4, 3, dtype=torch.half), FOLD, because="not finite in torch.float16")


def test_fails_on_a_variance_that_is_not_positive() -> None:
    model: Any = nn.Sequential(convolution(4, 6), batch_norm(6)).eval()
    model[1].running_var[3:5] = -1.0
    program = capture(model, x(2, 4, 5, 5))
    with pytest.raises(PassError, match=r"is -0.99\d+ in\s+channel 3 and 1 others") as caught:
        FOLD.run(program, PassContext())
    assert "batch_norm" in str(caught.value.where)


# Meaning -------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.booleans(), st.sampled_from([1e-5, 1e-3, 0.1]), st.integers(0, 99))
def test_scale_and_shift_are_those_of_torch(C: int, affine: bool, eps: float, seed: int) -> None:
    norm = batch_norm(C, 1, affine=affine, seed=seed).double()
    (y,) = x(7, C, dtype=torch.float64)
    args = (norm.weight, norm.bias, norm.running_mean, norm.running_var, eps)
    scale, shift = scale_and_shift(*args)
    expected = F.batch_norm(y, args[2], args[3], args[0], args[1], eps=eps)
    torch.testing.assert_close(scale * y + shift, expected, rtol=1e-12, atol=1e-12)


def test_known_answer() -> None:
    # 2 (y - 3) / sqrt(3.75 + 0.25) + 1 = y - 2
    one = torch.ones(1)
    scale, shift = scale_and_shift(2 * one, one, 3 * one, 3.75 * one, 0.25)
    assert (scale.item(), shift.item()) == (1.0, -2.0)


@given(
    dims=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    kernel=st.integers(1, 2),
    stride=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_convolution_before_means_the_same(
    dims: int,
    transposed: bool,
    groups: int,
    bias: bool,
    affine: bool,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
) -> None:
    options = {"groups": groups, "bias": bias, "stride": stride, "padding": kernel - 1}
    conv = convolution(2 * groups, 3 * groups, kernel, dims=dims, transposed=transposed, **options)
    model = nn.Sequential(conv, batch_norm(3 * groups, dims, affine=affine)).to(dtype)
    check(model, x(2, 2 * groups, *[4] * dims, dtype=dtype), FOLD, changes=1)


@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    kernel=st.integers(1, 2),
    transposed=st.booleans(),
)
def test_any_convolution_after_means_the_same(
    dims: int, groups: int, bias: bool, affine: bool, kernel: int, transposed: bool
) -> None:
    kernel = 1 if transposed else kernel
    options = {"transposed": transposed, "groups": groups, "bias": bias}
    conv = convolution(2 * groups, 3 * groups, kernel, dims=dims, **options)  # type: ignore[arg-type]
    model = nn.Sequential(batch_norm(2 * groups, dims, affine=affine), conv)
    check(model, x(2, 2 * groups, *[4] * dims), FOLD, changes=1)


# Neighbors -----------------------------------------------------------------------------------


def test_leaves_shared_vectors_as_they_are_elsewhere() -> None:
    class SharedVectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(4, 4)
            self.norm = batch_norm(4)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(self.conv(x))
            return y, self.norm(torch.relu(y)), self.conv.bias * 2

    model: Any = SharedVectors()
    result = check(model, x(2, 4, 5, 5), FOLD, changes=1)
    assert is_still(result.program, "norm.weight", model.norm.weight)
    assert is_still(result.program, "conv.bias", model.conv.bias)
    assert "conv.bias_1" in result.program.constants


def test_says_where_the_new_layer_comes_from() -> None:
    model = nn.Sequential(convolution(4, 6), batch_norm(6))
    result = check(model, x(2, 4, 5, 5), FOLD, changes=1)
    (conv,) = result.program.operators
    rule = "batch-norm-into-producer"
    assert conv.meta["from"] == ("fold-batch-norm", rule, ("conv2d", "batch_norm"))
    assert "conv.py" in conv.meta["stack_trace"]
    assert result.changes[0].rule == rule


def test_is_a_value() -> None:
    assert_is_a_value(FOLD)
