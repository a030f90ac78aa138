from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from planish.passes.fuse.norms import RecoverNorms, written_out
from tests.passes.fuse.modules import BATCH, LENGTH, Unary, assert_is_a_value, random
from tests.support.check import check, refuses, unchanged

RECOVER = RecoverNorms()
X = random(2, 5, 8)
DYNAMIC = ({0: BATCH, 1: LENGTH},)
W, B = random(8, seed=1), random(8, seed=2)


def mean(x: Tensor, *dims: int) -> Tensor:
    return x.mean(list(dims or (-1,)), keepdim=True)


def layer_norm(_: Any, x: Tensor) -> Tensor:
    centered = x - mean(x)
    return centered / torch.sqrt(mean(centered.pow(2)) + 1e-5)


def rms_norm(_: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean(x.pow(2)) + 1e-6)


def llama(self: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    scaled: Tensor = self.w * wide.to(x.dtype)
    return scaled


# Fires ---------------------------------------------------------------------------------------


def test_recovers_layer_norm_with_weight_and_bias() -> None:
    check(
        Unary(lambda self, x: self.w * layer_norm(self, x) + self.b, w=W, b=B),
        (X,),
        RECOVER,
        """
        program(%x: f32[batch, length, 8])
          const @b: f32[8]
          const @w: f32[8]
          %0: f32[batch, length, 8] = aten.layer_norm(%x, normalized_shape=[8], weight=@w, bias=@b)
          return %0
        """,
        dynamic_shapes=DYNAMIC,
        changes=1,
    )


def test_recovers_rms_norm_between_casts_to_float32_and_back() -> None:
    check(
        Unary(llama, w=W.to(torch.bfloat16)),
        (X.to(torch.bfloat16),),
        RECOVER,
        """
        program(%x: bf16[batch, length, 8])
          const @w: bf16[8]
          %0: bf16[batch, length, 8] = aten.rms_norm(%x, normalized_shape=[8], weight=@w, eps=1e-06)
          return %0
        """,
        dynamic_shapes=DYNAMIC,
        changes=1,
    )


def test_recovers_on_the_widened_input_where_only_that_side_is_cast() -> None:
    check(
        Unary(lambda self, x: rms_norm(self, x.float()) * (1.0 + self.w), w=W),
        (X.to(torch.bfloat16),),
        RECOVER,
        """
        program(%x: bf16[2, 5, 8])
          const @w: f32[8]
          %0: f32[2, 5, 8] = aten.to.dtype(%x, dtype=f32)
          %1: f32[8] = aten.add.Tensor(@w, other=1.0)
          %2: f32[2, 5, 8] = aten.rms_norm(%0, normalized_shape=[8], weight=%1, eps=1e-06)
          return %2
        """,
        changes=1,
    )


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no eps": lambda _, x: x / mean(x * x).sqrt(),
    "square": lambda _, x: x * (mean(x.square()) + 1e-3).rsqrt(),
    "product with itself": lambda _, x: (1e-3 + mean(x * x)).rsqrt() * x,
    "power": lambda _, x: x * (mean(x**2) + 1e-3).pow(-0.5),
    "reciprocal": lambda _, x: x * (1 / (mean(x**2) + 1e-3).sqrt()),
    "root as power": lambda _, x: x / (mean(x**2) + 1e-3) ** 0.5,
    "var": lambda _, x: (x - mean(x)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt(),
    "correction": lambda _, x: (x - mean(x)) * (x.var(-1, correction=0, keepdim=True) + 1).rsqrt(),
    "two dimensions": lambda _, x: (
        lambda centered: centered * (mean(centered**2, -2, -1) + 1e-3).rsqrt()
    )(x - mean(x, 1, 2)),
}


@pytest.mark.parametrize("form", FORMS)
def test_recovers_every_form(form: str) -> None:
    result = check(Unary(FORMS[form]), (X,), RECOVER, changes=1)
    assert len(result.program.operators) == 1


def test_keeps_what_has_another_shape_than_the_norm_out_of_it() -> None:
    result = check(
        Unary(lambda self, x: rms_norm(self, x) * self.w * self.s, w=W, s=random(1)),
        (X,),
        RECOVER,
        changes=1,
    )
    assert [str(n.target) for n in result.program.operators] == [
        "aten.rms_norm.default",
        "aten.mul.Tensor",
    ]


# Refuses -------------------------------------------------------------------------------------


def channels_first(_: Any, x: Tensor) -> Tensor:
    centered = x - mean(x, 1)
    return centered / torch.sqrt(mean(centered**2, 1) + 1e-6)


def unbiased(_: Any, x: Tensor) -> Tensor:
    return (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6)


def eps_outside(_: Any, x: Tensor) -> Tensor:
    return (x - mean(x)) / (x.std(-1, keepdim=True) + 1e-6)


def eps_after_the_root(_: Any, x: Tensor) -> Tensor:
    centered = x - mean(x)
    return centered / (mean(centered**2).sqrt() + 1e-6)


def without_keepdim(_: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(0) + 1e-6)


def returns_the_root(_: Any, x: Tensor) -> Any:
    root = torch.rsqrt(mean(x**2) + 1e-6)
    return x * root, root


def other_mean(_: Any, x: Tensor) -> Tensor:
    centered = x - mean(x, 1, 2)
    return centered * torch.rsqrt(mean(centered**2) + 1e-6)


def cast_on_one_side(_: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean(x.double() ** 2) + 1e-6)


@pytest.mark.parametrize(
    ("f", "because"),
    [
        (channels_first, "it normalizes over [1], not the last dimensions"),
        (unbiased, "the variance is unbiased"),
        (eps_outside, "eps is added to the standard deviation"),
        (eps_after_the_root, "eps is added to the standard deviation"),
        (without_keepdim, "do not keep the reduced dimension"),
        (returns_the_root, "(aten.rsqrt) has another user"),
        (other_mean, "mean and variance are taken over different dimensions"),
        (cast_on_one_side, "cast to another dtype on one side only"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refuses(f: Callable[[Any, Tensor], Any], because: str) -> None:
    refuses(Unary(f), (X,), RECOVER, because)


def test_refuses_a_mean_square_in_float16_but_not_one_in_float32() -> None:
    refuses(Unary(rms_norm), (X.half(),), RECOVER, "in float16, which overflows above 256")
    check(Unary(llama, w=W.half()), (X.half(),), RECOVER, changes=1)


def test_refuses_a_normalized_dimension_of_dynamic_size() -> None:
    dims = ({2: LENGTH},)
    refuses(Unary(rms_norm), (X,), RECOVER, "normalized dimension is dynamic", dynamic_shapes=dims)


@pytest.mark.parametrize(
    "f",
    [
        lambda _, x: x * torch.rsqrt(mean((x + 1) ** 2) + 1e-6),
        lambda _, x: x / torch.rsqrt(mean(x**2) + 1e-6),
        lambda _, x: x * torch.sqrt(mean(x**2) + 1e-6),
        lambda _, x: (x - mean(x + 1)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt(),
    ],
    ids=["square of another tensor", "divided by the inverse", "times the root", "another mean"],
)
def test_leaves_what_only_looks_alike(f: Callable[[Any, Tensor], Tensor]) -> None:
    unchanged(Unary(f), (X,), RECOVER)


# Meaning -------------------------------------------------------------------------------------


def test_the_definition_is_what_torch_computes() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(written_out(x, 1, 0.0, None, None, False), x / 12.5**0.5)
    assert torch.allclose(written_out(x, 1, 0.0, None, None, True), torch.tensor([[-1.0, 1.0]]))
    wide, w = random(3, 4, 8), random(4, 8, seed=1)
    torch.testing.assert_close(
        written_out(wide, 2, 1e-5, w, w, True), F.layer_norm(wide, [4, 8], w, w, 1e-5)
    )
    torch.testing.assert_close(
        written_out(wide, 2, 1e-5, w, None, False), F.rms_norm(wide, [4, 8], w, 1e-5)
    )


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dims=st.integers(1, 2),
    eps=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0]),
    centered=st.booleans(),
    weighted=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_norm_means_the_same(
    sizes: list[int],
    dims: int,
    eps: float,
    centered: bool,
    weighted: bool,
    shifted: bool,
    dtype: torch.dtype,
) -> None:
    dims = min(dims, len(sizes))
    # One value minus its own mean is 0: a quotient of roundings.
    sizes = [*sizes[:-1], sizes[-1] + 1]
    w = random(*sizes[-dims:], seed=1, dtype=dtype) if weighted else None
    b = random(*sizes[-dims:], seed=2, dtype=dtype) if shifted and centered else None
    tensors = {name: t for name, t in {"w": w, "b": b}.items() if t is not None}

    def norm(self: Any, x: Tensor) -> Tensor:
        w, b = getattr(self, "w", None), getattr(self, "b", None)
        return written_out(x, dims, eps, w, b, centered)

    module = Unary(norm, **tensors)
    result = check(module, (random(*sizes, dtype=dtype),), RECOVER, changes=1)
    assert len(result.program.operators) == 1


# Neighbors -----------------------------------------------------------------------------------


def test_takes_in_a_weight_that_is_computed_but_not_one_of_the_input() -> None:
    module = Unary(lambda self, x: rms_norm(self, x) * torch.exp(self.w), w=W)
    result = check(module, (X,), RECOVER, changes=1)
    assert next(n.name for n in result.program.operators) == "exp"
    alone = Unary(lambda self, x: (lambda y: y * y)(rms_norm(self, x)))
    result = check(alone, (random(8),), RECOVER, changes=1)
    assert len(result.program.operators) == 2


def test_leaves_other_readers_of_the_input_and_the_weight_alone() -> None:
    module = Unary(lambda self, x: (rms_norm(self, x) * self.w + x, self.w + 1), w=W)
    result = check(module, (X,), RECOVER, changes=1)
    (node,) = [n for n in result.program.operators if n.target is torch.ops.aten.rms_norm.default]
    assert node.meta["from"][:2] == ("recover-norms", "whole-norm")
    assert result.program.constants["w"].data_ptr() == module.w.data_ptr()  # type: ignore[operator]


def test_is_a_value() -> None:
    assert_is_a_value(RECOVER, "recover-norms")
