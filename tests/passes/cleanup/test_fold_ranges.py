"""fold-ranges: index arithmetic whose outcome is the same for every size."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.execute import run
from planish.passes.cleanup._affine import Affine, combine, decide
from planish.passes.cleanup._follow import affine_values
from planish.passes.cleanup.fold_ranges import FoldRanges
from tests.passes.cleanup.graphs import Of, captured
from tests.support.check import check, refuses, run_checked, unchanged

PASS = FoldRanges()
IDS = torch.arange(10).reshape(2, 5)
BOTH = ({0: Dim("batch"), 1: Dim("length")},)

# -- Fires ------------------------------------------------------------------------------------


def test_positions_are_never_negative() -> None:
    """The mask of every traced encoder."""

    def forward(x: Tensor) -> Tensor:
        queries = torch.arange(x.shape[1])[None, :, None] + 0
        return (queries >= 0) & (x > 3).unsqueeze(1)

    check(
        Of(forward),
        (IDS,),
        PASS,
        """
        program(%x: i64[batch, length])
          const @folded.uniform: bool[1, 1, 1]
          %0: int = aten.sym_size.int(%x, dim=1)
          %1: bool[1, length, 1] = aten.expand(@folded.uniform, size=[1, %0, 1])
          %2: bool[batch, length] = aten.gt.Scalar(%x, other=3)
          %3: bool[batch, 1, length] = aten.unsqueeze(%2, dim=1)
          %4: bool[batch, length, length] = aten.__and__.Tensor(%1, %3)
          return %4
        """,
        dynamic_shapes=BOTH,
        changes=1,
    )


def test_one_sequence_is_found_to_be_one_sequence() -> None:
    """The test for packed sequences in every traced decoder."""

    def forward(x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1)
        step = torch.diff(position, prepend=position[:, :1] - 1, dim=-1)
        sequence = (step != 1).cumsum(-1)
        same = sequence[:, None, :] == sequence[:, :, None]
        return torch.where(same, x.unsqueeze(1), 0)

    result = check(Of(forward), (IDS,), PASS, dynamic_shapes=BOTH, changes=1)
    assert result.changes[0].detail == "it is True everywhere"
    assert set(result.changes[0].removed) >= {"eq", "cumsum", "ne", "diff", "arange"}


def test_a_lookup_of_one_row_is_that_row() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds = nn.Embedding(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            kind = torch.zeros_like(x)
            return self.kinds(kind) + torch.zeros(x.shape[0], x.shape[1], 1)

    module = Embed()
    result = check(
        module,
        (IDS,),
        PASS,
        """
        program(%x: i64[batch, length])
          const @kinds.weight: f32[1, 1, 3]
          %0: int = aten.sym_size.int(%x, dim=0)
          %1: int = aten.sym_size.int(%x, dim=1)
          %2: f32[batch, length, 3] = aten.expand(@kinds.weight, size=[%0, %1, 3])
          %3: f32[batch, length, 1] = aten.zeros(size=[%0, %1, 1], device=cpu, pin_memory=False)
          %4: f32[batch, length, 3] = aten.add.Tensor(%2, %3)
          return %4
        """,
        dynamic_shapes=BOTH,
        changes=1,
    )
    assert torch.equal(result.program.constants["kinds.weight"][0, 0], module.kinds.weight[0])  # type: ignore[index]


# -- Refuses ----------------------------------------------------------------------------------


def test_refuses_an_output() -> None:
    module = Of(lambda x: (torch.arange(x.shape[1]) >= 0, x + 1))
    refuses(module, (IDS,), PASS, "it is an output", dynamic_shapes=BOTH)


def test_refuses_sizes_that_no_operator_computed() -> None:
    def forward(x: Tensor) -> Tensor:
        counts = torch.arange(2 * x.shape[1])
        return (counts >= 0).sum() + x

    refuses(Of(forward), (IDS,), PASS, "no operator has computed its sizes", dynamic_shapes=BOTH)


@pytest.mark.parametrize(
    "function",
    [
        lambda i, j: i >= 1,
        lambda i, j: i <= 4,
        lambda i, j: i <= j,
        lambda i, j: i - j >= 0,
        lambda i, j: i == 0,
        lambda i, j: i.float() >= 0,
        lambda i, j: i.to(torch.int8) >= 0,
        lambda i, j: i * j >= 0,
        lambda i, j: (i + 1).bool(),
    ],
)
def test_what_depends_on_the_size_or_may_wrap_stays(function: Callable[..., Tensor]) -> None:
    def forward(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return x.unsqueeze(1) * function(positions[:, None], positions[None, :])

    unchanged(Of(forward), (IDS,), PASS, dynamic_shapes=BOTH)


# -- Meaning ----------------------------------------------------------------------------------

_LINES = st.builds(Affine, st.integers(-3, 3), st.lists(st.integers(-2, 2), max_size=2).map(tuple))
_COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def _values(line: Affine, size: int) -> Tensor:
    value = torch.tensor(line.start)
    for axis, step in enumerate(reversed(line.steps)):
        value = value + (step * torch.arange(size)).reshape(size, *[1] * axis)
    return value


@given(st.sampled_from(sorted(_COMPARISONS)), _LINES, _LINES, st.integers(1, 5))
def test_a_decision_holds_at_every_size(name: str, a: Affine, b: Affine, size: int) -> None:
    decided = decide(name, a, b)
    found = _COMPARISONS[name](_values(a, size), _values(b, size))
    assert decided is None or bool((found == decided).all())
    if a.is_uniform and b.is_uniform:
        assert decided is bool(found.all())


@given(_LINES, _LINES, st.sampled_from([1, -1]))
def test_lines_add_up(a: Affine, b: Affine, sign: int) -> None:
    assert torch.equal(
        _values(combine(a, b, sign), 3).expand(3, 3),
        (_values(a, 3) + sign * _values(b, 3)).expand(3, 3),
    )


_STEPS: dict[str, Callable[[Tensor], Any]] = {
    "plus": lambda v: v + 2,
    "minus": lambda v: 1 - v,
    "row": lambda v: v.unsqueeze(0),
    "column": lambda v: v.unsqueeze(-1),
    "transpose": lambda v: v.transpose(0, -1),
    "cut": lambda v: v[1:],
    "skip": lambda v: v[..., ::2],
    "cross": lambda v: v.unsqueeze(-1) - v.unsqueeze(-2),
    "int": lambda v: v.to(torch.int32),
    "copy": lambda v: v.clone(),
    "flat": lambda v: v.reshape(-1),
    "steps": lambda v: v.diff(dim=-1),
    "sign": lambda v: (v - v >= 0).long(),
}


@given(st.lists(st.sampled_from(sorted(_STEPS)), max_size=5), st.integers(-2, 2))
def test_what_is_followed_is_what_is_computed(names: list[str], least: int) -> None:
    def forward(x: Tensor) -> Tensor:
        value = torch.arange(x.shape[1])
        for name in names:
            value = _STEPS[name](value) if value.dim() < 4 else value
        return (value >= least) * x.sum()

    dims = ({0: Dim("batch"), 1: Dim("length", min=7)},)
    program = captured(Of(forward), torch.randn(2, 30), dynamic_shapes=dims)
    lines = affine_values(program)

    def observe(node: Any, value: Any) -> None:
        if node in lines and value.numel():
            line, shape = lines[node], value.shape
            expected = torch.full(shape, line.start)
            for axis, step in enumerate(line.steps):
                along = [-1 if i == axis else 1 for i in range(len(shape))]
                expected = expected + step * torch.arange(shape[axis]).reshape(along)
            assert torch.equal(value.long(), expected), (node, line)

    run(program, program.samples[0], observe=observe)
    run_checked(program, PASS)


# -- Neighbors --------------------------------------------------------------------------------


def test_a_table_that_others_read_stays() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x) + self.table(torch.zeros_like(x))

    module = Embed()
    result = check(module, (IDS,), PASS, changes=1)
    assert sorted(tuple(c.shape) for c in result.program.constants.values()) == [(1, 1, 3), (12, 3)]  # type: ignore[arg-type]
