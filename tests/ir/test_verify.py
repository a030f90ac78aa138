"""The verifier: every rule has a program that breaks it, and it alone."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from planish.ir import rederive
from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.infer import infer
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.rederive import changed_operators, same_size, same_type
from planish.ir.rewriter import Rewriter
from planish.ir.snapshot import Snapshot, checksum
from planish.ir.tensortype import SparseLayout
from planish.ir.verify import RULES, faults, verify
from planish.ir.verify_rules import Subject
from planish.ir.verify_schemes import layout_problem
from tests.support.strategies import normal

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


def test_a_whole_program_passes() -> None:
    program = net()
    verify(program)
    verify(program, since=traced(), snapshot=Snapshot(traced(), values=True))
    quantized(program)
    verify(program, since=traced())


@pytest.mark.parametrize(("rule", "broken"), BREAKERS)
def test_what_breaks_a_rule_is_told_by_its_name(rule: str, broken: Breaker) -> None:
    before, after = net(), net()
    broken(after)
    assert broken_rules(after, since=before) == {rule}
    with pytest.raises(VerificationError, match=f"rule {rule}: "):
        verify(after, since=before)


NEEDS_A_PAST = {"no-dead-nodes", "same-contract", "same-results", "constants-not-nan"}


@pytest.mark.parametrize(("rule", "broken"), [b for b in BREAKERS if b[0] not in NEEDS_A_PAST])
def test_it_is_found_in_a_program_without_a_past(rule: str, broken: Breaker) -> None:
    program = net()
    broken(program)
    assert broken_rules(program) == {rule}


def test_a_dropped_input_is_found() -> None:
    program = net()
    dropped_input(program)
    assert "inputs-match" in broken_rules(program)


def test_a_narrowed_input_is_found() -> None:
    before, after = net(), net()
    static_input(after)
    assert "same-contract" in broken_rules(after, since=before)


def test_every_rule_is_broken_by_a_test() -> None:
    tested = {rule for rule, _ in BREAKERS} | {"constants-unwritten"}
    assert tested == {rule.name for level in RULES.values() for rule in level}


# -- messages -------------------------------------------------------------------------------------


def test_a_failure_shows_rule_node_source_and_the_lines_around() -> None:
    program = net()
    retyped(aten.mul.Tensor, lambda v: v.double())(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "rule operator-types: it is typed f64[batch, 3, 8], and its operands give" in message
    assert "test_verify.py" in message  # the user's own line
    assert "-->" in message
    assert "aten.relu(" in message
    assert "(and 1 more faults)" in message  # flatten, whose operand it is


def test_a_graph_too_broken_to_print_is_still_reported() -> None:
    program = net()
    operand_of_another_graph(program)
    with pytest.raises(VerificationError, match="rule lint: it reads alien, which belongs to"):
        verify(program)


def test_a_fault_of_structure_ends_the_verification() -> None:
    program = net()
    in_place_operator(program)
    wrong_axis(program)
    assert broken_rules(program) == {"functional"}


# -- what may change ------------------------------------------------------------------------------


def test_dead_values_of_the_trace_are_no_fault_of_a_pass() -> None:
    before = net()
    dead_operator(before)
    verify(before.clone(), since=before)


def test_nan_that_was_there_before_may_move() -> None:
    before, after = net(), net()
    nan_constant(before)
    weight = before.constants["two.weight"]
    assert isinstance(weight, Tensor)
    after.constants["two.weight"] = weight.clone()
    verify(after, since=before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_nan_is_found_in_every_type(dtype: torch.dtype) -> None:
    program = net()
    for value in (1.0, torch.nan):
        program.constants["two.weight"] = torch.full((8, 8), value).to(dtype)
        found = [
            f
            for rule in RULES.values()
            for r in rule
            if r.name == "constants-not-nan"
            for f in r.check(Subject(program, since=net()))
        ]
        assert bool(found) == (value != 1.0)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        picked = x.nonzero()
        return picked, picked[: picked.shape[0] // 2] * 2


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))
        return chosen * 2


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool, directions: int):
        super().__init__()
        self.cell = kind(3, 5, 2, batch_first=batch_first, bidirectional=directions == 2)

    def forward(self, x: Tensor) -> Any:
        return self.cell(x)


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[int, str]]] = {
    "data-dependent sizes": (Rows, torch.eye(4), {0: "rows"}),
    "branches": (Branch, torch.ones(4), {}),
    "lstm": (lambda: Recurrent(nn.LSTM, True, 2), torch.randn(4, 6, 3), {0: "batch"}),
    "gru": (lambda: Recurrent(nn.GRU, False, 1), torch.randn(6, 4, 3), {1: "batch"}),
    "rnn": (lambda: Recurrent(nn.RNN, True, 1), torch.randn(4, 6, 3), {0: "batch"}),
    "sizes as numbers": (lambda: Sizes(), torch.randn(4, 6), {1: "columns"}),
}


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        half = x.shape[0] // 2
        return x.reshape(half, -1) * x.shape[1], half


@pytest.mark.parametrize("name", list(MODULES))
def test_traced_programs_pass(name: str) -> None:
    make, x, axes = MODULES[name]
    shapes = ({axis: Dim(dim) for axis, dim in axes.items()},) if axes else None
    program = capture(make().eval(), (x,), dynamic_shapes=shapes)
    verify(program)
    verify(program.clone(), since=program)
    verify(program)  # deriving left no symbols behind


def test_a_stale_number_is_found() -> None:
    shapes = ({0: 2 * Dim("half"), 1: Dim("columns")},)
    program = capture(Sizes().eval(), (torch.randn(4, 6),), dynamic_shapes=shapes)
    verify(program)
    size = node(program, aten.sym_size.int)
    size.meta = {**size.meta, "val": size.meta["val"] + 1}
    assert broken_rules(program) == {"operator-types"}


# -- only what changed ----------------------------------------------------------------------------


def test_an_untouched_program_derives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rederive, "infer_node", None)
    verify(traced().clone(), since=traced())


def test_only_changed_operators_are_derived_again() -> None:
    before, after = net(), net()
    rewriter = Rewriter(after, "test")
    relu = node(after, aten.relu.default)
    with rewriter.site("again", relu):
        new = rewriter.call(aten.silu.default, (relu.args[0],), like=relu)
        rewriter.replace(relu, new)
    rewriter.finish()
    verify(after, since=before)
    two = [n for n in after.operators if is_op(n, aten.linear.default)][1]
    assert changed_operators(after, before) == [new, two]  # two reads a value of another name
    assert changed_operators(before, None) == before.operators


def test_users_of_a_retyped_value_are_derived_again() -> None:
    before, after = net(), net()
    retyped(aten.relu.default, lambda v: v.double())(after)
    found = [fault.node for _, fault in faults(after, since=before)]
    names = [n.name for n in found if n is not None]
    assert names == [node(after, aten.relu.default).name, "linear_1"]


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.relu6.default, None),
        (aten.relu.default, "other operand"),
    ],
)
def test_changes_that_keep_the_name_are_seen(target: Any, args: str | None) -> None:
    before, after = net(), net()
    relu = node(after, aten.relu.default)
    relu.target = target
    if args is not None:
        relu.args = (new_call(after, relu, aten.neg.default, relu.args[0]),)
    assert relu in changed_operators(after, before)


def test_equal_calls_are_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = (x * 2).relu()
            return x

    program = capture(Deep().eval(), (torch.randn(3),))
    derived: list[Node] = []

    def counted(program: Program, node: Node) -> Any:
        derived.append(node)
        return infer(program, node.target, node.args, node.kwargs)

    monkeypatch.setattr(rederive, "infer_node", counted)
    verify(program)
    assert len(program.operators) == 40
    assert len(derived) == 2


# -- comparing types ------------------------------------------------------------------------------


@cache
def symbols() -> tuple[Any, Any, Any]:
    """Two dynamic sizes and a data-dependent one."""

    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero()

    shapes = ({0: Dim("a"), 1: Dim("b")},)
    program = capture(Three().eval(), (torch.ones(4, 6),), dynamic_shapes=shapes)
    a, b = program.placeholders[0].meta["val"].shape
    return a, b, program.operators[0].meta["val"].shape[0]


def test_sizes_are_compared_for_all_sizes() -> None:
    a, b, _ = symbols()
    assert same_size(3, 3)
    assert not same_size(3, 4)
    assert same_size(a, a)
    assert not same_size(a, b)
    assert not same_size(4, a)  # the sample's size is not the dimension
    assert not same_size(a, 4)
    assert same_size(2 * (a + 1), 2 + a + a)
    assert same_size((a + 1) // 2, (a - 1) // 2 + 1)
    assert not same_size((a + 1) // 2, a // 2)
    assert not same_size(a * b, a + b)


def test_data_dependent_sizes_match_what_is_symbolic() -> None:
    a, _, u = symbols()
    assert same_size(u, u)
    assert same_size(a, u)
    assert same_size(u, a)
    assert same_size(7, u)  # known better than derived
    assert not same_size(u, 7)


def test_types_are_compared_by_element_shape_and_kind() -> None:
    x = torch.empty(2, 3)
    assert same_type(x, torch.empty(2, 3))
    assert not same_type(x, torch.empty(3, 2))
    assert not same_type(x, torch.empty(2, 3, 1))
    assert not same_type(x, x.double())
    assert same_type((x, 1), [x, 1])
    assert not same_type((x,), (x, x))
    assert not same_type(x, None)
    assert same_type(None, None)
    assert not same_type(1, True)
    assert not same_type(1, 1.0)


# -- snapshots ------------------------------------------------------------------------------------


def written(program: Program, write: Callable[[], Any], *, values: bool = False) -> list[str]:
    snapshot = Snapshot(program, values=values)
    assert list(snapshot.written()) == []
    write()
    return list(snapshot.written())


def test_a_write_into_a_shared_constant_is_found() -> None:
    before = net()
    after = before.clone()
    weight = after.constants["two.weight"]
    assert isinstance(weight, Tensor)
    snapshot = Snapshot(before)
    weight.mul_(2)
    assert broken_rules(after, since=before, snapshot=snapshot) == {"constants-unwritten"}
    with pytest.raises(VerificationError, match=r"the constant 'two\.weight' was written"):
        verify(after, since=before, snapshot=snapshot)


def test_a_write_through_an_alias_is_found() -> None:
    program = net()
    weight = program.constants["two.weight"]
    assert isinstance(weight, Tensor)
    assert written(program, lambda: weight.detach().t()[0].zero_()) == ["the constant 'two.weight'"]


def test_a_write_into_a_sample_is_found() -> None:
    program = net()
    program.samples = ((torch.ones(2, 3, 4), torch.ones(2, 3, 1)),)
    found = written(program, lambda: program.samples[0][1].zero_())
    assert found == ["the input 'mask' of sample 0"]


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.add_(1),
        lambda weight: weight.numpy().fill(0),
        lambda weight: weight.data.copy_(weight.flip(0)),
    ],
)
def test_checksums_find_writes_that_torch_does_not_count(write: Any) -> None:
    program = net()
    weight = program.constants["two.weight"]
    assert written(program, lambda: write(weight), values=True) == ["the constant 'two.weight'"]


def test_tensors_of_inference_mode_are_watched_too() -> None:
    program = net()
    with torch.inference_mode():
        program.constants["two.weight"] = weight = torch.ones(8, 8)

    def write() -> None:
        with torch.inference_mode():
            weight.add_(1)

    assert written(program, write) == ["the constant 'two.weight'"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64]
)
def test_checksums_hold_for_every_type_and_layout(dtype: torch.dtype) -> None:
    tensor = normal((6, 5), 0).mul(10).round().clamp(0).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(tensor.t()) != checksum(tensor)
    assert checksum(tensor[:, 1:3]) == checksum(tensor[:, 1:3].clone())
    assert checksum(torch.empty(0, dtype=dtype)) == 0
    assert checksum(tensor[0, 0]) == checksum(tensor[:1, :1])


# -- sparse layouts -------------------------------------------------------------------------------


def crowded_groups(value: Tensor, n: int, m: int, axis: int) -> int:
    """The definition, one group at a time."""
    rows = value.movedim(axis, -1).reshape(-1, value.shape[axis]).tolist()
    groups = [row[i : i + m] for row in rows for i in range(0, len(row), m)]
    return sum(sum(v != 0 for v in group) > n for group in groups)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 999),
    st.floats(0.1, 0.9),
)
def test_layouts_are_checked_by_their_definition(
    n: int, m: int, axis: int, seed: int, density: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = (torch.rand(5, 8, 3, generator=generator) < density).float()
    problem = layout_problem(value, SparseLayout(min(n, m), m, axis))
    count = crowded_groups(value, min(n, m), m, axis)
    assert problem == (f"{count} groups hold more than {min(n, m)} nonzeros" if count else None)


def test_a_sparse_constant_passes_and_a_dense_one_does_not() -> None:
    value = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0]])
    assert layout_problem(value, SparseLayout(2, 4, 1)) is None
    assert layout_problem(value, SparseLayout(2, 4, -1)) is None
    assert layout_problem(value, SparseLayout(1, 4, 1)) == "2 groups hold more than 1 nonzeros"
    assert layout_problem(value, SparseLayout(3, 2, 1)) == "3:2 is no layout"


def test_the_body_of_a_branch_has_no_layout() -> None:
    program = capture(Branch().eval(), (torch.ones(4),))
    program.layouts["true_graph_0"] = SparseLayout(2, 4, 0)
    assert broken_rules(program) == {"sparse-layouts"}


def test_layouts_of_old_constants_are_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = net()
    before.constants["two.weight"] = torch.zeros(8, 8)
    before.layouts["two.weight"] = SparseLayout(2, 4, 1)
    verify(before)
    after = before.clone()
    monkeypatch.setattr("planish.ir.verify_schemes.layout_problem", None)
    verify(after, since=before)


# -- quantization schemes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 0.2}, "its scale is not that of"),
        ({"zero": 4}, "its zero_point is not that of"),
        ({"high": 120}, "its quant_max is not that of"),
        ({"both": {"scale": -1.0}}, "its scale is not positive and finite everywhere"),
        ({"both": {"zero": -129}}, "its zero point is outside of -128 to 127"),
        ({"both": {"high": 400}}, "its range -128 to 400 is no range of i8"),
    ],
)
def test_a_wrong_scheme_is_told(changes: dict[str, Any], says: str) -> None:
    program = net()
    quantized(program, **changes)
    with pytest.raises(VerificationError, match=says):
        verify(program)


def test_scales_of_channels_are_constants_and_checked() -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops = torch.ops.quantized_decomposed
    for scales, fine in ((torch.full((8,), 0.1), True), (torch.zeros(8), False)):
        program = net()
        relu = node(program, aten.relu.default)
        rewriter = Rewriter(program, "test")
        with rewriter.site("quantize", relu):
            rewriter.insert_before(program.output)
            scale = rewriter.constant(scales, "scale", like=relu)
            zero = rewriter.constant(torch.zeros(8, dtype=torch.int64), "zero", like=relu)
            args = (scale, zero, 2, -128, 127, torch.int8)
            code = rewriter.call(ops.quantize_per_channel.default, (relu, *args), like=relu)
            value = rewriter.call(ops.dequantize_per_channel.default, (code, *args), like=relu)
        program.output.args = ((value, program.results[1]),)
        assert broken_rules(program) == (set() if fine else {"operator-schemes"})


def test_the_output_structure_is_that_of_the_signature() -> None:
    program = net()
    leaves = pytree.tree_structure({"hidden": 0, "out": 0, "more": 0})
    program.signature = dataclasses.replace(program.signature, out_spec=leaves)
    assert broken_rules(program) == {"outputs-match"}
