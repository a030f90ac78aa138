"""``quantize`` declines: each reason, and each error for what cannot be meant."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import NothingToDoError, PassError, RecipeError, RequirementError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe
from tests.passes.quantize.nets import calibrated, captured, conv, linear, normal
from tests.support.check import run_checked

X = normal(5, 4)


def reasons(program: Program, **options: Any) -> dict[str, str]:
    """Why operators were refused, by name; there may be an error besides."""
    result = run_checked(program, Quantize(**options), calibrated(program))
    return {refusal.node: refusal.reason for refusal in result.refusals}


def nothing(program: Program, because: str, **options: Any) -> None:
    """Assert that nothing can be quantized, and that the error says why."""
    with pytest.raises(NothingToDoError, match="nothing was quantized") as error:
        run_checked(program, Quantize(**options), calibrated(program))
    assert error.value.exit_code == 4
    assert because in str(error.value)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize(
    ("program", "because"),
    [
        (lambda: capture(Transposed().eval(), (normal(1, 2, 4, 4),)), "transposed convolutions"),
        (
            lambda: captured(lambda m, x, w: F.linear(x, w), X, normal(3, 4)),
            "its weight is computed, not constant",
        ),
        (
            lambda: captured(lambda m, x, w: F.conv1d(x, w), normal(1, 2, 5), normal(3, 2, 3)),
            "its weight is computed, not constant",
        ),
        (lambda: captured(lambda m, x: torch.einsum("ij,kj->ik", x, m.w), X, w=X), "einsum"),
        (lambda: captured(lambda m, x: x @ m.w, X, w=normal(4)), "is a vector"),
        (
            lambda: captured(lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), X, w=X.mT, b=X[:, 0]),
            "alpha or beta is not 1",
        ),
        (
            lambda: captured(lambda m, x: m.fc(x), X.half(), fc=linear().half()),
            "it computes in float16",
        ),
        (
            lambda: captured(lambda m, x: m.fc(x), X, fc=broken(math.inf)),
            "its weight holds values that are not finite",
        ),
        (
            lambda: captured(lambda m, x: m.rnn(x)[0], normal(1, 3, 4), rnn=nn.GRU(4, 3)),
            "no integer kernel for GRUs",
        ),
        (
            lambda: captured(lambda m, i: m.t(i), torch.tensor([1]), t=nn.Embedding(4, 2)),
            "without embedding=true",
        ),
        (
            lambda: captured(
                lambda m, q: F.scaled_dot_product_attention(q, q, q), normal(1, 2, 5, 4)
            ),
            "without attention=true",
        ),
        (
            lambda: captured(lambda m, q: ((q @ q.mT) / 2).softmax(-1) @ q, normal(1, 2, 5, 4)),
            "without attention=true",
        ),
    ],
)
def test_static_quantization_refuses(program: Any, because: str) -> None:
    nothing(program(), because)


def broken(value: float) -> nn.Module:
    layer = linear()
    with torch.no_grad():
        layer.weight[0, 0] = value
    return layer


@pytest.mark.parametrize(
    ("program", "because"),
    [
        (
            lambda: captured(lambda m, x: m.c(x), normal(1, 2, 6, 6), c=conv()),
            "convolutions gain nothing by ranges found at run time",
        ),
        (
            lambda: captured(lambda m, x: m.rnn(x)[0], normal(1, 3, 4), rnn=nn.GRU(4, 3)),
            "no integer kernel for GRUs",
        ),
    ],
)
def test_dynamic_quantization_refuses(program: Any, because: str) -> None:
    nothing(program(), because, mode="dynamic")


def test_rows_of_unknown_size_have_no_tokens() -> None:
    from torch.export import Dim

    class Products(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    size = {"x": {1: Dim("k", min=2, max=9)}, "y": {0: Dim("k", min=2, max=9)}}
    program = capture(Products().eval(), (normal(3, 4), normal(4, 5)), dynamic_shapes=size)
    nothing(program, "the size of its rows is not known", mode="dynamic", per_token=True)


def test_an_operator_between_that_reads_floats_is_refused_by_name() -> None:
    program = captured(
        lambda m, x, y: m.b(m.a(x) + y),
        normal(1, 2, 6, 6),
        normal(1, 4, 6, 6, seed=1),
        a=conv(2, 4),
        b=conv(4, 3),
    )
    assert reasons(program) == {"add": "it also reads a value that is not written in integers"}
    halved = captured(
        lambda m, x: m.b(m.a(x) * 0.5), normal(1, 2, 6, 6), a=conv(2, 4), b=conv(4, 3)
    )
    assert reasons(halved) == {"mul": "one of its operands is a plain number"}


def test_what_was_left_out_is_counted_in_the_error() -> None:
    program = captured(lambda m, x: m.fc(x), X, fc=linear())
    nothing(program, "1 left out by `where`", where=Where(exclude=("fc",)))


def test_a_pattern_that_matches_nothing_is_a_slip() -> None:
    program = captured(lambda m, x: m.encoder(x), X, encoder=linear())
    with pytest.raises(PassError, match="'encodr', which no operator answers to") as error:
        run_checked(program, Quantize(where=Where(exclude=("encodr",))), calibrated(program))
    assert "did you mean 'encoder'?" in str(error.value)


def test_static_ranges_need_calibration_and_the_others_do_not() -> None:
    program = captured(lambda m, x: m.fc(x), X, fc=linear())
    with pytest.raises(RequirementError, match="requires calibrated") as error:
        run_pipeline(program, Recipe((Quantize(),)))
    assert "pass calibration=" in str(error.value)
    for mode in ("dynamic", "weight"):
        run = run_pipeline(program, Recipe((Quantize(mode=mode),)))
        assert run.records[0].changed


def test_values_that_are_not_finite_say_nothing_about_ranges() -> None:
    program = captured(lambda m, x: m.fc(x.log()), X.abs(), fc=linear())
    context = calibrated(program)  # of both signs: the logarithm gives NaN
    with pytest.raises(PassError, match="NaN or infinite"):
        run_checked(program, Quantize(), context)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quantize{granularity=block}", "blocks, and nothing else, have a size"),
        ("quantize{block_size=32}", "blocks, and nothing else, have a size"),
        ("quantize{granularity=block,block_size=32}", "use mode=weight"),
        ("quantize{per_token=true}", "per_token is for mode=dynamic"),
        ("quantize{mode=dynamic,activations=none}", "mode=weight"),
        ("quantize{saturation=reduced,weights=int4}", "int4 fits as it is"),
        ("quantize{saturation=signed,mode=weight}", "no attention, no saturation"),
        ("quantize{attention=true,mode=weight}", "no attention, no saturation"),
        ("quantize{range=mse,mode=dynamic}", "range is for mode=static"),
        ("quantize{between=all,padding_mask=null,mode=weight}", "between and padding_mask is for"),
        ("quantize{mode=statik}", "statik"),
        ("quantize{wher={}}", "did you mean 'where'?"),
    ],
)
def test_options_that_contradict_each_other_are_errors(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert says in str(error.value)


def test_a_program_without_products_is_an_error() -> None:
    program = captured(lambda m, x: x.relu(), X)
    with pytest.raises(NothingToDoError, match="no operator that computes on integers"):
        Quantize(mode="weight").run(program.clone(), PassContext())
