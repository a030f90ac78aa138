"""Proofs that a pass changed nothing: operands of every kind, values of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from planish.ir import Change, Program, Rewriter, capture
from planish.passes.unchanged import Proof

aten = torch.ops.aten
Hand = Callable[[Program], None]


class Net(nn.Module):
    """At the beginning operators of all kinds, then a long rest."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.add(x.sum(0), y.sum(0), alpha=2)
        most, where = torch.relu(x).max(1, keepdim=True)
        rows = x.reshape(y.shape[0], -1, 2).sum(1).sum()
        return self.rest(both * most + where + rows)


@pytest.fixture(scope="module")
def before() -> Program:
    torch.manual_seed(0)
    rows, others = Dim("rows", max=64), Dim("others", max=64)
    shapes = {"x": {0: 2 * rows}, "y": {0: others}}
    example = (torch.randn(6, 4), torch.randn(2, 4))
    return capture(Net().eval(), example, dynamic_shapes=shapes)


def of(program: Program, target: object) -> Node:
    return next(n for n in program.operators if n.target is target)


def by_hand(before: Program, hand: Hand, *edited: str) -> Proof:
    """A clone that was edited past the rewriter; the nodes named are said to be as good."""
    after = before.clone()
    hand(after)
    pairs = tuple((name, name) for name in edited)
    changes = [Change(1, "hand", name, (), (), None, replaced=pairs) for name in edited[:1]]
    return Proof(before, after, changes)


def other_operator(p: Program) -> None:
    of(p, aten.relu.default).target = aten.sigmoid.default


def other_number(p: Program) -> None:
    of(p, aten.add.Tensor).kwargs = {"alpha": 3}


def no_number(p: Program) -> None:
    of(p, aten.add.Tensor).kwargs = {}


def other_keyword(p: Program) -> None:
    node = of(p, aten.add.Tensor)
    node.args, node.kwargs = node.args[:1], {"other": node.args[1]}


def swapped_operands(p: Program) -> None:
    node = of(p, aten.add.Tensor)
    node.args = node.args[::-1]


def shorter_list(p: Program) -> None:
    node = of(p, aten.reshape.default)
    shape = node.args[1]
    assert isinstance(shape, (list, tuple))
    node.args = (node.args[0], list(shape[1:]))


def number_for_a_list(p: Program) -> None:
    node = of(p, aten.reshape.default)
    node.args = (node.args[0], 4)


def other_kind_of_number(p: Program) -> None:
    of(p, aten.add.Tensor).kwargs = {"alpha": 2.0}


@pytest.mark.parametrize(
    "hand",
    [
        other_operator,
        other_number,
        no_number,
        other_keyword,
        swapped_operands,
        shorter_list,
        number_for_a_list,
        other_kind_of_number,
    ],
)
def test_an_operand_or_operator_that_nobody_recorded_is_seen(before: Program, hand: Hand) -> None:
    assert by_hand(before, lambda p: None).possible
    assert not by_hand(before, hand).possible


def test_nothing_to_show_is_shown(before: Program) -> None:
    proof = by_hand(before, lambda p: None)
    assert proof.claims == []
    assert proof.holds(before.samples[0])


def test_a_recorded_edit_of_keywords_is_computed_with_them(before: Program) -> None:
    name = of(before, aten.add.Tensor).name
    same = by_hand(before, other_kind_of_number, name)
    assert same.possible
    assert same.holds(before.samples[0])
    other = by_hand(before, other_number, name)
    assert other.possible
    assert not other.holds(before.samples[0])
    assert other.holds((torch.ones(6, 4), torch.zeros(2, 4)))


def test_every_part_of_a_value_of_several_parts_counts(before: Program) -> None:
    peak = of(before, aten.max.dim)

    def copied(p: Program) -> None:
        node = of(p, aten.max.dim)
        node.args = (node.args[0], -1, True)

    def lowest(p: Program) -> None:
        of(p, aten.max.dim).target = aten.min.dim

    def alone(p: Program) -> None:
        node = of(p, aten.max.dim)
        node.target, node.args = aten.amax.default, (node.args[0], [1], True)

    assert by_hand(before, copied, peak.name).holds(before.samples[0])
    assert not by_hand(before, lowest, peak.name).holds(before.samples[0])
    assert not by_hand(before, alone, peak.name).holds(before.samples[0])
    ties = (torch.zeros(6, 4), torch.zeros(2, 4))
    assert by_hand(before, lowest, peak.name).holds(ties)


def test_a_part_that_differs_behind_one_that_is_equal_counts(before: Program) -> None:
    peak = of(before, aten.max.dim)

    def last(p: Program) -> None:
        node = of(p, aten.max.dim)
        with p.graph.inserting_before(node):
            turned = p.graph.call_function(aten.flip.default, (node.args[0], [1]))
        node.args = (turned, *node.args[1:])

    zeros = (torch.zeros(6, 4), torch.zeros(2, 4))
    assert by_hand(before, last, peak.name).holds(zeros)
    rising = (torch.arange(4.0).expand(6, 4).contiguous(), torch.zeros(2, 4))
    assert not by_hand(before, last, peak.name).holds(rising)


def test_sizes_are_values_too(before: Program) -> None:
    size = of(before, aten.sym_size.int)

    def of_the_other(p: Program) -> None:
        node = of(p, aten.sym_size.int)
        node.args = (p.placeholders[0], 0)

    def as_a_number(p: Program) -> None:
        node = of(p, aten.sym_size.int)
        node.target, node.args = torch.sym_float, (2,)

    proof = by_hand(before, of_the_other, size.name)
    assert proof.possible
    assert proof.holds((torch.ones(4, 4), torch.ones(4, 4)))
    assert not proof.holds((torch.ones(4, 4), torch.ones(2, 4)))
    assert not by_hand(before, as_a_number, size.name).holds(before.samples[0])


def test_several_new_operators_may_take_the_place_of_one(before: Program) -> None:
    after = before.clone()
    rewriter = Rewriter(after, "test")
    relu = of(after, aten.relu.default)
    with rewriter.site("edit", relu):
        turned = rewriter.call(aten.neg.default, relu.args, like=relu)
        low = rewriter.call(aten.clamp_max.default, (turned, 0), like=relu)
        back = rewriter.call(aten.neg.default, (low,), like=relu)
        rewriter.replace(relu, rewriter.call(aten.abs.default, (back,), like=relu))
    proof = Proof(before, rewriter.finish(), tuple(rewriter.changes))
    assert proof.possible
    assert proof.holds(before.samples[0])


def test_an_input_in_the_place_of_what_was_made_of_it() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.relu(x) + x)

    program = capture(Early().eval(), (torch.rand(3, 4),))
    after = program.clone()
    rewriter = Rewriter(after, "test")
    relu = of(after, aten.relu.default)
    with rewriter.site("edit", relu):
        rewriter.replace(relu, relu.args[0])
    proof = Proof(program, rewriter.finish(), tuple(rewriter.changes))
    assert proof.possible
    assert proof.holds((torch.rand(3, 4),))
    assert not proof.holds((-torch.rand(3, 4),))


def test_what_acts_by_itself_is_run() -> None:
    """An operator that nobody reads may still fail."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))).eval()
    program = capture(layers, (torch.ones(3, 4),))
    after = program.clone()
    x = after.placeholders[0]
    with after.graph.inserting_after(x):
        after.graph.call_function(aten.reshape.default, (x, [12]))
    assert not Proof(program, after, ()).possible


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float16, torch.float64])
def test_the_signs_of_zeros_count_in_every_type(dtype: torch.dtype) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest((x * 1).abs().float())

    example = torch.ones(3, 4, dtype=dtype)
    program = capture(Early().eval(), (example,))
    after = program.clone()
    rewriter = Rewriter(after, "test")
    mul = of(after, aten.mul.Tensor)
    with rewriter.site("edit", mul):
        rewriter.replace(mul, rewriter.call(aten.add.Tensor, (mul.args[0], 0), like=mul))
    proof = Proof(program, rewriter.finish(), tuple(rewriter.changes))
    assert proof.possible
    assert proof.holds((example,))
    assert proof.holds((0 * example,))
    assert not proof.holds((torch.full_like(example, -0.0),))
