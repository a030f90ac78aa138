"""``quantize`` fires: the text it makes, for each mode and each operator."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.passes.base import PassResult
from planish.passes.quantize.operands import DEQUANTIZE, is_dequantized, operands_of
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.where import Where
from tests.passes.quantize.nets import calibrated, captured, conv, linear, normal, residual_net
from tests.support.check import check

X = normal(5, 4)


def quantized(program: Program, **options: Any) -> PassResult:
    return check(program, (), Quantize(**options), context=calibrated(program))


def test_a_static_linear() -> None:
    program = captured(lambda m, x: m.fc(x), X, fc=linear())
    check(
        program,
        (),
        Quantize(),
        """
        program(%inputs_0: f32[5, 4])
          const @fc.bias_int32: i32[3]
          const @fc.bias_scale: f32[3]
          const @fc.bias_zero_point: i32[3]
          const @fc.weight_int8: i8[3, 4]
          const @fc.weight_scale: f32[3]
          const @fc.weight_zero_point: i8[3]
          const @inputs_0_scale: f32[]
          const @inputs_0_zero_point: u8[]
          %0: u8[5, 4] = planish.quantize(%inputs_0, @inputs_0_scale, @inputs_0_zero_point, dtype='uint8')
          %1: f32[5, 4] = planish.dequantize(%0, @inputs_0_scale, @inputs_0_zero_point, dtype='uint8')
          %2: f32[3, 4] = planish.dequantize(@fc.weight_int8, @fc.weight_scale, @fc.weight_zero_point, dtype='int8', axis=0)
          %3: f32[3] = planish.dequantize(@fc.bias_int32, @fc.bias_scale, @fc.bias_zero_point, dtype='int32', axis=0)
          %4: f32[5, 3] = aten.linear(%1, %2, %3)
          return %4
        """,  # noqa: E501 - the text as it is printed
        changes=1,
        context=calibrated(program),
    )


def test_a_dynamic_linear_with_a_scale_for_each_token() -> None:
    program = captured(lambda m, x: m.fc(x), X, fc=linear())
    check(
        program,
        (),
        Quantize(mode="dynamic", per_token=True),
        """
        program(%inputs_0: f32[5, 4])
          const @fc.bias: f32[3]
          const @fc.weight_int8: i8[3, 4]
          const @fc.weight_scale: f32[3]
          const @fc.weight_zero_point: i8[3]
          %0: (u8[5, 4], f32[5, 1], u8[5, 1]) = planish.dynamic_quantize(%inputs_0, per_token=True)
          %1: u8[5, 4] = sym.getitem(%0, 0)
          %2: f32[5, 1] = sym.getitem(%0, 1)
          %3: u8[5, 1] = sym.getitem(%0, 2)
          %4: f32[5, 4] = planish.dequantize(%1, %2, %3, dtype='uint8', axis=-1, block_size=4)
          %5: f32[3, 4] = planish.dequantize(@fc.weight_int8, @fc.weight_scale, @fc.weight_zero_point, dtype='int8', axis=0)
          %6: f32[5, 3] = aten.linear(%4, %5, @fc.bias)
          return %6
        """,  # noqa: E501 - lines of a printed program
        changes=1,
    )


def test_weights_in_blocks_of_four_bits() -> None:
    program = captured(lambda m, x: m.fc(x), X, fc=linear())
    options = {"weights": "uint4", "granularity": "block", "block_size": 2}
    check(
        program,
        (),
        Quantize(mode="weight", **options),  # type: ignore[arg-type]  # the caller's options
        """
        program(%inputs_0: f32[5, 4])
          const @fc.bias: f32[3]
          const @fc.weight_scale: f32[3, 2]
          const @fc.weight_uint4: u8[3, 4]
          const @fc.weight_zero_point: u8[3, 2]
          %0: f32[3, 4] = planish.dequantize(@fc.weight_uint4, @fc.weight_scale, @fc.weight_zero_point, dtype='uint4', axis=1, block_size=2)
          %1: f32[5, 3] = aten.linear(%inputs_0, %0, @fc.bias)
          return %1
        """,  # noqa: E501 - lines of a printed program
        changes=1,
    )


def test_a_convolutional_region_computes_on_integers_throughout() -> None:
    program = residual_net()
    result = quantized(program)
    kinds = [change.rule for change in result.changes]
    assert kinds == [
        "quantize-convolution",
        "quantize-convolution",
        "quantize-between",  # the sum
        "quantize-between",  # the concatenation
        "quantize-between",  # the two poolings
        "quantize-between",
        "quantize-between",  # flatten
        "quantize-linear",
    ]
    floats = [
        op_name(node.target)
        for node in result.program.operators
        if not op_name(node.target).startswith("planish.")
        and not all(is_dequantized(v) for v in node.all_input_nodes)
    ]
    assert floats == ["aten.relu6"]  # which stands right behind its convolution


@pytest.mark.parametrize(
    ("f", "layer", "x"),
    [
        (lambda m, x: m.c(x), nn.Conv1d(3, 4, 3), normal(2, 3, 9)),
        (lambda m, x: m.c(x), nn.Conv1d(3, 4, 3, padding="same"), normal(2, 3, 9)),
        (lambda m, x: m.c(x), nn.Conv2d(4, 4, 3, groups=4), normal(2, 4, 6, 6)),
        (lambda m, x: m.c(x), nn.Conv2d(4, 6, 3, groups=2, bias=False), normal(2, 4, 6, 6)),
        (lambda m, x: m.c(x), nn.Conv3d(2, 3, 2), normal(1, 2, 4, 4, 4)),
    ],
)
def test_convolutions_of_all_kinds(f: Any, layer: nn.Module, x: Tensor) -> None:
    result = quantized(captured(f, x, c=layer))
    (change,) = result.changes
    assert change.rule == "quantize-convolution"
    node = next(n for n in result.program.operators if n.name == change.node)
    weight: Any = node.args[1]
    assert weight.kwargs == {"dtype": "int8", "axis": 0}


@pytest.mark.parametrize(
    ("f", "x", "constant", "axis"),
    [
        (lambda m, x: x @ m.w, normal(2, 5, 4), normal(4, 3), 1),
        (lambda m, x: torch.bmm(x, m.w), normal(2, 5, 4), normal(2, 4, 3), 2),
        (lambda m, x: m.w @ x, normal(2, 4, 5), normal(3, 4), 0),
        (lambda m, x: torch.mm(x, m.w), normal(5, 4), normal(4, 3), 1),
        (lambda m, x: torch.addmm(m.b, x, m.w), normal(5, 4), normal(4, 3), 1),
        (lambda m, x: torch.baddbmm(m.b, x, m.w), normal(2, 5, 4), normal(2, 4, 3), 2),
    ],
)
def test_products_by_a_constant(f: Any, x: Tensor, constant: Tensor, axis: int) -> None:
    result = quantized(captured(f, x, w=constant, b=normal(3, seed=9)))
    (change,) = result.changes
    assert change.rule == "quantize-product"
    node = next(n for n in result.program.operators if n.name == change.node)
    operands = operands_of(node, result.program)
    assert operands is not None
    assert not isinstance(operands, str)
    weight = operands.weights[0].slot.read(node)
    assert weight.kwargs["axis"] == axis
    if operands.bias is not None:
        assert operands.bias.read(node).kwargs == {"dtype": "int32", "axis": 0}


def test_a_product_of_two_values() -> None:
    program = captured(lambda m, x, y: x @ y, normal(2, 5, 4), normal(2, 4, 5))
    result = quantized(program)
    assert [n.target for n in result.program.operators].count(DEQUANTIZE) == 2


def test_embeddings_where_asked_for() -> None:
    table = nn.Embedding(10, 4)
    ids = torch.tensor([[1, 2, 3]])
    program = captured(lambda m, i: m.fc(m.table(i)), ids, table=table, fc=linear())
    rules = {
        "weight": {c.rule for c in quantized(program, mode="weight").changes},
        "dynamic": {c.rule for c in quantized(program, mode="dynamic").changes},
        "asked": {c.rule for c in quantized(program, mode="dynamic", embedding=True).changes},
    }
    assert rules["weight"] == rules["asked"] == {"quantize-embedding", "quantize-linear"}
    assert rules["dynamic"] == {"quantize-linear"}


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight"])
def test_every_weight_of_an_lstm(mode: str) -> None:
    lstm = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
    program = captured(lambda m, x: m.rnn(x)[0], normal(2, 5, 4), rnn=lstm)
    result = quantized(program, mode=mode)
    (node,) = [n for n in result.program.operators if op_name(n.target) == "aten.lstm.input"]
    params: Any = node.args[2]
    assert [is_dequantized(p) for p in params] == [True, True, False, False] * 2
    assert all(p.kwargs == {"dtype": "int8", "axis": 0} for p in params if is_dequantized(p))


def test_attention_where_asked_for() -> None:
    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    shape = (2, 2, 5, 4)
    inputs = [normal(*shape, seed=s) for s in range(3)]
    result = quantized(captured(attend, *inputs), attention=True)
    rules = [c.rule for c in result.changes]
    assert rules == ["decompose-attention", "quantize-product", "quantize-product"]
    names = [op_name(n.target) for n in result.program.operators]
    assert names.count("planish.quantize") == 4  # q, k, the probabilities, v


def test_int8_values_and_unsigned_weights() -> None:
    program = captured(lambda m, x: m.fc(x), X, fc=linear())
    values = quantized(program, activations="int8").program
    assert {t.dtype for n, t in values.constants.items() if n.startswith("inputs")} == {
        torch.float32,
        torch.int8,
    }
    unsigned = quantized(program, weights="uint8").program
    zero = unsigned.constants["fc.weight_zero_point"]
    assert isinstance(zero, Tensor)
    assert zero.tolist() == [128] * 3


def test_a_clamp_behind_a_convolution_needs_no_integers_before_it() -> None:
    for clamp in (F.relu, F.relu6, F.hardtanh):
        program = captured(
            lambda m, x, f=clamp: m.b(f(m.a(x))), normal(1, 2, 6, 6), a=conv(2, 4), b=conv(4, 3)
        )
        result = quantized(program)
        codes = [n for n in result.program.operators if op_name(n.target) == "planish.quantize"]
        assert len(codes) == 2  # of the input, and of what the clamp gives


def test_where_chooses_operators() -> None:
    program = captured(lambda m, x: m.b(m.a(x)), normal(2, 4), a=linear(4, 4), b=linear(4, 3))
    for where, chosen in (
        (Where(include=("a",)), ["a"]),
        (Where(exclude=("a",)), ["b"]),
        (Where(include=("linear_1",)), ["b"]),
        (Where(include=("aten.lin*",), exclude=("linear",)), ["b"]),
        (Where(), ["a", "b"]),
    ):
        result = quantized(program, where=where)
        assert [n for n in "ab" if f"{n}.weight_int8" in result.program.constants] == chosen
