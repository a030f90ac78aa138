"""Whether a program changed: by its text and its constants, whatever anybody claims."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir import Program, capture, text
from planish.ir.rewriter import Change
from planish.ir.tensortype import SparseLayout
from planish.passes.changed import Untouched, differs, outline, unrecorded

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(x)) * 1.0
        return torch.cat([a, b], 1) + 0.0, a.sum(1, keepdim=True)


@pytest.fixture(scope="module")
def program() -> Program:
    batch = torch.export.Dim("batch")
    return capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: batch}})


def node(program: Program, target: Any, index: int = 0) -> torch.fx.Node:
    return [n for n in program.operators if n.target is target][index]


def nothing(p: Program) -> None:
    """Leave it."""


def rename(p: Program) -> None:
    for n in p.operators:
        n.name = n.name + "_x"


def write_default(p: Program) -> None:
    add = node(p, aten.add.Tensor)
    assert not add.kwargs
    add.kwargs = {"alpha": 1}


def move_constants(p: Program) -> None:
    first = next(iter(p.operators))
    for n in reversed(p.graph.find_nodes(op="get_attr")):
        first.prepend(n)


def other_scalar(p: Program) -> None:
    mul = node(p, aten.mul.Tensor)
    mul.args = (mul.args[0], 2.0)


def int_scalar(p: Program) -> None:
    mul = node(p, aten.mul.Tensor)
    mul.args = (mul.args[0], 1)


def negative_zero(p: Program) -> None:
    add = node(p, aten.add.Tensor)
    add.args = (add.args[0], -0.0)


def swap_operands(p: Program) -> None:
    cat = node(p, aten.cat.default)
    values, *rest = cat.args
    assert isinstance(values, list | tuple)
    cat.args = (list(reversed(values)), *rest)


def swap_order(p: Program) -> None:
    node(p, aten.linear.default, 0).prepend(node(p, aten.linear.default, 1))


def other_operator(p: Program) -> None:
    node(p, aten.relu.default).target = aten.sigmoid.default


def other_constant(p: Program) -> None:
    get = p.graph.find_nodes(op="get_attr")[0]
    user = next(iter(get.users))
    user.args = (user.args[0], *p.graph.find_nodes(op="get_attr")[2:4])


def swap_results(p: Program) -> None:
    p.output.args = (tuple(reversed(p.results)),)


def other_type(p: Program) -> None:
    n = node(p, aten.relu.default)
    n.meta["val"] = n.meta["val"].to(torch.float64)


def drop_one(p: Program) -> None:
    add = node(p, aten.add.Tensor)
    source = add.args[0]
    assert isinstance(source, torch.fx.Node)
    add.replace_all_uses_with(source)
    p.graph.erase_node(add)


EDITS = [
    nothing,
    rename,
    write_default,
    move_constants,
    other_scalar,
    int_scalar,
    negative_zero,
    swap_operands,
    swap_order,
    other_operator,
    other_constant,
    swap_results,
    other_type,
    drop_one,
]
SAME = {nothing, rename, write_default, move_constants}


@pytest.mark.parametrize("edit", EDITS)
def test_two_programs_differ_exactly_if_their_texts_do(program: Program, edit: Any) -> None:
    after = program.clone()
    edit(after)
    assert differs(program, after) is (edit not in SAME)
    assert (text(program) != text(after)) is (edit not in SAME)


@given(edits=st.lists(st.sampled_from(EDITS[:-1]), max_size=4, unique=True))
def test_text_decides_whatever_was_edited(program: Program, edits: list[Any]) -> None:
    after = program.clone()
    for edit in edits:
        edit(after)
    assert differs(program, after) == (text(program) != text(after))


@pytest.mark.parametrize("edit", EDITS)
def test_a_program_is_untouched_as_long_as_nobody_edits_it(program: Program, edit: Any) -> None:
    private = program.clone()
    handed = Untouched(private)
    assert handed.holds(private)
    assert not handed.holds(program)
    assert not handed.holds(private.clone())
    edit(private)
    assert not differs(program, private) or not handed.holds(private)


def test_another_constant_or_layout_touches_a_program(program: Program) -> None:
    changes: list[Callable[[Program], Any]] = [
        lambda p: p.constants.update({"first.bias": torch.zeros(4)}),
        lambda p: p.constants.pop("first.bias"),
        lambda p: p.layouts.update({"first.weight": SparseLayout(2, 4, 1)}),
    ]
    for change in changes:
        private = program.clone()
        handed = Untouched(private)
        change(private)
        assert not handed.holds(private)


def test_an_equal_tensor_that_is_another_object_is_a_change(program: Program) -> None:
    after = program.clone()
    name = "first.weight"
    after.constants[name] = program.constants[name].clone()  # type: ignore[operator]
    assert text(after, values=True) == text(program, values=True)
    assert differs(program, after)


def test_a_constant_that_nothing_reads_is_no_change(program: Program) -> None:
    after = program.clone()
    after.constants["unread"] = torch.zeros(1)
    assert not differs(program, after)


def test_unrecorded_names_what_came_and_went_untold(program: Program) -> None:
    after = program.clone()
    drop_one(after)
    (gone,) = {n.name for n in program.operators} - {n.name for n in after.operators}
    assert unrecorded(program, after, ()) == (gone,)
    assert unrecorded(program, after, [Change(1, "rule", "node", removed=(gone,))]) == ()


def test_an_outline_keeps_types_and_no_values(program: Program) -> None:
    kept = outline(program)
    assert text(kept) == text(program)
    assert all(isinstance(c, Tensor) and c.is_meta for c in kept.constants.values())
