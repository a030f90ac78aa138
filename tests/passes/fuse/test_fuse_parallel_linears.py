from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout
from planish.passes.fuse.parallel_linears import FuseParallelLinears, joint_name, stack
from tests.passes.fuse.modules import BATCH, Unary, assert_is_a_value, random
from tests.support.check import check, refuses, unchanged

FUSE = FuseParallelLinears()
X = random(2, 6)


class Projections(nn.Module):
    """Linears of the given sizes over one input; a negative size has no bias."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, *sizes: int, width: int = 6, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        for name, size in zip("qkvwz", sizes, strict=False):
            layer = nn.Linear(width, abs(size), bias=size > 0, dtype=dtype)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return tuple(layer(x) for layer in self.children())


def two_of_four(*, both: bool) -> Program:
    """Two linears on one input, one or both with a weight that is typed 2:4."""
    module = Projections(4, 4, width=8).eval()
    with torch.no_grad():
        for weight in (module.q.weight, module.k.weight):
            weight.mul_(torch.tensor([1.0, 0, 1, 0] * 2))
    program = capture(module, (random(2, 8),))
    program.layouts["q.weight"] = SparseLayout(2, 4, 1)
    if both:
        program.layouts["k.weight"] = SparseLayout(2, 4, 1)
    return program


# Fires ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Projections(6, 2, 2)

    def forward(self, x: Tensor) -> Any:
        v, q = self.attn.v(x), self.attn.q(x)
        return q, self.attn.k(x).relu(), v


def test_fuses_query_key_and_value_of_different_sizes() -> None:
    result = check(
        Attention(),
        (X,),
        FUSE,
        """
        program(%x: f32[batch, 6])
          const @attn.v_q_k.bias: f32[10]
          const @attn.v_q_k.weight: f32[10, 6]
          %0: f32[batch, 10] = aten.linear(%x, @attn.v_q_k.weight, @attn.v_q_k.bias)
          %1: (f32[batch, 2], f32[batch, 6], f32[batch, 2]) = aten.split_with_sizes(%0, split_sizes=[2, 6, 2], dim=-1)
          %2: f32[batch, 2] = sym.getitem(%1, 0)
          %3: f32[batch, 6] = sym.getitem(%1, 1)
          %4: f32[batch, 2] = sym.getitem(%1, 2)
          %5: f32[batch, 2] = aten.relu(%4)
          return %3, %5, %2
        """,  # noqa: E501
        dynamic_shapes=({0: BATCH},),
        changes=1,
    )
    assert result.changes[0].detail == "3 linears of 2 + 6 + 2 features"


def test_a_missing_bias_among_others_is_zero_and_none_at_all_stays_none() -> None:
    mixed = check(Projections(3, -2), (X,), FUSE, changes=1).program
    bias = mixed.constants["q_k.bias"]
    assert isinstance(bias, Tensor)
    assert bias.tolist()[3:] == [0, 0]
    bare = check(Projections(-3, -2), (X,), FUSE, changes=1).program
    assert set(bare.constants) == {"q_k.weight"}


def test_fuses_those_that_fit_beside_one_that_does_not() -> None:
    class Tied(Projections):
        def forward(self, x: Tensor) -> Any:
            return *super().forward(x), self.v.weight.sum()

    result = refuses(Tied(3, 2, 4), (X,), FUSE, "the weight is tied", changes=1)
    assert result.changes[0].detail == "2 linears of 3 + 2 features"


# Refuses -------------------------------------------------------------------------------------


def test_refuses_tied_weights() -> None:
    class Twice(Projections):
        def forward(self, x: Tensor) -> Any:
            return self.q(x), F.linear(x, self.q.weight)

    refuses(Twice(3), (X,), FUSE, "of 2 linears on this input 0 can be stacked: the weight is tied")


def test_refuses_weights_that_share_memory_under_two_names() -> None:
    both = random(4, 6)
    module = Unary(lambda m, x: (F.linear(x, m.a), F.linear(x, m.b)), a=both[:2], b=both[2:])
    refuses(module, (X,), FUSE, "the weight is tied to another use")


def test_refuses_weights_and_biases_that_are_computed() -> None:
    weights = {"w": random(3, 6), "b": random(3)}
    module = Unary(lambda m, x: (F.linear(x, m.w.exp()), F.linear(x, m.w.sin())), **weights)
    refuses(module, (X,), FUSE, "the weight is not constant")
    module = Unary(lambda m, x: (F.linear(x, m.w, m.b.exp()), F.linear(x, x)), **weights)
    refuses(module, (X,), FUSE, "the bias is not constant")


def test_refuses_groups_beyond_its_limits() -> None:
    refuses(Projections(3, 2), (X,), FuseParallelLinears(min_linears=3), "min_linears is 3")
    because = "together they have 5 features, more than 4"
    refuses(Projections(3, 2), (X,), FuseParallelLinears(max_features=4), because)


def test_refuses_weights_of_two_sparse_layouts() -> None:
    refuses(two_of_four(both=False), (), FUSE, "the weights differ in sparse layout")


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: (F.linear(x, m.v), F.linear(x + 1, m.w)),
        lambda m, x: (F.linear(x, m.v), F.linear(x[:1], m.w)),
        lambda m, x: F.linear(F.linear(x, m.v), m.w),
    ],
    ids=["another input", "a part of the input", "in a row"],
)
def test_leaves_linears_of_different_inputs(f: Any) -> None:
    unchanged(Unary(f, v=random(6, 6), w=random(6, 6, seed=1)), (X,), FUSE)


# Meaning -------------------------------------------------------------------------------------


def test_stacks_rows_and_fills_missing_biases() -> None:
    weight, bias = stack([torch.ones(1, 2), torch.zeros(2, 2)], [None, torch.tensor([5.0, 6.0])])
    assert weight.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert bias is not None
    assert bias.tolist() == [0, 5, 6]
    assert stack([torch.ones(1, 2)], [None])[1] is None


def test_joins_names_after_what_they_have_in_common() -> None:
    assert joint_name(["a.0.q.weight", "a.0.k.weight"]) == "a.0.q_k"
    assert joint_name(["a.b.q.weight", "a.c.q.weight"]) == "a.b_q_c_q"
    assert joint_name(["q", "k"]) == "q_k"
    assert joint_name(["a.weight", "a.other"]) == "a_a"


@given(
    sizes=st.lists(st.integers(-4, 4).filter(bool), min_size=2, max_size=5),
    width=st.integers(1, 5),
    lead=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_group_means_the_same(
    sizes: list[int], width: int, lead: list[int], dtype: torch.dtype
) -> None:
    module = Projections(*sizes, width=width, dtype=dtype)
    result = check(module, (random(*lead, width, dtype=dtype),), FUSE, changes=1)
    linear = [n for n in result.program.operators if n.target is torch.ops.aten.linear.default]
    assert len(linear) == 1


# Neighbors -----------------------------------------------------------------------------------


def test_keeps_a_common_sparse_layout() -> None:
    result = check(two_of_four(both=True), (), FUSE, changes=1)
    assert result.program.layouts == {"q_k.weight": SparseLayout(2, 4, 1)}


def test_each_output_says_which_linear_it_stands_for() -> None:
    result = check(Projections(3, 2), (X,), FUSE, changes=1)
    linear, split, first, second = result.program.operators
    assert linear.meta["from"] == ("fuse-parallel-linears", "widen-linear", ("linear", "linear_1"))
    assert split.meta["from"][2] == ("linear", "linear_1")
    assert [first.meta["from"][2], second.meta["from"][2]] == [("linear",), ("linear_1",)]


def test_is_a_value() -> None:
    assert_is_a_value(FUSE, "fuse-parallel-linears")
    limited = FuseParallelLinears(min_linears=3, max_features=64)
    assert_is_a_value(limited, "fuse-parallel-linears{min_linears=3,max_features=64}")
