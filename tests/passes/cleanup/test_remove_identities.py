"""remove-identities: operators that return their operand go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.execute import run
from planish.ir.ops import is_op
from planish.passes.base import PassContext
from planish.passes.cleanup._identities import is_whole_range
from planish.passes.cleanup._uniform import uniform_value
from planish.passes.cleanup.remove_identities import RemoveIdentities, broadcast_shape
from tests.passes.cleanup.graphs import Of, captured
from tests.support.check import check, refuses, run_checked, unchanged

aten = torch.ops.aten
F = nn.functional
PASS = RemoveIdentities()
X = torch.randn(2, 3, 4)
W = torch.ones(3)
MASK = torch.tensor([True, False, True, True])
SWAP = torch.tensor([0, 2, 1])
ALMOST = torch.tensor([1.0, 1.0, 1.5, 1.0])
WIDE = torch.tensor(1.5, dtype=torch.float64)
DYNAMIC = ({0: Dim("batch"), 1: Dim("length")},)

# -- Fires ------------------------------------------------------------------------------------


def test_what_traced_transformers_hold_goes() -> None:
    def forward(x: Tensor) -> Tensor:
        y = F.dropout(x, 0.1, training=False).to(torch.float32)
        y = y.view(y.shape[0], y.shape[1], -1)[:, :, :].contiguous().expand(-1, -1, 4)
        return torch.relu(y) * 1.0 + 0

    check(
        Of(forward),
        (X,),
        PASS,
        """
        program(%x: f32[batch, length, 4])
          %0: f32[batch, length, 4] = aten.relu(%x)
          return %0
        """,
        dynamic_shapes=DYNAMIC,
    )


IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "alias": aten.alias,
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels": lambda x: x.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0),
    "to": lambda x: x.to(torch.float32, copy=True),
    "type_as": lambda x: x.type_as(x),
    "_to_copy": lambda x: aten._to_copy(x, dtype=torch.float32),
    "lift": aten.lift_fresh_copy,
    "feature_dropout": lambda x: aten.feature_dropout(x, 0.5, False),
    "dropout_0": lambda x: F.dropout(x, 0.0, training=True),
    "view": lambda x: x.view(x.shape),
    "reshape": lambda x: x.reshape(2, -1, 4),
    "flatten": lambda x: x.flatten(1, 1),
    "expand": lambda x: x.expand(-1, 3, -1),
    "repeat": lambda x: x.repeat(1, 1, 1),
    "slice": lambda x: x[0:, :9],
    "mean": lambda x: x.unsqueeze(1).mean(1, keepdim=True).squeeze(1),
    "squeeze": lambda x: x.squeeze(1),
    "cat": lambda x: torch.cat([x], 1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0)),
    "permute": lambda x: x.permute(0, 1, -1),
    "transpose": lambda x: x.transpose(1, -2),
    "pool": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "max_pool": lambda x: F.max_pool2d(x, 1),
    "add": lambda x: x + 0,
    "radd": lambda x: torch.zeros(4) + x,
    "sub": lambda x: x - 0.0,
    "mul": lambda x: torch.ones(1, 4) * x,
    "div": lambda x: x / 1,
    "pow": lambda x: x**1,
    "neg": lambda x: x.neg().neg(),
    "relu": lambda x: x.relu().relu(),
    "clamp": lambda x: x.clamp(0, 6).clamp(0, 6),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 1, 2])),
    "where": lambda x: torch.where(torch.ones(3, 1).bool(), x, x * 2),
    "where_not": lambda x: torch.where(torch.zeros(4).bool(), x * 2, x),
    "masked_fill": lambda x: x.masked_fill(torch.zeros(4).bool(), 1.0),
    "and": lambda x: x * ((x > 0) & torch.ones(4).bool() | torch.zeros(4).bool()),
    "not": lambda x: x * (x > 0).logical_not().logical_not(),
    "copy": lambda x: aten.copy(torch.zeros(2, 3, 4), x),
}


@pytest.mark.parametrize("name", sorted(IDENTITIES))
def test_each_identity_goes_bit_by_bit(name: str) -> None:
    program = captured(Of(lambda x: IDENTITIES[name](x.sin()).cos()), X)
    result = run_checked(program, PASS)
    assert len(result.program.operators) < len(program.operators)
    assert torch.equal(run(result.program, (X,))[0], run(program, (X,))[0])


def test_a_neutral_operand_that_only_broadcasts_leaves_an_expand() -> None:
    check(
        Of(lambda x: (torch.zeros(2, 3, 1, dtype=torch.int64) + x).exp()),
        (torch.arange(4),),
        PASS,
        """
        program(%x: i64[4])
          %0: i64[2, 3, 4] = aten.expand(%x, size=[2, 3, 4])
          %1: f32[2, 3, 4] = aten.exp(%0)
          return %1
        """,
        changes=1,
    )


def test_operators_that_broadcast_need_no_expand() -> None:
    check(
        Of(lambda x, y: x * y.unsqueeze(1).expand(-1, x.shape[1], -1)),
        (X, torch.randn(2, 4)),
        PASS,
        """
        program(%x: f32[batch, length, 4], %y: f32[batch, 4])
          %0: f32[batch, 1, 4] = aten.unsqueeze(%y, dim=1)
          %1: f32[batch, length, 4] = aten.mul.Tensor(%x, %0)
          return %1
        """,
        dynamic_shapes=({0: (b := Dim("batch")), 1: Dim("length")}, {0: b}),
        changes=1,
    )


def test_attention_needs_no_mask_that_hides_nothing_and_no_expanded_one() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        first = F.scaled_dot_product_attention(q, q, q, torch.ones(3, 3).bool())
        mask = (y > 0).view(2, 1, 1, 3).expand(2, 1, 3, 3)
        return first + F.scaled_dot_product_attention(q, q, q, mask)

    result = check(Of(forward), (X, torch.ones(2, 3)), PASS, changes=2)
    assert {c.rule for c in result.changes} == {"DropTrueMask", "DropExpand"}
    assert not any(is_op(n, aten.expand.default) for n in result.program.operators)


def test_a_view_behind_a_removed_copy_becomes_a_reshape() -> None:
    check(
        Of(lambda x: x.transpose(1, 2).contiguous().relu().view(2, 12)),
        (X,),
        PASS,
        """
        program(%x: f32[2, 3, 4])
          %0: f32[2, 4, 3] = aten.transpose.int(%x, dim0=1, dim1=2)
          %1: f32[2, 4, 3] = aten.relu(%0)
          %2: f32[2, 12] = aten.reshape(%1, shape=[2, 12])
          return %2
        """,
        changes=1,
    )


# -- Refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [F.dropout, F.alpha_dropout])
def test_refuses_dropout_in_training_mode(kind: Callable[..., Tensor]) -> None:
    module = Of(lambda x: kind(x, 0.5, training=True) * 0 + x)
    refuses(module, (X,), PASS, "it is in training mode")


def test_refuses_where_the_type_changes() -> None:
    module = Of(lambda x: (x + 0.0) * 2)
    refuses(module, (torch.arange(3),), PASS, "the result is f32[3] and this one is i64[3]")


def test_refuses_a_size_that_no_operator_computed() -> None:
    dims = ({0: (n := Dim("n"))}, {0: Dim("m"), 1: n})
    refuses(
        Of(lambda x, y: torch.relu(x + torch.zeros_like(y))),
        (torch.randn(2), torch.randn(3, 2)),
        PASS,
        "it broadcasts to sizes that no operator has computed",
        dynamic_shapes=dims,
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.clone(), "the memory of an input"),
        (lambda x: (x + 0).view(-1), "the memory of an input"),
        (lambda x: (x + 1, W.clone()), "the memory of a constant"),
        (lambda x: (y := x + 1, y.clone()), "two outputs would share their memory"),
    ],
)
def test_refuses_to_hand_out_memory(function: Callable[..., Any], reason: str) -> None:
    refuses(Of(function), (X,), PASS, reason)


def test_refuses_where_strides_are_read() -> None:
    module = Of(lambda x: x.transpose(1, 2).contiguous().as_strided((2, 2), (1, 2)) + 0.5)
    refuses(module, (X,), PASS, "as_strided reads the strides this operator sets")


def test_refuses_channels_last_for_torchscript() -> None:
    module = Of(lambda x: x.contiguous(memory_format=torch.channels_last).relu())
    args, context = (torch.randn(1, 2, 3, 3),), PassContext(target="torchscript")
    refuses(module, args, PASS, "channels_last", context=context)
    check(module, args, PASS, changes=1)


NOT_IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "and": lambda x: x.long() & 1,
    "slice": lambda x: x[:, 1:],
    "rsub": lambda x: 0 - x,
    "floor": lambda x: torch.div(x, 1, rounding_mode="floor"),
    "alpha": lambda x: torch.add(torch.zeros(4), x, alpha=2),
    "clamp": lambda x: x.clamp(0, 6).clamp(0, 5),
    "abs_neg": lambda x: -(x.abs()),
    "where": lambda x: torch.where(MASK, x, x * 2),
    "index": lambda x: x.index_select(1, SWAP),
    "almost": lambda x: x * ALMOST,
    "scalar": lambda x: x * WIDE.expand(4),
    "pad": lambda x: F.pad(x, (1, -1)),
}


@pytest.mark.parametrize("name", sorted(NOT_IDENTITIES))
def test_what_only_looks_like_an_identity_stays(name: str) -> None:
    unchanged(Of(lambda x: NOT_IDENTITIES[name](x)), (X,), PASS)


# -- Meaning ----------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(sorted(IDENTITIES)), max_size=6), st.booleans())
def test_any_chain_of_identities_keeps_every_bit(names: list[str], transposed: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).transpose(0, 1).sin() if transposed else x.sin()
        for name in names:
            x = IDENTITIES[name](x.contiguous())
        return x.cos()

    program = captured(Of(forward), X)
    result = run_checked(program, PASS)
    assert torch.equal(run(result.program, (X,))[0], run(program, (X,))[0])


@given(st.lists(st.lists(st.sampled_from([1, 3]), max_size=3), min_size=1, max_size=3))
def test_shapes_broadcast_as_torch_does(shapes: list[list[int]]) -> None:
    expected = torch.broadcast_shapes(*shapes)
    assert broadcast_shape([tuple(s) for s in shapes]) == tuple(expected)


def test_a_uniform_tensor_holds_one_number() -> None:
    assert uniform_value(torch.ones(3, 2)) == 1
    assert uniform_value(torch.tensor([1.0, 2.0, 1.0])) is None
    assert uniform_value(torch.tensor([float("nan")])) is None
    assert uniform_value(torch.ones(0)) is None
    assert uniform_value(torch.zeros(3).bool()) is False


def test_a_whole_range_counts_from_zero_to_the_end() -> None:
    assert is_whole_range(torch.tensor([0, 1, 2]), 3)
    assert not is_whole_range(torch.tensor([0, 1]), 3)
    assert not is_whole_range(torch.tensor([0, 2, 1]), 3)


# -- Neighbors --------------------------------------------------------------------------------


def test_types_and_layers_of_what_reads_the_operand_stay() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU())
    result = check(layer, (X,), PASS, changes=1)
    relu = result.program.operators[-1]
    assert "ReLU" in str(relu.meta["nn_module_stack"])
