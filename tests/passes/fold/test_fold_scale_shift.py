from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.passes.fold._numbers import scale_inputs, scale_outputs
from planish.passes.fold.fold_scale_shift import FoldScaleShift, apply_before_batch_norm
from tests.passes.fold.layers import assert_is_a_value, batch_norm, convolution, is_still, x
from tests.support.check import check, refuses, unchanged

FOLD = FoldScaleShift()


class Between(nn.Module):
    """``last(f(first(x), s, t))`` with vectors s, t of the given shape."""

    def __init__(
        self,
        f: Callable[[Tensor, Tensor, Tensor], Tensor],
        *shape: int,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.f = f
        self.s = nn.Parameter(torch.randn(shape, generator=generator))
        self.t = nn.Parameter(torch.randn(shape, generator=generator))
        self.first = first or nn.Identity()
        self.last = last or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.f(self.first(x), self.s, self.t))


# Fires ---------------------------------------------------------------------------------------


def test_folds_layer_scale_into_the_linear_before() -> None:
    check(
        Between(lambda y, s, t: y * s, 5, first=nn.Linear(3, 5), last=nn.ReLU()),
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
        changes=1,
    )


def test_folds_chains_and_keeps_the_names() -> None:
    first = nn.Linear(3, 5, bias=False)
    check(
        Between(lambda y, s, t: (t - y / s) * s + t, 5, first=first),
        x(2, 3),
        FOLD,
        """
        program(%x: f32[2, 3])
          const @first.bias: f32[5]
          const @first.weight: f32[5, 3]
          %0: f32[2, 5] = aten.linear(%x, @first.weight, @first.bias)
          return %0
        """,
        changes=4,
    )


def test_folds_one_added_number() -> None:
    check(Between(lambda y, s, t: 3 - (y + 1), 1, first=nn.Linear(3, 5)), x(2, 3), FOLD, changes=2)


def test_folds_into_the_convolution_before_past_a_permute() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(4, 6, padding=1)
            self.gamma = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Any:
            return self.conv(x).flatten(2).permute(0, 2, 1) * self.gamma

    check(
        ChannelsLast(),
        x(2, 4, 5, 5),
        FOLD,
        """
        program(%x: f32[2, 4, 5, 5])
          const @conv.bias: f32[6]
          const @conv.weight: f32[6, 4, 3, 3]
          %0: f32[2, 6, 5, 5] = aten.conv2d(%x, @conv.weight, @conv.bias, padding=[1, 1])
          %1: f32[2, 6, 25] = aten.flatten.using_ints(%0, start_dim=2)
          %2: f32[2, 25, 6] = aten.permute(%1, dims=[0, 2, 1])
          return %2
        """,
        changes=1,
    )


def test_folds_into_the_linears_after() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.randn(3))
            self.q = nn.Linear(3, 2)
            self.k = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Any:
            y = torch.tanh(x) * self.s + 1
            return self.q(y) @ self.k(y).mT

    result = check(Queries(), x(2, 4, 3), FOLD, changes=2)
    assert {c.rule for c in result.changes} == {"scale-shift-into-consumers"}


def test_folds_a_scale_into_the_padded_convolution_after() -> None:
    last = convolution(4, 6, padding=1)
    check(Between(lambda y, s, t: y * s, 4, 1, 1, last=last), x(2, 4, 5, 5), FOLD, changes=1)


NORMS = [
    (nn.LayerNorm(4), (4,), (2, 3, 4)),
    (nn.LayerNorm(4, elementwise_affine=False), (4,), (2, 3, 4)),
    (nn.GroupNorm(2, 4), (4, 1), (2, 4, 3)),
    (nn.GroupNorm(2, 4, affine=False), (4, 1), (2, 4, 3)),
    (nn.InstanceNorm1d(4), (4, 1), (2, 4, 3)),
    (batch_norm(4, 1, affine=False), (4, 1), (2, 4, 3)),
]


@pytest.mark.parametrize(("norm", "vector", "shape"), NORMS, ids=lambda v: str(v)[:12])
def test_folds_into_the_norm_before(
    norm: nn.Module, vector: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    check(Between(lambda y, s, t: y * s + t, *vector, first=norm), x(*shape), FOLD, changes=2)


def test_folds_a_scale_into_the_rms_norm_before() -> None:
    check(
        Between(lambda y, s, t: y * s, 4, first=nn.RMSNorm(4, elementwise_affine=False)),
        x(2, 4),
        FOLD,
        """
        program(%x: f32[2, 4])
          const @rms_norm_weight: f32[4]
          %0: f32[2, 4] = aten.rms_norm(%x, normalized_shape=[4], weight=@rms_norm_weight)
          return %0
        """,
        changes=1,
    )


@pytest.mark.parametrize("affine", [True, False])
def test_folds_into_the_batch_norm_after(affine: bool) -> None:
    norm = batch_norm(4, affine=affine)
    module = Between(lambda y, s, t: s * torch.tanh(y) - t, 4, 1, 1, last=norm)
    result = check(module, x(2, 4, 3, 3), FOLD, changes=2)
    assert {c.rule for c in result.changes} == {"scale-shift-into-batch-norm"}


# Refuses -------------------------------------------------------------------------------------


def test_refuses_what_has_no_layer_near() -> None:
    module = Between(lambda y, s, t: y * s, 3, first=nn.ReLU(), last=nn.Sigmoid())
    result = refuses(module, x(2, 3), FOLD, because="it comes from relu (aten.relu)")
    assert any("it is read by sigmoid" in r.reason for r in result.refusals)


def test_refuses_where_the_linear_has_a_second_user() -> None:
    module = Between(lambda y, s, t: y * s + y, 5, first=nn.Linear(3, 5))
    refuses(module, x(2, 3), FOLD, because="linear (aten.linear) has 2 users")


def test_refuses_a_vector_along_another_axis() -> None:
    module = Between(lambda y, s, t: y * s, 4, 1, first=nn.Linear(3, 5))
    refuses(module, x(2, 4, 3), FOLD, because="acts on axis 1 of linear (aten.linear)")


def test_refuses_a_shift_before_padding() -> None:
    module = Between(lambda y, s, t: y + t, 4, 1, 1, last=convolution(4, 6, padding=1))
    refuses(module, x(2, 4, 5, 5), FOLD, because="pads with zeros, which a shift before it")


def test_refuses_a_shift_of_an_rms_norm() -> None:
    module = Between(lambda y, s, t: y + t, 4, first=nn.RMSNorm(4))
    refuses(module, x(2, 4), FOLD, because="rms_norm has no bias")


def test_refuses_a_norm_over_several_axes() -> None:
    module = Between(lambda y, s, t: y * s, 4, first=nn.LayerNorm((3, 4)))
    refuses(module, x(2, 3, 4), FOLD, because="has a weight over 2 axes")


def test_refuses_when_not_only_layers_read_it() -> None:
    class AlsoRead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.randn(3))
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = x.relu() * self.s
            return self.fc(y) + y

    refuses(AlsoRead(), x(2, 3), FOLD, because="it is read by add (aten.add.Tensor)")


def test_refuses_a_result_of_the_program() -> None:
    class AlsoReturned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.randn(3))
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = x.relu() * self.s
            return self.fc(y), y

    refuses(AlsoReturned(), x(2, 3), FOLD, because="it is read by result output")


class Tied(nn.Module):
    """An output projection that shares its weight with the embedding, as in language models."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.table = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.table.weight
        self.v = nn.Parameter(torch.randn(7))

    def forward(self, ids: Tensor) -> Any:
        y = self.head(self.table(ids))
        return y * self.v if self.scaled else y + self.v


def test_refuses_a_tied_weight_but_not_the_bias_beside_it() -> None:
    ids = (torch.tensor([[1, 2, 6]]),)
    refuses(Tied(scaled=True), ids, FOLD, because="its weight is shared with embedding")
    result = check(Tied(scaled=False), ids, FOLD, changes=1)
    assert set(result.program.constants) == {"head.weight", "head.bias"}


def test_refuses_what_changes_type_or_sizes() -> None:
    for shape, dtype in (((5,), torch.float64), ((1, 1, 5), torch.float32)):
        module = Between(lambda y, s, t: y * s, *shape, first=nn.Linear(3, 5))
        module.s.data = module.s.data.to(dtype)
        because = "it changes the element type or the sizes of its operand"
        refuses(module, x(2, 3), FOLD, because=because)


def test_refuses_a_division_by_zero() -> None:
    module = Between(lambda y, s, t: y / s, 5, first=nn.Linear(3, 5), last=nn.Tanh())
    module.s.data[2] = 0
    refuses(module, x(2, 3), FOLD, because="it divides by zero")


def test_refuses_a_zero_scale_before_a_batch_norm() -> None:
    module = Between(lambda y, s, t: y.relu() * s, 4, 1, 1, last=batch_norm(4))
    module.s.data[2] = 0
    refuses(module, x(2, 4, 3, 3), FOLD, because="it multiplies by zero")


def test_refuses_a_batch_norm_after_that_measures() -> None:
    last = nn.BatchNorm2d(4, track_running_stats=False)
    module = Between(lambda y, s, t: y.relu() * s, 4, 1, 1, last=last)
    refuses(module, x(2, 4, 3, 3), FOLD, because="normalizes with the statistics of the batch")


def test_refuses_a_batch_norm_after_over_another_axis() -> None:
    module = Between(lambda y, s, t: y.relu() * s, 4, last=batch_norm(3))
    refuses(module, x(2, 3, 4, 4), FOLD, because="acts on axis 3 of the batch norm after it")


def test_refuses_two_batch_norms_after() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.randn(4, 1, 1))
            self.a = batch_norm(4)
            self.b = batch_norm(4, seed=1)

        def forward(self, x: Tensor) -> Any:
            y = x.relu() * self.s
            return self.a(y) - self.b(y)

    refuses(Twice(), x(2, 4, 3, 3), FOLD, because="it has 2 users")


def test_leaves_tables_and_numbers_elsewhere_alone() -> None:
    module = Between(lambda y, s, t: (y + t + 1e-5).relu(), 4, 5, first=nn.Linear(3, 5))
    result = unchanged(module, x(2, 4, 3), FOLD)
    assert result.refusals == ()


# Meaning -------------------------------------------------------------------------------------


def test_known_answer() -> None:
    W, b = torch.tensor([[1.0, 2], [3, 4]]).double(), torch.tensor([1.0, -1])
    scale, shift = torch.tensor([2.0, 0.5]).double(), torch.tensor([0.5, 1.0]).double()
    rows, bias = scale_outputs(W[None], b, scale, shift)
    assert rows is not None
    assert bias is not None
    assert rows.tolist() == [[[2, 4], [1.5, 2]]]
    assert bias.tolist() == [2.5, 0.5]
    rows, bias = scale_inputs(W[None], b, scale, shift)
    assert rows is not None
    assert bias is not None
    assert rows.tolist() == [[[2, 1], [6, 2]]]
    assert bias.tolist() == [1 + 0.5 + 2, -1 + 1.5 + 4]


@given(st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_batch_norm_takes_up_what_is_before_it(
    C: int, scaled: bool, shifted: bool, seed: int
) -> None:
    norm = batch_norm(C, 1, seed=seed).double()
    s = torch.rand(C, dtype=torch.float64) + 0.5 if scaled else None
    t = torch.randn(C, dtype=torch.float64) if shifted else None
    (y,) = x(6, C, dtype=torch.float64)
    moved = (y if s is None else y * s) + (0 if t is None else t)
    expected = norm(moved)
    mean, gamma = apply_before_batch_norm(norm.running_mean, norm.weight, s, t)
    norm.running_mean.copy_(mean)
    if gamma is not None:
        norm.weight.data.copy_(gamma)
    torch.testing.assert_close(norm(y), expected, rtol=1e-10, atol=1e-10)


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mul": lambda y, s, t: y * s,
    "div": lambda y, s, t: y / (s.sign() * (s.abs() + 0.5)),
    "add": lambda y, s, t: t + y,
    "sub": lambda y, s, t: y - t,
    "rsub": lambda y, s, t: t - y,
    "add-alpha": lambda y, s, t: torch.add(y, t, alpha=2),
    "left-add-alpha": lambda y, s, t: torch.add(t, y, alpha=2),
    "sub-alpha": lambda y, s, t: torch.sub(t, y, alpha=3),
    "number": lambda y, s, t: torch.rsub(y, 2, alpha=3),
}


@given(
    names=st.lists(st.sampled_from([k for k in STEPS if k != "div"]), min_size=1, max_size=3),
    kind=st.sampled_from(["linear", "conv", "transposed", "norm"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    before=st.booleans(),
)
def test_any_chain_around_any_layer_means_the_same(
    names: list[str], kind: str, bias: bool, dtype: torch.dtype, before: bool
) -> None:
    layer: nn.Module
    shape: tuple[int, ...]
    vector: tuple[int, ...]
    if kind == "linear":
        layer, shape, vector = nn.Linear(4, 4, bias=bias), (2, 3, 4), (4,)
    elif kind == "norm":
        layer, shape, vector = batch_norm(4, affine=bias), (2, 4, 3, 3), (4, 1, 1)
    else:
        transposed = kind == "transposed"
        kernel = 1 if transposed and before else 2
        options: dict[str, Any] = {"groups": 2, "bias": bias, "transposed": transposed}
        layer, shape, vector = convolution(4, 4, kernel, **options), (2, 4, 3, 3), (4, 1, 1)

    def chain(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        y = torch.tanh(y) if before else y
        for name in names:
            y = STEPS[name](y, s, t)
        return y

    ends = {"last" if before else "first": layer}
    module = Between(chain, *vector, **ends).to(dtype)
    check(module, x(*shape, dtype=dtype), FOLD, changes=len(names))


# Neighbors -----------------------------------------------------------------------------------


def test_leaves_a_vector_as_it_is_elsewhere() -> None:
    module: Any = Between(lambda y, s, t: (y * s).relu() @ s, 5, first=nn.Linear(3, 5))
    result = check(module, x(2, 3), FOLD, changes=1)
    assert is_still(result.program, "s", module.s)
    linear = result.program.operators[0]
    assert linear.meta["from"][2] == ("linear", "mul")


def test_is_a_value() -> None:
    assert_is_a_value(FOLD)
