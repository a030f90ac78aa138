"""The canonical text where it could be ambiguous: gaps, keywords, odd values, many names."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from planish.ir import Program, capture, text
from planish.ir.text import excerpt, value_names
from tests.support.lambdas import Lambda

aten = torch.ops.aten


def program_of(function: Any, *args: Any, shapes: Any = None) -> Program:
    return capture(Lambda(function), args, dynamic_shapes=shapes)


def last_line(function: Any, *args: Any) -> str:
    *_, line, _ = text(program_of(function, *args)).splitlines()
    return line.partition(" = ")[2]


X, INDEX = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "args", "line"),
    [
        # A value after one that is left out is named, as is one that can only be named.
        (
            lambda x, y: x.clamp(max=y),
            (X, X),
            "aten.clamp.Tensor(%args_0, max=%args_1)",
        ),
        (
            lambda x, y: x.clamp(y, y),
            (X, X),
            "aten.clamp.Tensor(%args_0, %args_1, %args_1)",
        ),
        (
            lambda x, w: torch.nn.functional.linear(x, w, None),
            (X, X),
            "aten.linear(%args_0, %args_1)",
        ),
        # Lists of values stay in place, also with gaps; lists of numbers are named.
        (lambda x, i: x[:, i], (X, INDEX), "aten.index.Tensor(%args_0, [None, %args_1])"),
        (lambda x: x.permute(1, 0), (X,), "aten.permute(%args_0, dims=[1, 0])"),
        (lambda x: x.sum(()), (X,), "aten.sum.dim_IntList(%args_0, dim=[])"),
        # A default is left out only if type and value are its own.
        (lambda x: x.flatten(0, -1), (X,), "aten.flatten.using_ints(%args_0)"),
        (lambda x: x.flatten(0, 1), (X,), "aten.flatten.using_ints(%args_0, end_dim=1)"),
        (lambda x: x.std(0, correction=1.0), (X,), "aten.std.correction(%args_0, dim=[0], "),
        (
            lambda x: torch.nn.functional.avg_pool2d(x[None], 1, 1, 0),
            (X[None],),
            "aten.avg_pool2d(%0, kernel_size=[1, 1], stride=[1, 1])",
        ),
        # Values that Python prints in its own ways.
        (
            lambda x: torch.clone(x, memory_format=torch.channels_last),
            (X[None, None],),
            "aten.clone(%args_0, memory_format=channels_last)",
        ),
        (
            lambda x: x.new_zeros(2, device="cpu", dtype=torch.int8),
            (X,),
            "aten.new_zeros(%args_0, size=[2], dtype=i8, device=cpu, pin_memory=False)",
        ),
        (
            lambda x: torch.nn.functional.pad(x, (1, 1), mode="reflect"),
            (X,),
            "aten.pad(%args_0, pad=[1, 1], mode='reflect')",
        ),
    ],
)
def test_one_call_has_one_text(function: Any, args: Any, line: str) -> None:
    assert last_line(function, *args).startswith(line)


def test_sizes_inside_arguments_are_values() -> None:
    shapes = (({0: Dim("n")},),)
    shown = text(program_of(lambda x: torch.add(x, x, alpha=x.shape[0]), X, shapes=shapes))
    assert "aten.add.Tensor(%args_0, %args_0, alpha=%0)" in shown


def test_a_list_that_is_the_default_is_left_out() -> None:
    program = program_of(lambda x: torch.nn.functional.avg_pool2d(x, 2), X[None])
    (pool,) = program.operators
    shown = text(program)
    pool.args = (pool.args[0], [2, 2], [], [0, 0])
    assert text(program) == shown
    pool.args = (pool.args[0], [2, 2], [], [0, 1])
    assert "aten.avg_pool2d(%args_0, kernel_size=[2, 2], padding=[0, 1])" in text(program)


# -- names ----------------------------------------------------------------------------------------


def test_the_inputs_of_a_body_never_share_a_name() -> None:
    def model(*args: Tensor) -> Any:
        chosen = torch.cond(args[0].sum() > 0, lambda *a: sum(a), lambda *a: a[-1] - a[0], args)
        return chosen

    shown = text(program_of(model, *[torch.ones(1) for _ in range(30)]))
    head = next(line for line in shown.splitlines() if "body @true_graph_0(" in line)
    names = [part.partition(":")[0] for part in head.partition("(")[2].split(", ")]
    assert len(set(names)) == 30
    assert (names[0], names[25], names[26]) == ("%a", "%z", "%a1")


def test_the_values_of_a_body_are_numbered_in_order() -> None:
    def model(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda a: a.exp().sin().cos(), lambda a: a - 1, (x,))

    lines = text(program_of(model, torch.ones(2))).splitlines()
    start = next(i for i, line in enumerate(lines) if "body @true_graph_0(" in line)
    assert [line.strip() for line in lines[start + 1 : start + 5]] == [
        "%0: f32[2] = aten.exp(%a)",
        "%1: f32[2] = aten.sin(%0)",
        "%2: f32[2] = aten.cos(%1)",
        "return %2",
    ]


# -- parts ----------------------------------------------------------------------------------------


def chain(length: int) -> Program:
    def model(x: Tensor) -> Tensor:
        for _ in range(length):
            x = x.exp()
        return x

    return program_of(model, torch.ones(1))


@pytest.mark.parametrize(
    ("position", "first", "last"), [(0, 0, 5), (3, 0, 8), (10, 5, 15), (19, 14, 19)]
)
def test_an_excerpt_shows_five_lines_on_both_sides(position: int, first: int, last: int) -> None:
    program = chain(20)
    node = program.operators[position]
    names = value_names(program)
    shown = excerpt(program, node).splitlines()
    assert [line.split(":")[0] for line in shown] == [
        ("--> " if n is node else "    ") + names[n] for n in program.operators[first : last + 1]
    ]


def test_a_node_that_is_no_operator_is_shown_alone() -> None:
    program = chain(2)
    for node in (program.placeholders[0], program.output):
        shown = excerpt(program, node)
        assert node.name in shown or "return" in shown
        assert "\n" not in shown
