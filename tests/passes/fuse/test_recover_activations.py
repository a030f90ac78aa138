import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from planish.passes.fuse.activations import RecoverActivations, written_out
from tests.passes.fuse.modules import BATCH, Unary, assert_is_a_value, random
from tests.support.check import check, refuses, unchanged

RECOVER = RecoverActivations()
ALL = RecoverActivations(softplus=True)
X = random(3, 4) * 3
K = math.sqrt(2 / math.pi)
erf, exp, sigmoid, tanh = torch.erf, torch.exp, torch.sigmoid, torch.tanh

FORMS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "gelu": [
        lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
        lambda x: 0.5 * x * (1 + erf(x * 0.70710678)),
        lambda x: x * (0.5 * (erf(x / 2**0.5) + 1)),
        lambda x: (1 + erf(x / 2**0.5)) * x / 2,
        lambda x: 0.5 * x + 0.5 * x * erf(x / 2**0.5),
        lambda x: x * (0.5 + 0.5 * erf(x / 2**0.5)),
    ],
    'gelu(approximate="tanh")': [
        lambda x: 0.5 * x * (1 + tanh(K * (x + 0.044715 * torch.pow(x, 3)))),
        lambda x: x * 0.5 * (1 + tanh(x * 0.79788456 * (1 + 0.044715 * x * x))),
        lambda x: 0.5 * (1 + tanh(0.7978845608 * (0.044715 * x * x * x + x))) * x,
    ],
    "silu": [lambda x: x * sigmoid(x), lambda x: sigmoid(x) * x, lambda x: x / (1 + exp(-x))],
    "sigmoid": [lambda x: (1 + exp(-x)).reciprocal(), lambda x: torch.reciprocal(exp(x * -1) + 1)],
    "hardsigmoid": [
        lambda x: (x + 3).clamp(0, 6) / 6,
        lambda x: F.relu6(x + 3) * (1 / 6),
        lambda x: F.hardtanh(3 + x, 0.0, 6.0) / 6,
        lambda x: (x / 6 + 0.5).clamp(0, 1),
        lambda x: (x + 3).clamp_min(0).clamp_max(6) / 6,
    ],
    "hardswish": [
        lambda x: x * (x + 3).clamp(0, 6) / 6,
        lambda x: x * (F.relu6(x + 3) / 6),
        lambda x: x / 6 * F.hardtanh(x + 3, 0.0, 6.0),
        lambda x: F.hardsigmoid(x) * x,
        lambda x: F.relu(x + 3).clamp_max(6) / 6 * x,
    ],
    "softplus": [lambda x: torch.log(1 + exp(x)), lambda x: torch.log1p(exp(x))],
    "mish": [lambda x: x * tanh(F.softplus(x)), lambda x: tanh(torch.log1p(exp(x))) * x],
}


def of(f: Callable[[Tensor], Any]) -> Unary:
    """``f`` of a sum, as a residual network would have it."""
    return Unary(lambda _, x: f(x + 1.5))


# Fires ---------------------------------------------------------------------------------------


def test_recovers_gelu() -> None:
    check(
        of(FORMS["gelu"][0]),
        (X,),
        RECOVER,
        """
        program(%x: f32[batch, 4])
          %0: f32[batch, 4] = aten.add.Tensor(%x, other=1.5)
          %1: f32[batch, 4] = aten.gelu(%0)
          return %1
        """,
        dynamic_shapes=({0: BATCH},),
        changes=1,
    )


def test_recovers_gelu_of_tanh() -> None:
    check(
        of(FORMS['gelu(approximate="tanh")'][0]),
        (X,),
        RECOVER,
        """
        program(%x: f32[3, 4])
          %0: f32[3, 4] = aten.add.Tensor(%x, other=1.5)
          %1: f32[3, 4] = aten.gelu(%0, approximate='tanh')
          return %1
        """,
        changes=1,
    )


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, forms in FORMS.items() for i in range(len(forms))]
)
def test_recovers_every_form(name: str, number: int) -> None:
    result = check(of(FORMS[name][number]), (X,), ALL)
    (_, node) = result.program.operators
    assert str(node.target) == f"aten.{name.partition('(')[0]}.default"
    assert ("approximate" in node.kwargs) == ("tanh" in name)


def test_works_on_the_widened_input_where_a_cast_is_inside() -> None:
    module = Unary(lambda _, x: x * sigmoid(x.float()))
    check(
        module,
        (X.to(torch.bfloat16),),
        RECOVER,
        """
        program(%x: bf16[3, 4])
          %0: f32[3, 4] = aten.to.dtype(%x, dtype=f32)
          %1: f32[3, 4] = aten.silu(%0)
          return %1
        """,
        changes=1,
    )


# Refuses -------------------------------------------------------------------------------------


def gated_twice(x: Tensor) -> Tensor:
    gate = sigmoid(x)
    return x * gate + gate


@pytest.mark.parametrize(
    ("f", "because"),
    [
        (lambda x: x * sigmoid(1.702 * x), "x * sigmoid(1.702 x) is QuickGELU"),
        (lambda x: x * 0.5 * (1 + erf(x / 2)), "constants are not those of gelu"),
        (lambda x: 0.5 * x * (1 + tanh(K * (x + 0.05 * x**3))), "constants are not those of gelu"),
        (lambda x: x * (x + 2).clamp(0, 6) / 6, "constants are not those of hardswish"),
        (gated_twice, "(aten.sigmoid) has another user"),
        (lambda x: (2 * x) / (1 + exp(-x)), "what is divided by 1 + exp(-x) is not x"),
    ],
    ids=["quick gelu", "erf", "cubic", "offset", "second user", "quotient"],
)
def test_refuses(f: Callable[[Tensor], Tensor], because: str) -> None:
    refuses(of(f), (X,), RECOVER, because)


def test_refuses_constants_of_six_digits_in_float64() -> None:
    short, exact = FORMS["gelu"][1], FORMS["gelu"][0]
    refuses(of(short), (X.double(),), RECOVER, "constants are not those of gelu")
    check(of(exact), (X.double(),), RECOVER, changes=1)


def test_refuses_softplus_unless_asked_for_and_in_float64() -> None:
    module = of(FORMS["softplus"][0])
    refuses(module, (X,), RECOVER, "is infinite for large x and softplus is not")
    refuses(module, (X.double(),), ALL, "not exact in float64")


def test_refuses_a_formula_that_changes_the_dtype() -> None:
    module = Unary(lambda _, x: 0.5 * x.float() * (1 + erf(x / 2**0.5)))
    because = "the formula changes the dtype or shape"
    refuses(module, (X.to(torch.bfloat16),), RECOVER, because)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x + 1) * sigmoid(x),
        lambda x: x * tanh(x),
        lambda x: x + erf(x),
        lambda x: (x + 3).clamp(-1, 6) / 6,
        lambda x: torch.log(2 + exp(x)),
        lambda x: F.softplus(x, beta=2).tanh() * x,
        lambda x: 1 / (1 + exp(x)),
    ],
    ids=["x + 1", "tanh", "sum", "clamp", "log", "beta", "exp of x"],
)
def test_leaves_what_only_looks_alike(f: Callable[[Tensor], Tensor]) -> None:
    unchanged(of(f), (X,), RECOVER)


# Meaning -------------------------------------------------------------------------------------

DEFINED = ["gelu", "gelu_tanh", "silu", "hardsigmoid", "hardswish", "softplus", "mish"]


@pytest.mark.parametrize("name", DEFINED)
def test_the_formula_is_what_torch_computes(name: str) -> None:
    x = torch.linspace(-9, 9, 37)
    if name == "gelu_tanh":
        expected = F.gelu(x, approximate="tanh")
    else:
        expected = getattr(F, name)(x)
    torch.testing.assert_close(written_out(name, x), expected, rtol=1e-5, atol=1e-6)


def test_known_answers() -> None:
    x = torch.tensor([-4.0, 0.0, 3.0])
    assert written_out("hardswish", x).tolist() == [0.0, 0.0, 3.0]
    assert written_out("hardsigmoid", x).tolist() == [0.0, 0.5, 1.0]
    assert math.isclose(written_out("softplus", x)[1].item(), math.log(2), rel_tol=1e-6)


@given(
    name=st.sampled_from(DEFINED),
    sizes=st.lists(st.integers(1, 4), max_size=3),
    spread=st.sampled_from([0.01, 1.0, 15.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_and_range_means_the_same(
    name: str, sizes: list[int], spread: float, dtype: torch.dtype
) -> None:
    module = Unary(lambda _, x: written_out(name, x))
    result = check(module, (random(*sizes, dtype=dtype) * spread,), ALL)
    assert len(result.program.operators) == 1


@pytest.mark.parametrize("name", [name for name in DEFINED if name != "softplus"])
def test_far_from_zero_means_the_same(name: str) -> None:
    check(Unary(lambda _, x: written_out(name, x)), (random(64) * 1000,), RECOVER)


# Neighbors -----------------------------------------------------------------------------------


def test_leaves_other_readers_of_the_input_alone() -> None:
    result = check(of(lambda x: (x * sigmoid(x), x + 1)), (X,), RECOVER, changes=1)
    node = next(n for n in result.program.operators if "silu" in n.name)
    assert node.meta["from"][:2] == ("recover-activations", "gate")
    assert result.changes[0].removed == ("mul", "sigmoid")


def test_the_longest_formula_wins_and_what_follows_stays() -> None:
    result = check(of(lambda x: 3 * (x * ((x + 3).clamp(0, 6) / 6))), (X,), RECOVER, changes=1)
    names = [str(n.target) for n in result.program.operators]
    assert names == ["aten.add.Tensor", "aten.hardswish.default", "aten.mul.Tensor"]


def test_is_a_value() -> None:
    assert_is_a_value(RECOVER, "recover-activations")
    assert_is_a_value(ALL, "recover-activations{softplus=true}")
