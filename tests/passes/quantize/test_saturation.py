"""Sums of pairs in 16 bits: known answers, which operators they touch, and where a file holds."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.execute import run
from planish.ir.ops import argument
from planish.ir.program import Program
from planish.passes.quantize.kernel_rows import (
    is_convolution,
    mixed_operators,
    rows_of,
    zero_point_of,
)
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.saturation import (
    EVERYWHERE,
    WIDE,
    can_saturate,
    instruction_sets,
    measure,
    pair_sums,
    portability,
    saturating_operators,
    saturating_product,
)
from tests.passes.quantize.nets import calibrated, captured, conv, linear, normal
from tests.support.check import run_checked
from tests.support.strategies import seeds


def codes(*values: int) -> tuple[Tensor, Tensor]:
    """Half of the values as uint8, the other half as int8, one row each."""
    half = len(values) // 2
    x, w = torch.tensor([values[:half]]), torch.tensor([values[half:]])
    return x.to(torch.uint8), w.to(torch.int8)


def test_known_sums() -> None:
    assert pair_sums(*codes(255, 255, 127, 127)).tolist() == [[[64770]]]
    product, count = saturating_product(*codes(255, 255, 127, 127))
    assert (product.tolist(), count) == ([[32767]], 1)
    product, count = saturating_product(*codes(255, 255, -128, -127))
    assert (product.tolist(), count) == ([[-32768]], 1)
    # The pairs saturate one by one; that their sum would fit does not help.
    product, count = saturating_product(*codes(255, 255, 255, 255, 127, 127, -127, -127))
    assert (product.tolist(), count) == ([[-1]], 2)
    # Seven bits fit: 255 * 2 * 63 = 32130.
    product, count = saturating_product(*codes(255, 255, 63, 63))
    assert (product.tolist(), count) == ([[32130]], 0)
    # An odd last element is alone.
    product, count = saturating_product(*codes(1, 2, 255, 3, 4, 127))
    assert (product.tolist(), count) == ([[3 + 8 + 32385]], 0)


@given(seeds(), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9))
def test_without_saturation_it_is_the_product(seed: int, m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (m, k), generator=generator).to(torch.uint8)
    w = torch.randint(-63, 64, (n, k), generator=generator).to(torch.int8)
    product, count = saturating_product(x, w)
    assert count == 0
    assert torch.equal(product, x.int() @ w.int().T)
    assert not can_saturate(w)


@given(seeds(), st.integers(1, 4), st.integers(1, 9), st.integers(60, 127))
def test_what_can_saturate_does_for_some_operand(seed: int, n: int, k: int, largest: int) -> None:
    """The worst operand is 255 where weights have the sign of their pair's sum, else 0."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-largest, largest + 1, (n, k), generator=generator).to(torch.int8)
    worst = [torch.where(w * sign > 0, 255, 0).to(torch.uint8) for sign in (1, -1)]
    saturated = sum(saturating_product(x, w)[1] for rows in worst for x in rows.split(1))
    assert can_saturate(w) == (saturated > 0)


def small_net() -> Program:
    """A grouped convolution with stride, dilation and padding; a depthwise one; two linears."""
    parts = {
        "a": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        "b": conv(6, 6, groups=6),
        "c": conv(6, 4, padding="same"),
        "d": linear(4, 5),
    }

    def f(m: Any, x: Tensor) -> Tensor:
        y = m.c(m.b(torch.relu(m.a(x))))
        return m.d(y.mean((2, 3)))

    torch.manual_seed(0)
    return captured(f, normal(2, 4, 8, 8), **parts)


def quantized(program: Program, **options: Any) -> Program:
    return run_checked(program, Quantize(**options), calibrated(program)).program


def test_the_rows_of_every_product_give_its_result() -> None:
    """Integer sums over the rows, rescaled, are what the quantized program computes."""
    program = quantized(small_net())
    values: dict[Any, Any] = {}
    run(program, program.samples[0], observe=values.__setitem__)
    seen = []
    for mixed in mixed_operators(program):
        assert mixed.codes is not None
        scale, zero = (program.constant(a) for a in mixed.codes.args[1:3])
        rows = rows_of(mixed, values[mixed.codes], zero_point_of(mixed, program))
        sums = [
            (x.double() - float(zero)) @ w.double().T  # type: ignore[arg-type]  # a tensor or a number
            for x, w in zip(rows, mixed.weight, strict=True)
        ]
        weight, bias = argument(mixed.node, "weight"), argument(mixed.node, "bias")
        w_scale, b_codes, b_scale = (
            program.constant(v) for v in (weight.args[1], bias.args[0], bias.args[1])
        )
        assert w_scale is not None
        assert b_codes is not None
        assert b_scale is not None
        assert scale is not None
        real = torch.cat(sums, 1) * scale * w_scale + b_codes * b_scale
        wanted = values[mixed.node]
        if is_convolution(mixed.node):
            wanted = wanted.movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(real.float(), wanted, rtol=1e-4, atol=1e-5)
        seen.append(mixed.node.name)
    assert seen == ["conv2d", "conv2d_2", "linear"]  # depthwise kernels widen first


def test_operators_are_told_by_their_own_weights() -> None:
    program = quantized(small_net())
    assert saturating_operators(program) == ("conv2d", "conv2d_2", "linear")
    assert instruction_sets(program) == WIDE
    (sentence,) = portability(program)
    assert "in 3 operators" in sentence


@pytest.mark.parametrize(
    "options",
    [
        {"saturation": "reduced"},
        {"saturation": "signed"},
        {"weights": "uint8"},
        {"weights": "int4"},
        {"mode": "weight"},
    ],
)
def test_portable_schemes_cannot_saturate(options: dict[str, Any]) -> None:
    program = quantized(small_net(), **options)
    assert saturating_operators(program) == ()
    assert instruction_sets(program) == EVERYWHERE
    assert portability(program) == ()
    assert all(s.saturated == 0 for s in measure(program, program.samples[0]))


def test_saturation_on_real_inputs_is_counted_and_its_error_given() -> None:
    layer = linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[1].mul_(torch.tensor([1.0, -1.0] * 4))
    x = torch.cat([torch.ones(1, 8), torch.zeros(1, 8)])
    program = quantized(captured(lambda m, x: m.fc(x), x.abs(), fc=layer))
    result = {s.node: s for s in measure(program, (torch.ones(2, 8) * 3,))}["linear"]
    # The largest values are 255: four pairs of 255 * 254 saturate in each row, those of both
    # signs do not.
    assert (result.pairs, result.saturated) == (16, 8)
    exact, cut = 4 * 2 * 255 * 127, 4 * 32767
    assert result.sqnr_db == pytest.approx(20 * math.log10(exact / (exact - cut)), abs=0.01)


def test_dynamic_values_and_recurrent_weights_count_too() -> None:
    program = captured(lambda m, x: m.fc(x), normal(5, 4), fc=linear())
    assert saturating_operators(quantized(program, mode="dynamic")) == ("linear",)
    assert measure(quantized(program, mode="dynamic"), program.samples[0])[0].pairs == 5 * 3 * 2
    rnn = captured(lambda m, x: m.rnn(x)[0], normal(1, 3, 4), rnn=nn.LSTM(4, 3))
    assert saturating_operators(quantized(rnn, mode="dynamic")) == ("lstm",)
    assert measure(quantized(rnn, mode="dynamic"), rnn.samples[0]) == ()


def test_products_of_two_values_never_saturate() -> None:
    program = captured(lambda m, x, y: x @ y, normal(5, 4), normal(4, 6))
    assert instruction_sets(quantized(program)) == EVERYWHERE


def test_products_by_matrices_for_each_batch() -> None:
    program = captured(lambda m, x: x @ m.w, normal(2, 5, 4), w=normal(2, 4, 3))
    integers = quantized(program)
    (mixed,) = mixed_operators(integers)
    assert mixed.weight.shape == (2, 3, 4)
    assert measure(integers, program.samples[0])[0].pairs == 2 * 5 * 3 * 2
