"""merge-duplicate-constants: equal constants are stored once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.tensortype import SparseLayout
from planish.passes.cleanup.merge_duplicate_constants import (
    MergeDuplicateConstants,
    digest,
    fingerprint,
)
from tests.passes.cleanup.graphs import Of, captured
from tests.support.check import check, refuses, run_checked, unchanged

PASS = MergeDuplicateConstants()
X = torch.randn(2, 3)

# -- Fires ------------------------------------------------------------------------------------


def test_the_name_that_stays_is_read_first() -> None:
    module = Of(
        lambda x, b, a: (x * b + a) / a,
        b=torch.tensor([2.0, 3.0, 4.0]),
        a=torch.tensor([2.0, 3.0, 4.0]),
    )
    result = check(
        module,
        (X,),
        PASS,
        """
        program(%x: f32[2, 3])
          const @b: f32[3]
          %0: f32[2, 3] = aten.mul.Tensor(%x, @b)
          %1: f32[2, 3] = aten.add.Tensor(%0, @b)
          %2: f32[2, 3] = aten.div.Tensor(%1, @b)
          return %2
        """,
        changes=1,
    )
    assert result.changes[0].detail == "@a is @b"


def test_layout_in_memory_does_not_matter() -> None:
    weight = torch.randn(3, 3)
    module = Of(lambda x, v, w: x @ v + x @ w, v=weight, w=weight.t().contiguous().t())
    check(module, (X,), PASS, changes=1)


# -- Refuses ----------------------------------------------------------------------------------


def test_zeros_of_either_sign_differ() -> None:
    unchanged(Of(lambda x, v, w: x + v - x * w, v=torch.zeros(3), w=-torch.zeros(3)), (X,), PASS)


def test_types_and_shapes_and_values_must_be_equal() -> None:
    tensors = {
        "a": torch.ones(3),
        "b": torch.ones(3, dtype=torch.int32),
        "c": torch.ones(1, 3),
        "d": torch.tensor([1.0, 1.5, 1.0]),
    }
    unchanged(Of(lambda x, a, b, c, d: x * a + b * c - d, **tensors), (X,), PASS)


def test_a_sparse_and_a_dense_constant_differ() -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0]).repeat(4, 1)
    module = Of(lambda x, v, w: x @ v + x @ w, v=weight, w=weight.clone())
    program = captured(module, torch.randn(2, 4))
    program.layouts["v"] = SparseLayout(2, 4, 1)
    unchanged(program, (), PASS)


def test_refuses_to_let_two_outputs_share_memory() -> None:
    module = Of(lambda x, v, w: (x + 1, v, w), v=torch.ones(3), w=torch.ones(3))
    refuses(module, (X,), PASS, "two outputs would share their memory")


# -- Meaning ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6))
def test_as_many_constants_remain_as_there_are_values(values: list[int]) -> None:
    tensors = {f"c{i}": torch.full((3,), float(v)) for i, v in enumerate(values)}
    program = captured(Of(lambda x, **c: sum((x * t for t in c.values()), x), **tensors), X)
    result = run_checked(program, PASS)
    assert len(result.program.constants) == len(set(values))
    assert len(result.changes) == len(values) - len(set(values))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]), st.integers(0, 40))
def test_a_hash_sees_every_bit(dtype: torch.dtype, count: int) -> None:
    tensor = torch.ones(count).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    for i in range(count):
        other = tensor.clone()
        other[i] = 0
        assert digest(other) != digest(tensor)


def test_a_nan_is_equal_to_itself() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert digest(nan) == digest(nan.clone())


# -- Neighbors --------------------------------------------------------------------------------


def test_tied_weights_are_one_constant_already() -> None:
    weight = torch.randn(3, 3)
    unchanged(Of(lambda x, v, w: x @ v + x @ w, v=weight, w=weight), (X,), PASS)
