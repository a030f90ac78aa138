"""What is known of dynamic sizes can be taken back: for a while, or for good."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.ir.symbols import Symbols


class Net(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.transpose(0, 1)).relu()


def traced() -> Program:
    shapes = {"x": {0: torch.export.Dim("batch", max=9)}, "y": {0: torch.export.Dim("rows")}}
    return capture(Net().eval(), (torch.ones(3, 4), torch.ones(5, 4)), dynamic_shapes=shapes)


def header(program: Program) -> str:
    return str(program).splitlines()[0]


FREE = "program(%x: f32[batch, 4], %y: f32[rows, 4])"
FIXED = "program(%x: f32[3, 4], %y: f32[rows, 4])"


def fix(program: Program) -> None:
    assert int(program.placeholders[0].meta["val"].shape[0]) == 3


def test_within_restored_sizes_are_as_they_were() -> None:
    program = traced()
    symbols = Symbols(program)
    with symbols.restored():
        assert header(program) == FREE
    fix(program)
    assert header(program) == FIXED
    with symbols.restored():
        assert header(program) == FREE
        assert header(program.clone()) == FREE
    assert header(program) == FIXED
    with pytest.raises(KeyError), symbols.restored():
        raise KeyError
    assert header(program) == FIXED


def test_restore_is_for_good_and_says_whether_there_was_anything() -> None:
    program = traced()
    symbols = Symbols(program)
    assert not symbols.restore()
    fix(program)
    assert symbols.restore()
    assert header(program) == FREE
    assert not symbols.restore()
    fix(program)  # it can be learned again
    assert header(program) == FIXED


def test_a_bound_that_was_learned_is_forgotten_and_fixes_nothing() -> None:
    program = traced()
    size = program.placeholders[0].meta["val"].shape[0]
    table = program.fake_mode.shape_env
    assert table is not None
    before = dict(table.var_to_range), len(table.guards)
    symbols = Symbols(program)
    assert bool(size > 2)
    assert (dict(table.var_to_range), len(table.guards)) != before
    assert not symbols.restore()
    assert (dict(table.var_to_range), len(table.guards)) == before


def test_equal_sizes_that_were_found_equal_are_told_apart_again() -> None:
    shapes = {"x": {0: torch.export.Dim("batch")}, "y": {0: torch.export.Dim("rows")}}
    args = (torch.ones(3, 4), torch.ones(3, 4))
    program = capture(Net().eval(), args, dynamic_shapes=shapes)
    before = header(program)
    symbols = Symbols(program)
    x, y = (node.meta["val"] for node in program.placeholders)
    assert bool(x.shape[0] == y.shape[0])
    assert header(program) != before
    assert symbols.restore()
    assert header(program) == before


def test_a_program_without_dynamic_sizes_has_nothing_to_restore() -> None:
    program = capture(nn.ReLU().eval(), (torch.ones(2),))
    symbols = Symbols(program)
    assert not symbols.restore()
    with symbols.restored():
        assert header(program) == "program(%input: f32[2])"


def test_symbols_that_came_later_stay() -> None:
    program = traced()
    symbols = Symbols(program)
    with program.fake_mode:
        found = torch.nonzero(program.placeholders[0].meta["val"])
    assert not symbols.restore()
    with symbols.restored(), program.fake_mode:
        assert (found + 1).shape[1] == 2
        assert not bool(found.shape[0] < 0)  # its range is known still
    fix(program)
    assert symbols.restore()
    assert header(program) == FREE
    assert not bool(found.shape[0] < 0)


def test_what_is_known_to_divide_is_forgotten() -> None:
    program = traced()
    size = program.placeholders[1].meta["val"].shape[0]
    table: Any = program.fake_mode.shape_env
    known = set(table.divisible)
    symbols = Symbols(program)
    assert bool(size % 5 == 0)
    assert set(table.divisible) != known
    assert not symbols.restore()
    assert set(table.divisible) == known


def test_a_size_that_was_fixed_before_is_none_that_became_so() -> None:
    program = traced()
    fix(program)
    symbols = Symbols(program)
    assert bool(program.placeholders[1].meta["val"].shape[0] > 2)
    assert not symbols.restore()
    assert header(program) == FIXED
