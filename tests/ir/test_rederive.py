"""Types are derived again where something changed, and compared for all sizes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim
from torch.fx import Node

from planish.ir import rederive
from planish.ir.capture import capture
from planish.ir.infer import infer
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.rederive import call_key, changed_operators, same_size, same_type
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import type_text
from planish.ir.verify import faults, verify
from tests.support.broken import net, new_call, node, retyped, traced

aten = torch.ops.aten

# -- only what changed ----------------------------------------------------------------------------


def test_an_untouched_program_derives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rederive, "infer_node", None)
    verify(traced().clone(), since=traced())


def test_only_changed_operators_are_derived_again() -> None:
    before, after = net(), net()
    rewriter = Rewriter(after, "test")
    relu = node(after, aten.relu.default)
    with rewriter.site("again", relu):
        new = rewriter.call(aten.silu.default, (relu.args[0],), like=relu)
        rewriter.replace(relu, new)
    rewriter.finish()
    verify(after, since=before)
    two = [n for n in after.operators if is_op(n, aten.linear.default)][1]
    assert changed_operators(after, before) == [new, two]  # two reads a value of another name
    assert changed_operators(before, None) == before.operators


def test_users_of_a_retyped_value_are_derived_again() -> None:
    before, after = net(), net()
    retyped(aten.relu.default, lambda v: v.double())(after)
    found = [fault.node for _, fault in faults(after, since=before)]
    names = [n.name for n in found if n is not None]
    assert names == [node(after, aten.relu.default).name, "linear_1"]


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.relu6.default, None),
        (aten.relu.default, "other operand"),
    ],
)
def test_changes_that_keep_the_name_are_seen(target: Any, args: str | None) -> None:
    before, after = net(), net()
    relu = node(after, aten.relu.default)
    relu.target = target
    if args is not None:
        relu.args = (new_call(after, relu, aten.neg.default, relu.args[0]),)
    assert relu in changed_operators(after, before)


Arguments = Callable[[Node], tuple[Any, ...]]

# Two lists of arguments, and whether the second is a change. Each number is an object of its own.
ARGUMENTS: list[tuple[Arguments, Arguments, bool]] = [
    (lambda x: (x, float("1.5")), lambda x: (x, float("1.5")), False),
    (lambda x: (x, float("1.5")), lambda x: (x, float("2.5")), True),
    (lambda x: (x, 1), lambda x: (x, 1.0), True),
    (lambda x: (x, 1), lambda x: (x, True), True),
    (lambda x: (x, x), lambda x: (x, 1), True),
    (lambda x: (x, 1), lambda x: (x, x), True),
    (lambda x: (x,), lambda x: (x, 1), True),
    (lambda x: (x, 1), lambda x: (x,), True),
    (lambda x: (x, [x, 1]), lambda x: (x, [x, 1]), False),
    (lambda x: (x, [x, 1]), lambda x: (x, [x, 2]), True),
    (lambda x: (x, [x, 1]), lambda x: (x, [x]), True),
    (lambda x: (x, [1]), lambda x: (x, 1), True),
    (lambda x: (x, 1), lambda x: (x, [1]), True),
    (lambda x: (x, {"a": 1}), lambda x: (x, {"a": 1}), False),
    (lambda x: (x, {"a": 1}), lambda x: (x, {"a": 2}), True),
    (lambda x: (x, {"a": 1}), lambda x: (x, {"b": 1}), True),
    (lambda x: (x, {"a": 1}), lambda x: (x, {"a": 1, "b": 1}), True),
    (lambda x: (x, {"a": 1}), lambda x: (x, 1), True),
    (lambda x: (x, 1), lambda x: (x, {"a": 1}), True),
]


@pytest.mark.parametrize(("was", "became", "changed"), ARGUMENTS)
def test_other_arguments_are_a_change_and_equal_ones_are_none(
    was: Arguments, became: Arguments, changed: bool
) -> None:
    for keyword in (False, True):
        programs = net(), net()
        for program, arguments in zip(programs, (was, became), strict=True):
            relu = node(program, aten.relu.default)
            first, *rest = arguments(relu.args[0])  # type: ignore[arg-type]
            relu.args = (first,) if keyword else (first, *rest)
            relu.kwargs = dict(zip("ab", rest, strict=False)) if keyword else {}
        before, after = programs
        expected = [node(after, aten.relu.default)] if changed else []
        assert changed_operators(after, before) == expected


def test_an_equal_type_made_anew_is_no_change() -> None:
    before, after = net(), net()
    retyped(aten.relu.default, lambda v: v.new_empty(v.shape))(after)
    relu = node(after, aten.relu.default)
    assert relu.meta["val"] is not node(before, aten.relu.default).meta["val"]
    assert changed_operators(after, before) == []


class Siblings(nn.Module):
    """Neighbors differ in one thing each, and in their types."""

    def forward(self, x: Tensor, count: Tensor) -> list[Tensor]:
        operator = [x.relu(), x.isnan()]
        number = [x.sum(0), x.sum(1)]
        shape = [x.neg(), x.t().neg()]
        dtype = [x.abs(), x.double().abs()]
        kind_of_number = [count * 1, count * 1.0]
        sizes = [torch.arange(x.shape[0]), torch.arange(x.shape[1])]
        keyword = [torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.float64)]
        return operator + number + shape + dtype + kind_of_number + sizes + keyword


def test_calls_that_differ_are_derived_each() -> None:
    args = (torch.randn(3, 5), torch.arange(4))
    shapes = ({0: Dim("a"), 1: Dim("b")}, None)
    program = capture(Siblings().eval(), args, dynamic_shapes=shapes)
    types = [type_text(n.meta["val"], program.signature.symbols) for n in program.results]
    pairs = list(zip(types[::2], types[1::2], strict=True))
    assert all(one != other for one, other in pairs), pairs
    verify(program)


def test_what_one_layout_in_memory_allows_another_may_not() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.view(9), x.t().contiguous().view(9)

    program = capture(Views().eval(), (torch.randn(3, 3),))
    verify(program)
    turned, copied = node(program, aten.t.default), node(program, aten.contiguous.default)
    copied.replace_all_uses_with(turned)
    program.graph.erase_node(copied)
    assert [rule for rule, _ in faults(program)] == ["operator-types"]


def test_deriving_leaves_no_new_sizes_behind() -> None:
    class Picked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_select(x > 0)

    program = capture(Picked().eval(), (torch.randn(4),))
    env = program.fake_mode.shape_env
    assert env is not None
    verify(program)
    assert env.pending_fresh_unbacked_symbols == []


def test_arguments_without_a_hash_have_no_key() -> None:
    key = call_key(aten.relu.default, (1, [2]), {"a": None})
    assert key is not None
    assert hash(key) == hash(call_key(aten.relu.default, (1, [2]), {"a": None}))
    assert call_key(aten.relu.default, ({1, 2},), {}) is None


def test_equal_calls_are_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = (x * 2).relu()
            return x

    program = capture(Deep().eval(), (torch.randn(3),))
    derived: list[Node] = []

    def counted(program: Program, node: Node) -> Any:
        derived.append(node)
        return infer(program, node.target, node.args, node.kwargs)

    monkeypatch.setattr(rederive, "infer_node", counted)
    verify(program)
    assert len(program.operators) == 40
    assert len(derived) == 2


# -- comparing types ------------------------------------------------------------------------------


@cache
def symbols() -> tuple[Any, Any, Any]:
    """Two dynamic sizes and a data-dependent one."""

    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero()

    shapes = ({0: Dim("a"), 1: Dim("b")},)
    program = capture(Three().eval(), (torch.ones(4, 6),), dynamic_shapes=shapes)
    a, b = program.placeholders[0].meta["val"].shape
    return a, b, program.operators[0].meta["val"].shape[0]


def test_sizes_are_compared_for_all_sizes() -> None:
    a, b, _ = symbols()
    assert same_size(3, 3)
    assert not same_size(3, 4)
    assert same_size(a, a)
    assert not same_size(a, b)
    assert not same_size(4, a)  # the sample's size is not the dimension
    assert not same_size(a, 4)
    assert same_size(2 * (a + 1), 2 + a + a)
    assert same_size((a + 1) // 2, (a - 1) // 2 + 1)
    assert not same_size((a + 1) // 2, a // 2)
    # At small sizes a divisor may be zero, where the expression has no value.
    assert same_size(2 * b // (a - 2), (b + b) // (a - 2))
    assert not same_size(b // (a - 2), a // (a - 2))
    assert not same_size(b // (a - 2), b)
    assert not same_size(a * b, a + b)
    three = a - a + 3  # torch still takes it for symbolic
    assert isinstance(three, SymInt)
    assert same_size(three, 3)
    assert not same_size(three, 4)
    assert not same_size(4, three)


def test_data_dependent_sizes_match_what_is_symbolic() -> None:
    a, _, u = symbols()
    assert same_size(u, u)
    assert same_size(a, u)
    assert same_size(u, a)
    assert same_size(7, u)  # known better than derived
    assert not same_size(u, 7)


def test_types_are_compared_by_element_shape_and_kind() -> None:
    x = torch.empty(2, 3)
    assert same_type(x, torch.empty(2, 3))
    assert not same_type(x, torch.empty(3, 2))
    assert not same_type(x, torch.empty(2, 3, 1))
    assert not same_type(x, x.double())
    assert same_type((x, 1), [x, 1])
    assert not same_type((x,), (x, x))
    assert not same_type((x,), (x.double(),))
    assert not same_type(x, (x, x))
    assert not same_type((x, x), x)
    assert not same_type(None, (x,))
    assert not same_type(x, 1)
    assert not same_type(1, x)
    assert not same_type(x, None)
    assert not same_type(None, 1)
    assert not same_type(1, None)
    assert not same_type(1.5, None)
    assert same_type(1.5, 2.5)  # the value of a number is not its type
    assert same_type(None, None)
    assert not same_type(1, True)
    assert not same_type(1, 1.0)
