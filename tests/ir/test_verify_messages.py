"""What the verifier says of a fault, and the node it points at."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.ops import is_op
from planish.ir.verify import faults, verify
from tests.support import broken
from tests.support.broken import Breaker, broken_rules, net, new_call, node, retyped, with_sample

aten = torch.ops.aten


def wrong_scale(program: Any) -> None:
    broken.quantized(program, scale=0.2)


# Each breaker, the node its fault points at (None: the program as a whole), and what it says.
WORDS: list[tuple[Breaker, str | None, str]] = [
    (broken.use_before_definition, "relu", "it reads linear, which comes after it"),
    (broken.operand_of_another_graph, "relu", "it reads alien, which belongs to another graph"),
    (broken.erased_operand, "relu", "it reads neg_default, which belongs to another graph"),
    (broken.repeated_name, "mul", "the name 'mul' is taken twice"),
    (broken.user_unknown_to_its_operand, "relu", "linear does not know this user"),
    (broken.node_of_another_graph, "relu", "the node belongs to another graph"),
    (broken.call_of_a_method, "relu", "a program holds no call_method nodes"),
    (broken.second_output, None, "there are 2 output nodes; one must end the graph"),
    (broken.code_after_the_output, None, "there are 1 output nodes; one must end the graph"),
    (
        broken.nested_outputs,
        "output",
        "the outputs are nested; the structure belongs to the signature",
    ),
    (broken.in_place_operator, "relu", "aten.relu_ writes into its argument"),
    (broken.no_type, "relu", "the node has no type (meta['val'])"),
    (broken.type_with_data, "relu", "its type holds a real tensor, not a fake one"),
    (broken.dead_operator, "neg_default", "nobody reads this value"),
    (broken.dead_constant, "two_weight", "nobody reads this value"),
    (broken.missing_constant, "p_two_weight", "there is no constant 'two.weight'"),
    (broken.unread_constant, None, "nobody reads the constant 'left.over'"),
    (
        broken.layout_of_nothing,
        None,
        "a sparse layout is claimed for 'gone', which does not exist",
    ),
    (
        broken.constant_inside_a_constant,
        None,
        "the constant 'one.weight.bias' lies inside the constant 'one.weight'",
    ),
    (
        broken.constant_with_an_empty_name_part,
        None,
        "the constant 'one..bias' has an empty part in its name",
    ),
    (broken.constant_with_gradient, None, "the constant 'two.weight' requires a gradient"),
    (broken.constant_without_data, None, "the constant 'two.weight' holds no data"),
    (broken.default_input, "mask", "a placeholder has no default value"),
    (broken.dropped_output, "output", "1 outputs for 2 leaves in the output structure"),
    (broken.unnamed_output, "output", "2 outputs for 1 output names"),
    (with_sample(torch.ones(2, 3, 4)), None, "sample 1 has 1 of 2 inputs"),
    (
        with_sample(torch.ones(2, 3, 4).double(), torch.ones(2, 3, 1)),
        "x",
        "sample 1 is f64, not f32",
    ),
    (with_sample(torch.ones(2, 4), torch.ones(2, 3, 1)), "x", "sample 1 has 2 axes, not 3"),
    (
        with_sample(torch.ones(2, 3, 5), torch.ones(2, 3, 1)),
        "x",
        "sample 1 has size 5 on axis 2, not 4",
    ),
    (
        with_sample(torch.ones(2, 3, 4), torch.ones(5, 3, 1)),
        "mask",
        "sample 1 has size 5 on axis 0, not 2",
    ),
    (with_sample(torch.ones(2, 3, 4), 1.0), "mask", "sample 1 is a float"),
    (
        broken.constant_of_another_shape,
        "p_two_weight",
        "it is typed f32[8, 8], and holds f32[8, 9]",
    ),
    (
        retyped(aten.flatten.using_ints, lambda v: v.unsqueeze(0)),
        "flatten",
        "it is typed f32[1, 3*batch, 8], and its operands give f32[3*batch, 8]",
    ),
    (
        broken.wrong_axis,
        "flatten",
        "it is typed f32[3*batch, 8], and its operands give f32[batch, 24]",
    ),
    (broken.another_signature, None, "the signature is not the one the program had"),
    (
        broken.output_of_another_dtype,
        "to_dtype",
        "output hidden was f32[batch, 3, 8] and became f16[batch, 3, 8]",
    ),
    (
        broken.output_of_another_shape,
        "t_default",
        "output out was f32[3*batch, 8] and became f32[8, 3*batch]",
    ),
    (
        broken.nan_constant,
        None,
        "the new constant 'two.weight' holds NaN, which no constant did before",
    ),
    (
        wrong_scale,
        "dequantize_per_tensor_default",
        "its scale is not that of quantize_per_tensor_default, which quantized its input",
    ),
]


@pytest.mark.parametrize(("breaker", "where", "what"), WORDS)
def test_a_fault_says_what_is_wrong_and_where(breaker: Breaker, where: str, what: str) -> None:
    before, after = net(), net()
    breaker(after)
    _, fault = next(faults(after, since=before))
    assert fault.what == what
    assert (fault.node.name if fault.node is not None else None) == where


def test_an_input_of_another_type_is_named() -> None:
    before, after = net(), net()
    retyped_input = after.placeholders[1]
    with after.fake_mode:
        retyped_input.meta = {**retyped_input.meta, "val": torch.empty(2, 3, 1)}
    rule, fault = next(faults(after, since=before))
    assert (rule, fault.node) == ("same-contract", retyped_input)
    assert fault.what == "input mask was f32[batch, 3, 1] and became f32[2, 3, 1]"


def test_rejected_operands_are_told_at_every_node() -> None:
    program = net()
    relu = node(program, aten.relu.default)
    for _ in range(2):
        made = new_call(program, program.output, aten.neg.default, relu)
        made.target, made.args = aten.t.default, (relu,)  # a transpose of three axes
    found = [(rule, fault.what.split(":")[0]) for rule, fault in faults(program)]
    says = "aten.t.default rejects these operands"
    assert found == [("operator-types", says)] * 2


class Counted(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x.relu(), 3


def test_an_output_that_is_a_number_keeps_its_value() -> None:
    before = capture(Counted().eval(), (torch.ones(2),))
    after = before.clone()
    assert after.results[1] == 3
    verify(after, since=before)
    after.output.args = ((after.results[0], 4),)
    found = list(faults(after, since=before))
    assert [(rule, fault.node) for rule, fault in found] == [("same-results", None)]
    name = before.signature.output_names[1]
    assert found[0][1].what == f"output {name} was int (3) and became int (4)"
    with pytest.raises(VerificationError, match="became int"):
        verify(after, since=before)


# -- the error ------------------------------------------------------------------------------------


def test_one_fault_is_told_alone_and_with_a_hint() -> None:
    program = net()
    broken.wrong_axis(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    first = str(caught.value).splitlines()[0]
    assert first.endswith("its operands give f32[batch, 24]")
    assert "more faults" not in str(caught.value)
    assert "the last pass that edited it is at fault" in str(caught.value)


def test_a_node_that_cannot_be_printed_in_place_is_printed_alone() -> None:
    program = net()
    broken.operand_of_another_graph(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    relu = next(n for n in program.operators if is_op(n, aten.relu.default))
    assert str(relu.format_node()) in str(caught.value)


def test_an_equal_copy_of_the_signature_is_the_same_contract() -> None:
    before, after = net(), net()
    after.signature = dataclasses.replace(before.signature)
    assert after.signature is not before.signature
    assert broken_rules(after, since=before) == set()
