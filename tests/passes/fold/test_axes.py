from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.capture import capture
from planish.ir.ops import is_op
from planish.passes.fold._axes import only_moves, producer, readers, second_reader

# Steps for a value of rank 4; each gives rank 4 back.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda y: y.transpose(1, 3),
    "permute": lambda y: y.permute(2, 0, 3, 1),
    "movedim": lambda y: y.movedim(0, 2),
    "mT": lambda y: y.mT,
    "contiguous": lambda y: y.contiguous(),
    "unsqueeze": lambda y: y.unsqueeze(1).squeeze(1),
    "merge": lambda y: y.flatten(0, 1).unflatten(0, (y.shape[0], y.shape[1])),
    "regroup": lambda y: y.reshape(y.shape[1], y.shape[0], y.shape[2], y.shape[3]),
    "mix": lambda y: y.reshape(y.shape[3], y.shape[2], y.shape[1], y.shape[0]),
}


class Moved(nn.Module):
    """Moves between an exponential and a sine, which tell the ends apart."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(x)
        for name in self.names:
            y = MOVES[name](y)
        return torch.sin(y)


def ends(module: nn.Module, *shape: int) -> tuple[Node, Node]:
    program = capture(module.eval(), (torch.rand(shape),))
    first = next(n for n in program.operators if is_op(n, torch.ops.aten.exp.default))
    last = next(n for n in program.operators if is_op(n, torch.ops.aten.sin.default))
    return first, last


@given(
    names=st.lists(st.sampled_from(sorted(MOVES)), max_size=3),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    axis=st.integers(0, 3),
)
def test_an_axis_is_followed_to_where_its_numbers_are(
    names: list[str], shape: tuple[int, ...], axis: int
) -> None:
    numbers = torch.arange(1.0, shape[axis] + 1)
    vector = [-1 if i == axis else 1 for i in range(4)]
    value = numbers.reshape(vector).expand(shape)
    for name in names:
        value = MOVES[name](value)

    first, last = ends(Moved(names), *shape)
    ((reader, _, after),) = readers(first, axis)
    assert reader is last
    assert after is not None
    if after >= 0:
        back = [-1 if i == after else 1 for i in range(4)]
        assert torch.equal(value, numbers.reshape(back).expand(value.shape))
        made, before = producer(last.args[0], after)  # type: ignore[arg-type]
        assert made is first
        assert before == axis
    else:
        mixing = {"regroup", "mix"} & set(names)
        assert mixing or shape[axis] == 1, "the axis was kept whole, and was lost"


def test_a_value_alike_everywhere_passes_all_moves() -> None:
    first, last = ends(Moved(sorted(MOVES)), 2, 3, 4, 5)
    assert producer(last.args[0], None) == (first, None)  # type: ignore[arg-type]
    assert second_reader(first, last) is None


def test_an_operator_that_reads_only_the_sizes_is_no_reader() -> None:
    class Measured(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(x)
            return torch.sin(y.flatten(0, 1).view_as(y)) + torch.zeros_like(y)

    first, last = ends(Measured(), 2, 3, 4)
    assert len(first.users) == 3
    assert second_reader(first, last) is None


def test_a_branch_is_a_second_reader() -> None:
    class Branched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(x).mT
            return torch.sin(y) + y

    first, last = ends(Branched(), 2, 3, 4)
    assert second_reader(first, last) == "m_t (aten.mT) has 2 users"
    assert len(readers(first, 1)) == 2


def test_dropout_moves_elements_only_where_it_drops_none() -> None:
    program = capture(nn.Sequential(nn.Dropout(0.5)).eval(), (torch.rand(2, 3),))
    (dropout,) = program.clone().operators
    assert only_moves(dropout)
    dropout.args = (*dropout.args[:2], True)
    assert not only_moves(dropout)
