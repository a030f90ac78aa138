"""A small program, and every way to break it that the verifier must notice."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node

from planish.ir.capture import capture
from planish.ir.infer import infer
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout
from planish.ir.verify import faults

aten = torch.ops.aten
Breaker = Callable[[Program], Any]


class Net(nn.Module):
    """Two layers, a mask, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 8)
        self.two = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.one(x).relu()
        return {"hidden": hidden, "out": (self.two(hidden) * mask).flatten(0, 1)}


@cache
def traced() -> Program:
    torch.manual_seed(0)
    batch = Dim("batch")
    shapes = {"x": {0: batch}, "mask": {0: batch}}
    args = (torch.randn(2, 3, 4), torch.ones(2, 3, 1))
    return capture(Net().eval(), args, dynamic_shapes=shapes)


def net() -> Program:
    """A private copy that may be broken; types and signature are shared, so replace them."""
    program = traced().clone()
    for name, value in program.constants.items():
        assert isinstance(value, Tensor)
        program.constants[name] = value.clone()
    return program


def node(program: Program, target: Any) -> Node:
    found: Node = next(n for n in program.operators if is_op(n, target))
    return found


def constant(program: Program, name: str) -> Node:
    found: Node = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == name)
    return found


def new_call(program: Program, before: Node, target: Any, *args: Any) -> Node:
    """Put a call into the graph behind the rewriter's back, with its right type."""
    with program.graph.inserting_before(before):
        made = program.graph.call_function(target, args)
    made.meta["val"] = infer(program, target, args)
    return made


def broken_rules(program: Program, **known: Any) -> set[str]:
    return {rule for rule, _ in faults(program, **known)}


# -- each rule, and what breaks it ----------------------------------------------------------------


def use_before_definition(program: Program) -> None:
    relu = node(program, aten.relu.default)
    program.placeholders[0].prepend(relu)


def operand_of_another_graph(program: Program) -> None:
    relu = node(program, aten.relu.default)
    other = Graph().placeholder("alien")
    other.meta = dict(program.placeholders[0].meta)
    relu.args = (other,)


def erased_operand(program: Program) -> None:
    relu = node(program, aten.relu.default)
    extra = new_call(program, relu, aten.neg.default, relu.args[0])
    program.graph.erase_node(extra)
    relu.args = (extra,)


def repeated_name(program: Program) -> None:
    node(program, aten.relu.default).name = node(program, aten.mul.Tensor).name


def user_unknown_to_its_operand(program: Program) -> None:
    relu = node(program, aten.relu.default)
    relu.all_input_nodes[0].users.pop(relu)


def node_of_another_graph(program: Program) -> None:
    node(program, aten.relu.default).graph = Graph()


def call_of_a_method(program: Program) -> None:
    relu = node(program, aten.relu.default)
    relu.op, relu.target = "call_method", "relu"


def second_output(program: Program) -> None:
    program.graph.create_node("output", "output", ((),), name="again")


def code_after_the_output(program: Program) -> None:
    relu = node(program, aten.relu.default)
    program.output.append(new_call(program, program.output, aten.neg.default, relu))


def nested_outputs(program: Program) -> None:
    program.output.args = ((program.results,),)


def in_place_operator(program: Program) -> None:
    node(program, aten.relu.default).target = aten.relu_.default


def write_into_a_constant(program: Program) -> None:
    linear = node(program, aten.linear.default)
    weight = linear.args[1]
    made = new_call(program, linear, aten.mul.Tensor, weight, 2.0)
    made.target = aten.mul_.Tensor
    linear.args = (linear.args[0], made, *linear.args[2:])


def no_type(program: Program) -> None:
    relu = node(program, aten.relu.default)
    relu.meta = {k: v for k, v in relu.meta.items() if k != "val"}


def type_with_data(program: Program) -> None:
    node(program, aten.relu.default).meta = {"val": torch.zeros(2, 3, 8)}


def dead_operator(program: Program) -> None:
    new_call(program, program.output, aten.neg.default, node(program, aten.relu.default))


def dead_constant(program: Program) -> None:
    weight = constant(program, "two.weight")
    linear = next(iter(weight.users))
    with program.graph.inserting_before(linear):
        program.graph.get_attr("two.weight").meta.update(weight.meta)


def missing_constant(program: Program) -> None:
    del program.constants["two.weight"]


def unread_constant(program: Program) -> None:
    program.constants["left.over"] = torch.ones(3)


def layout_of_nothing(program: Program) -> None:
    program.layouts["gone"] = SparseLayout(2, 4, 1)


def renamed(program: Program, old: str, new: str) -> None:
    program.constants[new] = program.constants.pop(old)
    constant(program, old).target = new


def constant_inside_a_constant(program: Program) -> None:
    renamed(program, "one.bias", "one.weight.bias")


def constant_with_an_empty_name_part(program: Program) -> None:
    renamed(program, "one.bias", "one..bias")


def constant_with_gradient(program: Program) -> None:
    program.constants["two.weight"].requires_grad_()


def constant_without_data(program: Program) -> None:
    program.constants["two.weight"] = torch.empty(8, 8, device="meta")


def constant_stored_sparsely(program: Program) -> None:
    program.constants["two.weight"] = torch.eye(8).to_sparse()


def dropped_input(program: Program) -> None:
    mask = program.placeholders[1]
    mask.replace_all_uses_with(program.placeholders[0])
    program.graph.erase_node(mask)


def default_input(program: Program) -> None:
    program.placeholders[1].args = (1.0,)


def dropped_output(program: Program) -> None:
    program.output.args = (program.results[1:],)


def unnamed_output(program: Program) -> None:
    names = program.signature.output_names[:1]
    program.signature = dataclasses.replace(program.signature, output_names=names)


def with_sample(*sample: Any) -> Breaker:
    def broken(program: Program) -> None:
        program.samples = (*program.samples, sample)

    return broken


def constant_of_another_shape(program: Program) -> None:
    program.constants["two.weight"] = torch.ones(8, 9)


def constant_of_another_dtype(program: Program) -> None:
    program.constants["two.weight"] = torch.ones(8, 8, dtype=torch.float16)


def retyped(target: Any, change: Callable[[Tensor], Any]) -> Breaker:
    def broken(program: Program) -> None:
        found = node(program, target)
        with program.fake_mode:
            found.meta = {**found.meta, "val": change(found.meta["val"])}

    return broken


def wrong_axis(program: Program) -> None:
    flatten = node(program, aten.flatten.using_ints)
    flatten.args = (flatten.args[0], 1, 2)


def rejected_operands(program: Program) -> None:
    relu = node(program, aten.relu.default)
    two = [n for n in program.operators if is_op(n, aten.linear.default)][1]
    two.args = (program.placeholders[0], *two.args[1:])
    program.output.args = ((relu, node(program, aten.flatten.using_ints)),)


def another_signature(program: Program) -> None:
    names = ("x", "attention")
    program.signature = dataclasses.replace(program.signature, input_names=names)


def static_input(program: Program) -> None:
    x = program.placeholders[0]
    with program.fake_mode:
        x.meta = {**x.meta, "val": torch.empty(2, 3, 4)}
    relu, flatten = node(program, aten.relu.default), node(program, aten.flatten.using_ints)
    for operator in program.operators:  # what follows is typed anew, so that only x is wrong
        operator.meta = {"val": infer(program, operator.target, operator.args)}
    program.output.args = ((relu, flatten),)


def output_of_another_dtype(program: Program) -> None:
    relu = node(program, aten.relu.default)
    half = new_call(program, program.output, aten.to.dtype, relu, torch.float16)
    program.output.args = ((half, program.results[1]),)


def output_of_another_shape(program: Program) -> None:
    flatten = node(program, aten.flatten.using_ints)
    turned = new_call(program, program.output, aten.t.default, flatten)
    program.output.args = ((program.results[0], turned),)


def nan_constant(program: Program) -> None:
    weight = torch.ones(8, 8)
    weight[3, 4] = torch.nan
    program.constants["two.weight"] = weight


def dense_constant(program: Program) -> None:
    program.layouts["two.weight"] = SparseLayout(2, 4, 1)


def layout_without_an_axis(program: Program) -> None:
    program.constants["two.weight"] = torch.zeros(8, 8)
    program.layouts["two.weight"] = SparseLayout(2, 4, 2)


def quantized(program: Program, **changes: Any) -> None:
    """Quantize and dequantize an output, with one argument changed on one side."""
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops = torch.ops.quantized_decomposed
    scheme = {"scale": 0.1, "zero": 3, "low": -128, "high": 127, "dtype": torch.int8}
    there, back = {**scheme, **changes}, {**scheme, **changes.pop("both", {})}
    there.update(there.pop("both", {}))
    relu = node(program, aten.relu.default)
    args = [there[k] for k in ("scale", "zero", "low", "high", "dtype")]
    code = new_call(program, program.output, ops.quantize_per_tensor.default, relu, *args)
    args = [back[k] for k in ("scale", "zero", "low", "high", "dtype")]
    value = new_call(program, program.output, ops.dequantize_per_tensor.default, code, *args)
    program.output.args = ((value, program.results[1]),)


BREAKERS: list[tuple[str, Breaker]] = [
    ("lint", use_before_definition),
    ("lint", operand_of_another_graph),
    ("lint", erased_operand),
    ("lint", repeated_name),
    ("lint", user_unknown_to_its_operand),
    ("lint", node_of_another_graph),
    ("lint", call_of_a_method),
    ("one-output", second_output),
    ("one-output", code_after_the_output),
    ("one-output", nested_outputs),
    ("functional", in_place_operator),
    ("functional", write_into_a_constant),
    ("typed", no_type),
    ("typed", type_with_data),
    ("no-dead-nodes", dead_operator),
    ("no-dead-nodes", dead_constant),
    ("constants-present", missing_constant),
    ("constants-present", unread_constant),
    ("constants-present", layout_of_nothing),
    ("constant-names", constant_inside_a_constant),
    ("constant-names", constant_with_an_empty_name_part),
    ("constants-plain", constant_with_gradient),
    ("constants-plain", constant_without_data),
    ("constants-plain", constant_stored_sparsely),
    ("inputs-match", default_input),
    ("outputs-match", dropped_output),
    ("outputs-match", unnamed_output),
    ("samples-match", with_sample(torch.ones(2, 3, 4))),
    ("samples-match", with_sample(torch.ones(2, 3, 4).double(), torch.ones(2, 3, 1))),
    ("samples-match", with_sample(torch.ones(2, 4), torch.ones(2, 3, 1))),
    ("samples-match", with_sample(torch.ones(2, 3, 5), torch.ones(2, 3, 1))),
    ("samples-match", with_sample(torch.ones(2, 3, 4), torch.ones(5, 3, 1))),
    ("samples-match", with_sample(torch.ones(2, 3, 4), 1.0)),
    ("constant-types", constant_of_another_shape),
    ("constant-types", constant_of_another_dtype),
    ("operator-types", retyped(aten.relu.default, lambda v: v.transpose(1, 2))),
    ("operator-types", retyped(aten.mul.Tensor, lambda v: v.double())),
    ("operator-types", retyped(aten.flatten.using_ints, lambda v: v.unsqueeze(0))),
    ("operator-types", retyped(aten.relu.default, lambda v: (v, v))),
    ("operator-types", retyped(aten.relu.default, lambda v: v.new_empty(2, 3, 8))),
    ("operator-types", wrong_axis),
    ("operator-types", rejected_operands),
    ("same-contract", another_signature),
    ("same-results", output_of_another_dtype),
    ("same-results", output_of_another_shape),
    ("constants-not-nan", nan_constant),
    ("sparse-layouts", dense_constant),
    ("sparse-layouts", layout_without_an_axis),
    ("operator-schemes", lambda p: quantized(p, scale=0.2)),
    ("operator-schemes", lambda p: quantized(p, both={"scale": 0.0})),
    ("operator-schemes", lambda p: quantized(p, both={"scale": float("inf")})),
    ("operator-schemes", lambda p: quantized(p, both={"zero": 200})),
    ("operator-schemes", lambda p: quantized(p, both={"low": -300})),
]
