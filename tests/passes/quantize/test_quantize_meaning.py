"""What ``quantize`` makes of numbers: known answers, and errors that behave."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.ops import aten
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.weights import (
    INT32,
    Codes,
    decibels,
    quantize_bias,
    quantize_weight,
    room_for_bias,
    weight_scheme,
)
from planish.passes.recipe import Recipe
from tests.passes.quantize.nets import (
    calibrated,
    captured,
    conv,
    linear,
    normal,
    residual_net,
    seeded,
)
from tests.support.check import run_checked
from tests.support.strategies import seeds


def error_db(program: Program, pass_: Quantize, context: PassContext | None = None) -> float:
    """Signal to noise of the quantized program's first output on the sample."""
    result = run_checked(program, pass_, context or calibrated(program))
    sample = program.samples[0]
    return decibels(run(program, sample)[0], run(result.program, sample)[0])


def test_numbers_on_the_grid_are_exact() -> None:
    """Integers times a power of two, a weight that reaches 127: nothing is rounded."""
    layer = linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, -3, 5], [1, -127, 0]]) / 64)
        layer.bias.copy_(torch.tensor([1.0, -2.0]))
    x = torch.tensor([[0.0, 255.0, 17.0], [3.0, 200.0, 1.0]]) / 16
    program = captured(lambda m, x: m.fc(x), x, fc=layer)
    context = PassContext(calibration=spool([(x,)], program))
    result = run_checked(program, Quantize(), context)
    scale = result.program.constants["inputs_0_scale"]
    assert isinstance(scale, Tensor)
    assert float(scale) == 1 / 16
    assert torch.equal(run(result.program, (x,))[0], run(program, (x,))[0])


@settings(max_examples=15, deadline=None)
@given(seeds(), st.sampled_from(["static", "dynamic", "weight"]), st.booleans())
def test_outputs_are_off_by_no_more_than_their_operands(seed: int, mode: str, bias: bool) -> None:
    """|y - y'| <= sum |x| dw + sum (|w| + dw) dx + db, with half a step for each operand."""
    torch.manual_seed(seed)
    layer = nn.Linear(7, 3, bias=bias)
    x = normal(6, 7, seed=seed)
    program = captured(lambda m, x: m.fc(x), x, fc=layer)
    context = PassContext(calibration=spool([(x,)], program))
    pass_ = Quantize(mode=mode)  # type: ignore[arg-type]  # one of a Literal
    result = run_checked(program, pass_, context)
    w = layer.weight.detach()
    dw = w.abs().amax(1, keepdim=True) / 127 / 2
    dx = 0.0 if mode == "weight" else float(x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
    bound = x.abs() @ dw.expand_as(w).T + dx * (w.abs() + dw).sum(1) + dx * dw.flatten() * 2
    found = (run(result.program, (x,))[0] - run(program, (x,))[0]).abs()
    assert bool((found <= bound * 1.001 + 1e-5).all())


@pytest.mark.parametrize("make", [residual_net, lambda: linears()])
def test_the_error_falls_as_bits_rise(make: Any) -> None:
    program = make()
    by_bits = [
        error_db(program, Quantize(mode="weight", weights=weights, saturation="none"))
        for weights in ("int4", "int8")
    ]
    assert by_bits == sorted(by_bits)
    assert by_bits[1] > by_bits[0] + 15
    blocks = [
        error_db(
            program, Quantize(mode="weight", weights="int4", granularity="block", block_size=b)
        )
        for b in (8, 4, 2)
    ]
    assert blocks == sorted(blocks)


def linears() -> Program:
    return captured(
        lambda m, x: m.b(m.a(x).relu()), normal(16, 24), a=linear(24, 16), b=linear(16, 8)
    )


def test_static_quantization_is_near() -> None:
    assert error_db(residual_net(), Quantize()) > 35
    assert error_db(linears(), Quantize()) > 30


def test_scales_per_channel_serve_small_channels() -> None:
    layer = linear(24, 4, bias=False)
    with torch.no_grad():
        layer.weight[0] *= 0.01
    program = captured(lambda m, x: m.fc(x)[:, 0], normal(9, 24), fc=layer)
    channel, tensor = (error_db(program, Quantize(granularity=g)) for g in ("channel", "tensor"))
    assert channel > 30
    assert tensor < 10


def test_dynamic_ranges_of_tokens_are_nearer_than_one_range() -> None:
    x = normal(8, 24) * torch.logspace(-2, 1, 8)[:, None]
    program = captured(lambda m, x: m.a(x), x, a=linear(24, 16, bias=False))
    whole, rows = (error_db(program, Quantize(mode="dynamic", per_token=p)) for p in (False, True))
    assert rows >= whole


def test_a_right_operand_is_quantized_as_a_whole() -> None:
    """Its rows are summed over, so rows of it cannot have scales of their own."""
    program = captured(lambda m, x, y: x @ y, normal(5, 4), normal(4, 6))
    result = run_checked(program, Quantize(mode="dynamic", per_token=True))
    (product,) = [n for n in result.program.operators if n.target is aten.matmul.default]
    assert [n.kwargs.get("block_size") for n in product.all_input_nodes] == [4, None]


def test_less_than_seven_bits_of_weights_cost_accuracy_and_signs_cost_none() -> None:
    program = linears()
    plain, reduced, signed = (
        error_db(program, Quantize(saturation=s)) for s in ("none", "reduced", "signed")
    )
    assert plain > reduced
    assert signed == pytest.approx(plain, abs=1e-6)  # the same steps, counted from -128


# Weights and biases -------------------------------------------------------------------------------

CHANNEL = QuantScheme(granularity="channel", axis=0, narrow=True)


def test_a_weight_of_known_codes() -> None:
    w = torch.tensor([[1.0, -0.5, 0.25], [-12.7, 6.3, 0.1]])
    codes = quantize_weight(w, CHANNEL)
    assert codes.codes.tolist() == [[127, -64, 32], [-127, 63, 1]]
    torch.testing.assert_close(codes.scale, torch.tensor([1 / 127, 0.1]))


def test_a_dead_channel_takes_the_largest_scale_of_the_others() -> None:
    w = torch.tensor([[1.27, 0.0], [0.0, 0.0], [12.7, 0.0]])
    codes = quantize_weight(w, CHANNEL)
    torch.testing.assert_close(codes.scale, torch.tensor([0.01, 0.1, 0.1]))
    assert codes.codes[1].tolist() == [0, 0]


@pytest.mark.parametrize("dead", ["one channel", "all"])
def test_the_bias_of_a_dead_channel_survives(dead: str) -> None:
    layer = linear(4, 3)
    with torch.no_grad():
        (layer.weight if dead == "all" else layer.weight[1]).zero_()
        layer.bias.copy_(torch.tensor([0.3, 0.0137, -2.0]))
    program = captured(lambda m, x: m.fc(x), normal(5, 4), fc=layer)
    result = run_checked(program, Quantize(), calibrated(program))
    y, z = (run(p, program.samples[0])[0] for p in (program, result.program))
    torch.testing.assert_close(z[:, 1], y[:, 1], rtol=0, atol=1e-3 if dead == "all" else 5e-3)


def test_searched_ranges_never_raise_the_error() -> None:
    for granularity, axis, block in (("channel", 0, 0), ("block", 1, 4), ("tensor", None, 0)):
        for symmetric in (False, True):
            scheme = QuantScheme(
                dtype="int4",
                granularity=granularity,  # type: ignore[arg-type]  # one of a Literal
                axis=axis,
                block_size=block,
                symmetric=symmetric,
            )
            w = normal(5, 10)
            plain = (quantize_weight(w, scheme).real() - w).square().sum()
            searched = (quantize_weight(w, scheme, search=True).real() - w).square().sum()
            assert float(searched) <= float(plain)
    outlier = torch.cat([normal(1, 63), torch.tensor([[8.0]])], 1)
    scheme = QuantScheme(dtype="int4", granularity="channel", axis=0)
    plain = (quantize_weight(outlier, scheme).real() - outlier).square().sum()
    searched = (quantize_weight(outlier, scheme, search=True).real() - outlier).square().sum()
    assert float(searched) < float(plain)


def test_biases_of_known_codes() -> None:
    bias = torch.tensor([1.0, -0.26, 0.24])
    found = quantize_bias(bias, torch.tensor([0.5, 0.5, 0.5]))
    assert found is not None
    assert found.dtype == torch.int32
    assert found.tolist() == [2, -1, 0]
    assert quantize_bias(torch.tensor([float(INT32)]), torch.tensor(0.5)) is None
    assert quantize_bias(torch.tensor([math.nan]), torch.tensor(0.5)) is None


def test_scales_are_raised_until_a_bias_fits() -> None:
    w = torch.tensor([[1.0, 0.5], [1e-8, 5e-9]])
    codes = quantize_weight(w, CHANNEL)
    bias, x_scale = torch.tensor([1.0, 1.0]), torch.tensor(0.01)
    assert quantize_bias(bias, x_scale * codes.scale) is None
    raised = room_for_bias(codes, bias, x_scale)
    assert float(raised[0]) == float(codes.scale[0])
    assert float(raised[1]) == pytest.approx(1 / (0.01 * 2**30), rel=1e-5)
    found = quantize_bias(bias, x_scale * raised)
    assert found is not None
    assert found[1] == pytest.approx(2**30, rel=1e-5)


def test_a_bias_too_large_for_its_weights_is_remarked() -> None:
    layer = linear(4, 3)
    with torch.no_grad():
        layer.weight[1] *= 1e-9
    program = captured(lambda m, x: m.fc(x), normal(5, 4), fc=layer)
    context: Any = calibrated(program)
    result = run_checked(program, Quantize(), context)
    assert any("1 channels are so small beside their bias" in r for r in context.remarks)
    y, z = (run(p, program.samples[0])[0] for p in (program, result.program))
    torch.testing.assert_close(z[:, 1], y[:, 1], rtol=1e-4, atol=1e-6)


@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 12), seeds())
def test_blocks_are_no_longer_than_rows(rows: int, columns: int, block: int, seed: int) -> None:
    wanted = QuantScheme(dtype="uint4", granularity="block", axis=0, block_size=block)
    scheme = weight_scheme(wanted, 0, 1, (rows, columns))
    w = normal(rows, columns, seed=seed)
    codes = quantize_weight(w, scheme)
    assert isinstance(codes, Codes)
    assert codes.real().shape == w.shape
    if columns > 1:
        assert codes.scale.shape == (rows, -(-columns // min(block, columns)))
    else:
        assert codes.scale.shape == (rows,)  # one element is no block: per channel


def test_depthwise_weights_have_channels_instead_of_blocks() -> None:
    depthwise = seeded(lambda: nn.Conv2d(4, 4, 3, groups=4))
    program = captured(lambda m, x: m.c(x), normal(1, 4, 6, 6), c=depthwise)
    options = {"granularity": "block", "block_size": 32, "weights": "int4"}
    pass_ = Quantize(mode="weight", **options)  # type: ignore[arg-type]  # the caller's options
    result = run_checked(program, pass_)
    scale = result.program.constants["c.weight_scale"]
    assert isinstance(scale, Tensor)
    assert scale.shape == (4,)


def test_ranges_leave_out_padding() -> None:
    """Padding of a thousand would take all 255 steps; masked out, it saturates."""

    def embed(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.fc(x)

    x = normal(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    x[mask == 0] = 1000.0
    program = captured(embed, x, mask, fc=linear())
    kept = mask.bool()
    errors = []
    for name in (None, "inputs_1"):
        context = PassContext(calibration=spool([(x, mask)], program))
        result = run_checked(program, Quantize(padding_mask=name), context)
        y, z = (run(p, (x, mask))[0][kept] for p in (program, result.program))
        errors.append(decibels(y, z))
    assert errors[0] < 10
    assert errors[1] > 35


def test_padding_is_found_by_the_name_of_its_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = linear()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x)

    x, mask = normal(2, 6, 4), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    x[mask == 0] = 1000.0
    scales = {}
    for name, given_mask in (("whole", mask), ("to add", mask.float())):
        program = capture(Masked().eval(), (x, given_mask))
        context: Any = calibrated(program)
        context.calibration = spool([(x, given_mask)], program)
        result = run_checked(program, Quantize(), context).program
        scales[name] = float(result.constants["x_scale"])  # type: ignore[arg-type]  # a tensor, no module
        told = "ranges leave out padding, where attention_mask is 0" in context.remarks
        assert told == (name == "whole")
    assert scales["whole"] < 0.1 < 3 < scales["to add"]


def test_relu6_leaves_a_range_that_needs_no_clamp() -> None:
    program = captured(
        lambda m, x: m.b(torch.nn.functional.relu6(m.a(x) * 9)),
        normal(1, 2, 6, 6),
        a=conv(2, 4),
        b=conv(4, 3),
    )
    result = run_checked(program, Quantize(), calibrated(program))
    scale, zero = (result.program.constants[f"relu6_{x}"] for x in ("scale", "zero_point"))
    assert isinstance(scale, Tensor)
    assert isinstance(zero, Tensor)
    assert float(scale) * 255 <= 6 * (1 + 1e-6)
    assert int(zero) == 0


@pytest.mark.parametrize("mode", ["static", "weight"])
def test_tiny_weights_are_written_and_what_is_below_any_step_is_said(mode: Any) -> None:
    """1e-35 is written like any other weight; a denormal has no step, and a remark says so."""
    program = _scaled(1e-35, 1e-40)
    remarks: list[str] = []
    context = replace(calibrated(program), remark=remarks.append)
    found = run_pipeline(program, Recipe(passes=(Quantize(mode=mode),)), context).program
    tensors = {n: v for n, v in found.constants.items() if isinstance(v, Tensor)}
    (codes,) = [v for v in tensors.values() if v.dtype == torch.int8 and v.dim() == 2]
    (scale,) = [v for n, v in tensors.items() if n.endswith("weight_scale")]
    assert codes[:2].abs().amax(1).tolist() == [127, 127]
    assert codes[2].abs().max() == 0
    assert float(scale.min()) >= torch.finfo(torch.float32).tiny
    assert [r for r in remarks if "1 of 3 groups of it are too small for a step" in r]


def _scaled(second: float, third: float) -> Program:
    """A linear layer without a bias whose rows are of these magnitudes."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] *= second
        layer.weight[2] *= third
    return capture(layer.eval(), (torch.randn(5, 4),))
