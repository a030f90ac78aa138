"""The aligned diff: unchanged operators are unchanged lines, whatever came or went before them."""

import re
import textwrap
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from planish.ir import Program, Rewriter, capture, text
from planish.ir.align import align
from planish.ir.files import load, save
from planish.ir.textdiff import TextDiff, compare, diff

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(torch.tanh(torch.relu(self.first(x))))) + x


class Layers(nn.Module):
    """Every layer computes with the same source lines; ``skip`` leaves one out."""

    def __init__(self, count: int, skip: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(count))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number != self.skip:
                x = torch.relu(layer(x)) * 1.5 + x
        return x


def captured(module: nn.Module) -> Program:
    return capture(module.eval(), (torch.ones(2, 4),))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return captured(Net())


def edited(program: Program, target: object, edit: Callable[[Rewriter, Node], None]) -> Program:
    """A copy in which one operator was rewritten."""
    rewriter = Rewriter(program.clone(), "test")
    (node,) = [n for n in rewriter.program.operators if n.target is target]
    with rewriter.site("edit", node):
        edit(rewriter, node)
    return rewriter.finish()


def assert_diff(found: str, expected: str) -> None:
    assert found == textwrap.dedent(expected).lstrip("\n")


def rebuilt(found: TextDiff) -> tuple[list[str], list[str]]:
    old = [e.before for e in found.entries if e.before is not None]
    return old, [e.after for e in found.entries if e.after is not None]


def test_an_operator_that_went_changes_its_line_and_its_readers_only(program: Program) -> None:
    after = edited(program, aten.relu.default, lambda r, n: r.replace(n, n.args[0]))
    assert_diff(
        diff(program, after, context=1),
        """
        --- A
        +++ B
        @@ -4,4 +4,3 @@
           %0: f32[2, 4] = aten.linear(%x, @first.weight)
        -  %1: f32[2, 4] = aten.relu(%0)
        -  %2: f32[2, 4] = aten.tanh(%1)
        +  %2: f32[2, 4] = aten.tanh(%0)
           %3: f32[2, 4] = aten.linear(%2, @second.weight)
        """,
    )


def test_what_took_the_place_of_a_value_takes_its_number(program: Program) -> None:
    def swap(r: Rewriter, n: Node) -> None:
        r.replace(n, r.call(aten.clamp_min.default, (n.args[0], 0), like=n))

    found = compare(program, edited(program, aten.relu.default, swap))
    changed = [e for e in found.entries if e.status != "same"]
    assert [(e.status, e.before, e.after) for e in changed] == [
        (
            "changed",
            "  %1: f32[2, 4] = aten.relu(%0)",
            "  %1: f32[2, 4] = aten.clamp_min(%0, min=0)",
        )
    ]
    assert changed[0].nodes == ("relu", "clamp_min_default")


def test_what_is_new_is_numbered_from_where_the_first_program_ends(program: Program) -> None:
    def wrap(r: Rewriter, n: Node) -> None:
        twice = r.call(aten.mul.Tensor, (n.args[0], 2), like=n)
        r.set_args(n, (r.call(aten.div.Tensor, (twice, 2), like=n),))

    assert_diff(
        diff(program, edited(program, aten.relu.default, wrap), context=0),
        """
        --- A
        +++ B
        @@ -5,1 +5,3 @@
        +  %6: f32[2, 4] = aten.mul.Tensor(%0, other=2)
        +  %7: f32[2, 4] = aten.div.Tensor(%6, other=2)
        -  %1: f32[2, 4] = aten.relu(%0)
        +  %1: f32[2, 4] = aten.relu(%7)
        """,
    )


def test_a_constant_of_other_values_is_a_change(program: Program) -> None:
    after = program.clone()
    weight = after.constants["first.weight"]
    assert isinstance(weight, Tensor)
    after.constants["first.weight"] = weight * 2
    assert text(after) == text(program)
    found = compare(program, after)
    assert not found.equal
    removed, added = found.unified(context=0)[3:]
    assert removed.startswith("-  const @first.weight: f32[4, 4] = ")
    assert added.startswith("+  const @first.weight: f32[4, 4] = ")
    assert removed[1:] != added[1:]
    copied = program.clone()
    copied.constants = {k: v.clone() for k, v in copied.constants.items()}  # type: ignore[operator]
    assert compare(program, copied).equal


def test_not_a_number_equals_itself_and_zeros_differ_by_sign(program: Program) -> None:
    def holding(value: float) -> Program:
        other = program.clone()
        other.constants["first.weight"] = torch.full((4, 4), value)
        return other

    assert compare(holding(float("nan")), holding(float("nan"))).equal
    assert not compare(holding(0.0), holding(-0.0)).equal


def test_operators_in_another_order_have_moved() -> None:
    class Two(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.turned = turned

        def forward(self, x: Tensor) -> Tensor:
            if self.turned:
                b = torch.tanh(x)
                return torch.relu(x) - b
            a = torch.relu(x)
            return a - torch.tanh(x)

    found = compare(captured(Two(False)), captured(Two(True)))
    rows = [(e.status, e.before, e.after, e.moved) for e in found.entries if e.status != "same"]
    assert rows == [
        ("added", None, "  %1: f32[2, 4] = aten.tanh(%x)", True),
        ("removed", "  %1: f32[2, 4] = aten.tanh(%x)", None, True),
    ]


def test_a_layer_less_in_another_capture_moves_no_other_layer() -> None:
    """The names of all later operators are other ones there: relu_2 is relu_1."""
    found = compare(captured(Layers(6)), captured(Layers(6, skip=2)))
    lines = [line for line in found.unified(context=0) if line[0] in "-+"][2:]
    gone = [f"-  %{n}: " for n in (8, 9, 10, 11)]
    assert [line[: len(g)] for line, g in zip(lines[1:5], gone, strict=True)] == gone
    assert lines[0].startswith("-  const @layers.2.weight")
    assert lines[5:] == [
        "-  %12: f32[2, 4] = aten.linear(%11, @layers.3.weight)",
        "+  %12: f32[2, 4] = aten.linear(%7, @layers.3.weight)",
        "-  %15: f32[2, 4] = aten.add.Tensor(%14, %11)",
        "+  %15: f32[2, 4] = aten.add.Tensor(%14, %7)",
    ]


def test_other_inputs_outputs_and_types_are_told() -> None:
    class Named(nn.Module):
        def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(y), y

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    assert_diff(
        diff(captured(Plain()), capture(Named().eval(), (torch.ones(3),))),
        """
        --- A
        +++ B
        @@ -1,3 +1,3 @@
        -program(%x: f32[2, 4])
        +program(%y: f32[3])
        -  %0: f32[2, 4] = aten.relu(%x)
        +  %0: f32[3] = aten.relu(%y)
        -  return %0
        +  return %0, %y
        """,
    )


def test_the_bodies_of_branches_are_compared_line_by_line() -> None:
    class Branch(nn.Module):
        def __init__(self, addend: float) -> None:
            super().__init__()
            self.addend = addend

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + self.addend, lambda y: y - 1.0, [x])

    one, two = captured(Branch(1.0)), captured(Branch(2.0))
    changed = [e for e in compare(one, two).entries if e.status != "same"]
    assert [(e.before, e.after) for e in changed] == [
        (
            "    %0: f32[2, 4] = aten.add.Tensor(%a, other=1.0)",
            "    %0: f32[2, 4] = aten.add.Tensor(%a, other=2.0)",
        )
    ]
    assert compare(one, captured(Branch(1.0))).equal


def test_a_saved_program_equals_itself(program: Program, tmp_path: object) -> None:
    path = f"{tmp_path}/program.pt2"
    save(program, path)
    found = compare(program, load(path))
    assert found.equal
    assert found.unified() == []
    assert diff(program, load(path)) == ""
    assert found.counts() == {"same": 10, "changed": 0, "added": 0, "removed": 0}


def test_hunks_merge_where_their_context_meets(program: Program) -> None:
    after = edited(program, aten.relu.default, lambda r, n: r.replace(n, n.args[0]))
    after = edited(after, aten.sigmoid.default, lambda r, n: r.replace(n, n.args[0]))
    found = compare(program, after)
    assert [head for head, _ in found.hunks(0)] == ["@@ -5,2 +5,1 @@", "@@ -8,2 +7,1 @@"]
    assert [head for head, _ in found.hunks(1)] == ["@@ -4,7 +4,5 @@"]
    ((head, entries),) = found.hunks(None)
    assert head == "@@ -1,10 +1,8 @@"
    assert entries == found.entries


def test_in_brief_operators_come_before_constants(program: Program) -> None:
    after = program.clone()
    rewriter = Rewriter(after, "test")
    relu = next(n for n in after.operators if n.target is aten.relu.default)
    with rewriter.site("edit", relu):
        rewriter.replace(relu, rewriter.call(aten.gelu.default, (relu.args[0],), like=relu))
    first = next(n for n in after.graph.find_nodes(op="get_attr"))
    with rewriter.site("edit", first):
        zeros = rewriter.constant(torch.zeros(first.meta["val"].shape), str(first.target))
        rewriter.replace(first, zeros)
    found = compare(program, rewriter.finish())
    lines = found.brief(100, context=0)
    assert sorted(lines) == sorted(found.unified(context=0)[2:])
    changed = [line.split()[1] for line in lines if not line.startswith("@@")]
    assert changed == ["%1:", "%1:", "const", "const"]
    assert found.brief(2, context=0) == [*lines[:2], "... 4 more lines"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from("drx")), max_size=6))
def test_any_edit_is_told_completely(edits: list[tuple[int, str]]) -> None:
    """The old lines are the first text; the new ones are the second's but for numbers; equal
    texts and no others give no diff; a value has one number."""
    before = _LAYERS
    after = before
    for place, kind in edits:
        node = after.operators[place % len(after.operators)]
        rewriter = Rewriter(after.clone(), "test")
        (own,) = [n for n in rewriter.program.operators if n.name == node.name]
        with rewriter.site("edit", own):
            if kind == "d" and own.target is not aten.linear.default:
                rewriter.replace(own, own.args[0])
            elif kind == "r":
                again = rewriter.call(own.target, own.args, like=own)
                rewriter.replace(own, again)
            elif kind == "x":
                rewriter.insert_before(own.next)
                rewriter.replace(own, rewriter.call(aten.tanh.default, (own,), like=own))
        after = rewriter.finish()
    found = compare(before, after)
    old, new = rebuilt(found)
    assert "\n".join(old) + "\n" == text(before)
    assert len(new) == len(text(after).splitlines())
    assert [_blank(line) for line in new] == [_blank(line) for line in text(after).splitlines()]
    assert found.equal == (text(before) == text(after))
    pairs = align(before, after)
    assert len(set(pairs.values())) == len(pairs)
    assert found == compare(before, after)
    defined = [line.split(":")[0] for line in new if " = aten" in line]
    assert len(set(defined)) == len(defined)


def _blank(line: str) -> str:
    return re.sub(r"%\d+", "%", line)


_LAYERS = captured(Layers(4))
