"""Types without computing: of constants, of calls, and of calls seen before."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.fx import Graph

from planish.ir import Program, capture
from planish.ir.errors import PassError, UsageError
from planish.ir.execute import evaluate
from planish.ir.infer import fake_constant, infer, infer_node, reason
from planish.ir.tensortype import type_text
from planish.ir.typememo import TypeMemo
from tests.support.lambdas import Lambda

aten = torch.ops.aten


@cache
def program() -> Program:
    shapes = (({0: Dim("n")},),)
    return capture(Lambda(lambda x: x.relu()), (torch.ones(4, 6),), dynamic_shapes=shapes)


def typed(value: object) -> str:
    return type_text(value, program().signature.symbols)


# -- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3),
        torch.ones(2, 3).t(),
        torch.ones(4)[::2],
        torch.zeros(0, 2, dtype=torch.int8),
        torch.tensor(1.5, dtype=torch.bfloat16),
        nn.Parameter(torch.ones(2)),
    ],
)
def test_a_constant_is_typed_as_it_lies_in_memory(tensor: Tensor) -> None:
    fake = fake_constant(program(), tensor)
    assert isinstance(fake, FakeTensor)
    assert fake.fake_mode is program().fake_mode
    assert (fake.dtype, fake.shape, fake.stride(), fake.device) == (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.device,
    )
    assert all(type(size) is int for size in fake.shape)


def test_a_sparse_constant_keeps_its_layout() -> None:
    fake = fake_constant(program(), torch.eye(3).to_sparse())
    assert (fake.layout, tuple(fake.shape)) == (torch.sparse_coo, (3, 3))


# -- calls ----------------------------------------------------------------------------------------


def test_a_call_is_typed_for_all_sizes() -> None:
    x = program().placeholders[0]
    assert typed(infer(program(), aten.sum.dim_IntList, (x, [1]), {"keepdim": True})) == "f32[n, 1]"
    assert typed(infer(program(), aten.max.dim, (x, 0))) == "(f32[6], i64[6])"
    assert typed(infer_node(program(), program().operators[0])) == "f32[n, 6]"


def test_an_operand_without_a_type_is_told() -> None:
    untyped = Graph().placeholder("bare")
    with pytest.raises(PassError, match="bare has no type yet"):
        infer(program(), aten.relu.default, (untyped,))


def test_rejected_operands_leave_no_guard_behind() -> None:
    x = program().placeholders[0]
    env = program().fake_mode.shape_env
    assert env is not None
    guards = len(env.guards)
    with pytest.raises(PassError, match=r"aten\.mm\.default rejects these operands: a and b must"):
        infer(program(), aten.mm.default, (x, x))
    # It holds where n is 6; nobody may conclude that n is.
    assert (
        typed(infer(program(), aten.mm.default, (x, x.meta["val"].new_ones(6, 2)))) == "f32[n, 2]"
    )
    assert len(env.guards) == guards


def test_the_reason_of_an_error_is_what_a_reader_can_use() -> None:
    shown = "bad shape\nException raised from f at g.cpp:1\nframe #0: ..."
    assert reason(RuntimeError(shown)) == "bad shape"
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("  two\nlines ")) == "two\nlines"


@pytest.mark.parametrize(
    ("kind", "batch_first"), [(nn.LSTM, False), (nn.LSTM, True), (nn.GRU, False), (nn.RNN, True)]
)
def test_recurrent_layers_are_typed_for_all_sizes(kind: Any, batch_first: bool) -> None:
    sizes = (2, 3, 5) if batch_first else (3, 2, 5)
    layer = kind(5, 7, batch_first=batch_first, bidirectional=True).eval()
    axis = 0 if batch_first else 1
    traced = capture(layer, (torch.ones(sizes),), dynamic_shapes=({axis: Dim("n")},))
    symbols = traced.signature.symbols
    (call,) = (n for n in traced.operators if n.target in RECURRENT)
    out, *states = (type_text(v, symbols) for v in infer_node(traced, call))
    assert out == ("f32[n, 3, 14]" if batch_first else "f32[3, n, 14]")
    assert states == ["f32[2, n, 7]"] * (2 if kind is nn.LSTM else 1)
    (x, *rest), kwargs = call.args, call.kwargs
    narrow = x.meta["val"].new_ones((*sizes[:2], 4))  # type: ignore[union-attr]
    with pytest.raises(PassError, match="4 features for weights of 5"):
        infer(traced, call.target, (narrow, *rest), kwargs)


RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input}

# -- calls seen before ----------------------------------------------------------------------------


def test_equal_calls_share_a_type_and_others_do_not() -> None:
    memo, x = TypeMemo(program()), program().placeholders[0]
    first = memo.of(aten.relu.default, (x,), {})
    assert memo.of(aten.relu.default, (x,), {}) is first
    assert typed(memo.of(aten.isnan.default, (x,), {})) == "bool[n, 6]"
    assert typed(memo.of(aten.sum.dim_IntList, (x, [0]), {})) == "f32[6]"
    assert typed(memo.of(aten.sum.dim_IntList, (x, [1]), {})) == "f32[n]"
    assert typed(memo.of(aten.sum.dim_IntList, (x, [0]), {"keepdim": True})) == "f32[1, 6]"


def test_each_count_that_depends_on_data_is_a_size_of_its_own() -> None:
    own = capture(Lambda(lambda x: x > 0), (torch.ones(4, 6),))
    memo, x, mask = TypeMemo(own), own.placeholders[0], own.operators[0]
    one, other = (memo.of(aten.masked_select.default, (x, mask), {}) for _ in "ab")
    assert str(one.shape[0]) != str(other.shape[0])


def test_functions_of_python_are_typed_too() -> None:
    memo, x = TypeMemo(program()), program().placeholders[0]
    assert typed(memo.of(lambda value, times: value.repeat(times, 1), (x, 2), {})) == "f32[2*n, 6]"


# -- values ---------------------------------------------------------------------------------------


def test_one_node_is_evaluated_with_all_its_arguments() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(aten.add.Tensor, (x, y), {"alpha": 3})
    assert torch.equal(evaluate(node, {x: torch.ones(2), y: torch.ones(2)}), torch.full((2,), 4.0))


def test_an_error_of_planish_is_handed_on_as_it_is() -> None:
    def refuse() -> None:
        raise UsageError("mine")

    node = Graph().call_function(refuse)
    with pytest.raises(UsageError, match="mine"):
        evaluate(node, {})
