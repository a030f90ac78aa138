"""simplify-layout: chains of operators that only move elements become one, or none."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from planish.ir.execute import run
from planish.passes.cleanup._pieces import Slice, compose_slices
from planish.passes.cleanup._reshapes import Plan, compose, plain_sizes, plan_reshape
from planish.passes.cleanup.simplify_layout import SimplifyLayout, is_lossless
from tests.passes.cleanup.graphs import Of, captured
from tests.support.check import check, refuses, run_checked, unchanged

aten = torch.ops.aten
PASS = SimplifyLayout()
X = torch.randn(2, 3, 4)
BATCH = ({0: Dim("batch")},)
BOTH = ({0: Dim("batch"), 1: Dim("length")},)

# -- Fires ------------------------------------------------------------------------------------


def test_reshapes_merge_into_one_that_reads_no_sizes() -> None:
    check(
        Of(lambda x: x.flatten(1).view(x.shape[0], 2, -1).unsqueeze(1).relu()),
        (X,),
        PASS,
        """
        program(%x: f32[batch, 3, 4])
          %0: f32[batch, 1, 2, 6] = aten.reshape(%x, shape=[-1, 1, 2, 6])
          %1: f32[batch, 1, 2, 6] = aten.relu(%0)
          return %1
        """,
        dynamic_shapes=BATCH,
    )


def test_with_two_symbols_the_sizes_that_were_there_are_used() -> None:
    check(
        Of(lambda x: x.unflatten(2, (2, 2)).reshape(x.shape[0], x.shape[1], 1, 4, 1).relu()),
        (X,),
        PASS,
        """
        program(%x: f32[batch, length, 4])
          %0: int = aten.sym_size.int(%x, dim=0)
          %1: int = aten.sym_size.int(%x, dim=1)
          %2: f32[batch, length, 1, 4, 1] = aten.reshape(%x, shape=[%0, %1, 1, 4, 1])
          %3: f32[batch, length, 1, 4, 1] = aten.relu(%2)
          return %3
        """,
        dynamic_shapes=BOTH,
        changes=1,
    )


@pytest.mark.parametrize(
    ("chain", "operator"),
    [
        (lambda x: x.unsqueeze(1).squeeze(1), None),
        (lambda x: x.unsqueeze(0).reshape(2, 1, 3, 4), "unsqueeze"),
        (lambda x: x.reshape(2, 1, 3, 1, 4).flatten(3), "unsqueeze"),
        (lambda x: x[:, :1].unsqueeze(0).view(2, 4), "squeeze.dim"),
        (lambda x: x.flatten().contiguous().view(4, 6), "reshape"),
        (lambda x: x.transpose(0, 1).transpose(1, 0), None),
        (lambda x: x.permute(1, 2, 0).permute(1, 2, 0), "permute"),
        (lambda x: x.permute(2, 0, 1).clone().movedim(1, 2), "transpose.int"),
        (lambda x: x.mT.permute(0, 2, 1), None),
        (lambda x: x.unsqueeze(0).expand(5, -1, -1, 4).expand(6, 5, 2, -1, -1), "expand"),
        (lambda x: x[:, :, 1:][:, :, 1:3], "slice.Tensor"),
        (lambda x: x[:, :, ::2][:, :, -1:], "slice.Tensor"),
        (lambda x: torch.cat([x, torch.cat([x, x + 1], -1)], 2), "cat"),
        (lambda x: torch.cat(x.chunk(3, 1), 1), None),
        (lambda x: torch.cat(x.split([1, 3], 2), -1), None),
        (lambda x: torch.cat([x[..., :1], x[..., 1:2], x[..., 2:]], 2), None),
        (lambda x: torch.stack(x.unbind(1), 1), None),
        (lambda x: torch.cat([x, x + 1], 1).split(3, 1)[1], "add.Tensor"),
        (lambda x: x.double().float(), None),
        (lambda x: (x > 0).float().long(), "to.dtype"),
    ],
)
def test_each_chain_ends_in_what_it_amounts_to(
    chain: Callable[[Tensor], Tensor], operator: str | None
) -> None:
    program = captured(Of(lambda x: chain(x.sin()) * 1.5), X)
    result = run_checked(program, PASS)
    assert torch.equal(run(result.program, (X,))[0], run(program, (X,))[0])
    last = result.program.operators[-1].args[0]
    sin = next(n for n in result.program.operators if n.target is aten.sin.default)
    names = [str(n.target).removeprefix("aten.").removesuffix(".default") for n in (last,)]  # type: ignore[union-attr]
    assert (last is sin) if operator is None else names == [operator]
    assert len(result.program.operators) < len(program.operators)


def test_a_permutation_of_axes_of_size_one_is_a_reshape() -> None:
    check(
        Of(lambda x: x.transpose(1, 2).flatten(1).relu()),
        (torch.randn(2, 3, 1, 4),),
        PASS,
        """
        program(%x: f32[batch, 3, 1, 4])
          %0: f32[batch, 12] = aten.reshape(%x, shape=[-1, 12])
          %1: f32[batch, 12] = aten.relu(%0)
          return %1
        """,
        dynamic_shapes=BATCH,
        changes=2,
    )


def test_the_index_of_a_traced_attention_mask_is_a_reshape() -> None:
    def forward(x: Tensor) -> Tensor:
        batch = torch.arange(x.shape[0])[:, None, None, None]
        keys = torch.arange(x.shape[1])[None, None, None, :]
        return (x[batch, keys] > 0).float()

    check(
        Of(forward),
        (torch.randn(2, 3),),
        PASS,
        """
        program(%x: f32[batch, length])
          %0: f32[batch, 1, length] = aten.unsqueeze(%x, dim=1)
          %1: f32[batch, 1, 1, length] = aten.unsqueeze(%0, dim=2)
          %2: bool[batch, 1, 1, length] = aten.gt.Scalar(%1, other=0)
          %3: f32[batch, 1, 1, length] = aten.to.dtype(%2, dtype=f32)
          return %3
        """,
        dynamic_shapes=BOTH,
    )


def test_pieces_of_unknown_length_are_known_to_be_all() -> None:
    check(
        Of(lambda x: torch.cat([x[:2], x[2:]]) + 1),
        (torch.randn(7, 4),),
        PASS,
        """
        program(%x: f32[length, 4])
          %0: f32[length, 4] = aten.add.Tensor(%x, other=1)
          return %0
        """,
        dynamic_shapes=({0: Dim("length", min=4)},),
        changes=1,
    )


# -- Refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (y := x.flatten(1)).unsqueeze(1) * y.sum(), "flatten has other users"),
        (lambda x: (y := x.transpose(0, 1)).transpose(1, 2) * y.sum(), "transpose has other users"),
        (lambda x: (y := x[:, 1:])[:, 1:] * y.sum(), "has other users"),
        (lambda x: torch.cat([y := torch.cat([x, x], 1), x], 1) * y.sum(), "cat has other users"),
        (lambda x: (y := x.double()).half() * y.sum(), "has other users"),
        (lambda x: (y := x.expand(5, 2, 3, 4)).expand(6, 5, 2, 3, 4) * y.sum(), "has other users"),
        (lambda x: x.half().float(), "rounds or wraps values"),
        (lambda x: torch.cat([torch.cat([x, x.long()]), x.double()]), "changes the type of its"),
        (lambda x: torch.cat([x, x.long()]).split(2)[1] + 1, "changes the type of this operand"),
        (lambda x: torch.cat(x.split(1)), "the memory of an input"),
        (lambda x: x.unsqueeze(0).clone().squeeze(0), "the memory of an input"),
        (lambda x: x.t().clone().t() if x.dim() == 2 else x.mT.clone().mT, "memory of an input"),
        (
            lambda x: x.unsqueeze(0).clone().squeeze(0).as_strided((2,), (3,)) + 1,
            "reads the strides",
        ),
    ],
)
def test_refuses(function: Callable[[Tensor], Any], reason: str) -> None:
    refuses(Of(function), (X,), PASS, reason)


def test_refuses_sizes_known_only_at_run_time() -> None:
    module = Of(lambda x: x.unsqueeze(1).unsqueeze(3).relu())
    refuses(module, (X,), PASS, "known only at run time", dynamic_shapes=BOTH)


def test_refuses_bounds_known_only_at_run_time() -> None:
    module = Of(lambda x: x[:, 1:][:, : x.shape[0]] + 1)
    args, dims = (torch.randn(2, 9),), ({0: Dim("batch", min=2, max=4)},)
    refuses(module, args, PASS, "a bound is known only at run time", dynamic_shapes=dims)


FIRST = torch.arange(2).reshape(1, 2, 1)
SECOND = torch.arange(3).reshape(3, 1, 1)
THIRD = torch.arange(4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
        lambda x: torch.cat(x.chunk(3, 1)[:2], 1),
        lambda x: torch.cat(x.chunk(2, 0), 1),
        lambda x: torch.cat([x[:, :1], x[:, 2:]], 1),
        lambda x: torch.cat([x[:, :2], x[:, 1:]], 1),
        lambda x: torch.stack(x.unbind(1), 0),
        lambda x: torch.cat([x, x + 1], 1).split([2, 4], 1)[0] * 1.5,
        lambda x: x[:, 1:][:, :, 1:],
        lambda x: torch.cat([x, torch.cat([x, x], 1)[:, :3]], 2),
        lambda x: x.transpose(0, 1),
        lambda x: x[FIRST[:, :, 0] * 0, THIRD[:1]],
        lambda x: x[FIRST, SECOND, THIRD],
    ],
)
def test_what_is_no_chain_stays(function: Callable[[Tensor], Tensor]) -> None:
    unchanged(Of(function), (X,), PASS)


# -- Meaning ----------------------------------------------------------------------------------

_MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(0, 1) if x.dim() > 1 else x.unsqueeze(0),
    "unsqueeze": lambda x: x.unsqueeze(-2 if x.dim() else 0),
    "squeeze": lambda x: x.squeeze(0),
    "halve": lambda x: x.reshape(-1, 2),
    "view": lambda x: x.contiguous().view(*x.shape, 1),
    "permute": lambda x: x.permute(*range(1, x.dim()), 0),
    "transpose": lambda x: x.transpose(0, -1),
    "swap": lambda x: x.mT if x.dim() > 1 else x,
    "move": lambda x: x.movedim(0, -1),
    "slice": lambda x: x[..., :-1] if x.shape[-1] > 2 else x,
    "stride": lambda x: x[..., ::2] if x.shape[-1] > 3 else x,
    "split": lambda x: torch.cat(x.split(2, 0), 0),
    "cat": lambda x: torch.cat([x[:1], torch.cat([x, x[:1]])])[1:-1],
    "double": lambda x: x.double().float(),
    "clone": lambda x: x.clone(),
}


@given(st.lists(st.sampled_from(sorted(_MOVES)), min_size=2, max_size=7), st.booleans())
def test_any_chain_of_moves_keeps_every_element(names: list[str], dynamic: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        x = x.sin()
        for name in names:
            x = _MOVES[name](x)
        return x.cos()

    static = dynamic and set(names) & {"squeeze", "slice", "stride", "split", "cat", "halve"}
    shapes = ({0: Dim("batch", min=2, max=64)},) if dynamic and not static else None
    # Where a batch axis lands last, its length is cut or split by numbers that torch specializes.
    program = captured(Of(forward), X, dynamic_shapes=shapes)
    result = run_checked(program, PASS)
    assert torch.equal(run(result.program, (X,))[0], run(program, (X,))[0])
    assert len(result.program.operators) <= len(program.operators)


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_permutations_compose(outer: list[int], inner: list[int]) -> None:
    x = torch.randn(2, 3, 4, 5)
    assert x.permute(inner).permute(outer).shape == x.permute(compose(outer, inner)).shape


_BOUNDS = st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(1, 3))


@given(_BOUNDS, _BOUNDS, st.integers(0, 8))
def test_slices_compose_at_every_length(
    first: tuple[int, int, int], second: tuple[int, int, int], length: int
) -> None:
    both = compose_slices(Slice(*first), Slice(*second))
    values = list(range(length))
    assert values[slice(*both)] == values[slice(*first)][slice(*second)]


@given(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4), st.lists(st.sampled_from([1, 2, 3, 4])))
def test_a_planned_reshape_gets_there(before: list[int], after: list[int]) -> None:
    if math.prod(before) != math.prod(after) or before == after:
        after = [*before[::-1], 1]
    plan = plan_reshape(before, after)
    assert isinstance(plan, Plan)
    x = torch.arange(math.prod(before)).reshape(before)
    assert torch.equal(plan.target(x, *plan.args), x.reshape(after))


def test_sizes_are_numbers_where_they_can_be() -> None:
    assert plain_sizes([2, 3]) == [2, 3]
    assert plain_sizes([0, 3], [0, -1]) == [0, 3]


def test_a_lossless_cast_keeps_every_value() -> None:
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    types += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for narrow, wide in itertools.product(types, types):
        if narrow.is_floating_point:
            info = torch.finfo(narrow)
            values = [0.0, info.max, info.min, info.tiny, 1 + info.eps, -info.smallest_normal]
        else:
            most = 1 if narrow is torch.bool else torch.iinfo(narrow).max
            values = [0, 1, most, most - 1, 0 if narrow is torch.bool else torch.iinfo(narrow).min]
        x = torch.tensor(values, dtype=narrow)
        kept = torch.equal(x.to(wide).to(narrow), x) and torch.equal(
            x.to(wide).double(), x.double()
        )
        assert not is_lossless(narrow, wide) or kept, (narrow, wide)
    assert is_lossless(torch.int16, torch.float32)
    assert is_lossless(torch.uint8, torch.bfloat16)
    assert not is_lossless(torch.int32, torch.float32)
    assert not is_lossless(torch.bfloat16, torch.float16)
    assert not is_lossless(torch.float16, torch.bfloat16)


# -- Neighbors --------------------------------------------------------------------------------


def test_a_view_that_relied_on_a_copy_becomes_a_reshape() -> None:
    check(
        Of(lambda x: x.mT.flatten(1).reshape(2, 4, 3).relu().view(2, 12)),
        (X,),
        PASS,
        """
        program(%x: f32[2, 3, 4])
          %0: f32[2, 4, 3] = aten.mT(%x)
          %1: f32[2, 4, 3] = aten.relu(%0)
          %2: f32[2, 12] = aten.reshape(%1, shape=[2, 12])
          return %2
        """,
        changes=1,
    )
