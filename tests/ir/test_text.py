"""The canonical text: complete, deterministic, free of names that tracing happened to choose."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir import Program, Rewriter, capture, diff, text
from planish.ir.tensortype import SparseLayout
from planish.ir.text import digest, excerpt, node_text, value_names
from tests.support.lambdas import Lambda
from tests.support.nets import branch_program, net_program

aten = torch.ops.aten


def printed(function: Any, *args: Any, shapes: Any = None) -> str:
    return text(capture(Lambda(function), args, dynamic_shapes=shapes))


def test_a_whole_program() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    batch = ({0: Dim("batch")},)
    program = capture(Net().eval(), (torch.ones(1, 3, 8, 8),), dynamic_shapes=batch)
    assert str(program) == (
        "program(%x: f32[batch, 3, 8, 8])\n"
        "  const @conv.bias: f32[8]\n"
        "  const @conv.weight: f32[8, 3, 3, 3]\n"
        "  %0: f32[batch, 8, 4, 4] = aten.conv2d(%x, @conv.weight, @conv.bias, stride=[2, 2], "
        "padding=[1, 1])\n"
        "  %1: f32[batch, 8, 4, 4] = aten.relu(%0)\n"
        "  return %1\n"
    )


def test_values_add_a_digest_of_each_constant() -> None:
    lines = text(capture(nn.Linear(2, 1).eval(), (torch.ones(1, 2),)), values=True).splitlines()
    constants = [line for line in lines if line.startswith("  const")]
    assert len(constants) == 2
    assert all(len(line.partition(" = ")[2]) == 12 for line in constants)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda x: x.sum(), "%0: f32[] = aten.sum(%args_0)"),
        (lambda x: x.sum(-1, True), "aten.sum.dim_IntList(%args_0, dim=[-1], keepdim=True)"),
        (lambda x: torch.cat([x, x], 0), "aten.cat([%args_0, %args_0])"),
        (lambda x: torch.cat([x, x], 1), "aten.cat([%args_0, %args_0], dim=1)"),
        (lambda x: torch.add(x, x, alpha=2), "aten.add.Tensor(%args_0, %args_0, alpha=2)"),
        (lambda x: torch.add(x, x, alpha=1), "aten.add.Tensor(%args_0, %args_0)"),
        (lambda x: x.to(torch.float16), "f16[2, 3] = aten.to.dtype(%args_0, dtype=f16)"),
        (lambda x: x.clamp(0, None), "aten.clamp(%args_0, min=0)"),
        (lambda x: x.clamp(None, 1), "aten.clamp(%args_0, max=1)"),
        (lambda x: x * float("inf"), "aten.mul.Tensor(%args_0, other=inf)"),
        (
            lambda x: x.new_zeros(2, dtype=torch.bool),
            "bool[2] = aten.new_zeros(%args_0, size=[2]",
        ),
        (lambda x: x[:, 1:], "aten.slice.Tensor(%args_0, dim=1, start=1, end=9223372036854775807)"),
        (lambda x: x.max(0), "(f32[3], i64[3]) = aten.max.dim(%args_0, dim=0)"),
    ],
)
def test_arguments_are_named_and_defaults_left_out(function: Any, line: str) -> None:
    assert line in printed(function, torch.ones(2, 3))


def test_sizes_carry_the_users_names() -> None:
    shapes = (({0: Dim("batch"), 1: Dim("length")},),)
    shown = printed(lambda x: (torch.cat([x, x], 1), x.shape[1]), torch.ones(2, 3), shapes=shapes)
    assert "program(%args_0: f32[batch, length])" in shown
    assert "f32[batch, 2*length] = aten.cat" in shown
    assert "%0: int = aten.sym_size.int(%args_0, dim=1)" in shown
    assert shown.endswith("return %1, %0\n")


def test_results_may_be_constants_and_inputs() -> None:
    shown = printed(lambda x: (x, None, 3, "word", 2.5, True), torch.ones(2))
    assert shown.endswith("return %args_0, None, 3, 'word', 2.5, True\n")


def test_a_sparse_constant_says_so() -> None:
    program = capture(nn.Linear(4, 2).eval(), (torch.ones(1, 4),))
    program.layouts["weight"] = SparseLayout(2, 4, 1)
    assert "const @weight: f32[2, 4] sparse<2:4, axis=1>\n" in text(program)


def test_bodies_of_branches_are_printed_with_inputs_and_results() -> None:
    shown = text(branch_program())
    assert (
        "  body @false_graph_0(%a: f32[n, 3], %b: f32[3])\n"
        "    %0: f32[n, 3] = aten.mul.Tensor(%a, other=2)\n"
        "    return %0\n"
    ) in shown
    assert "higher_order.cond(%1, @true_graph_0, @false_graph_0, [%x, @one])" in shown


def test_a_change_inside_a_body_shows() -> None:
    def choose(other: Any) -> Any:
        def model(x: Tensor, y: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda a, b: a - b, other, (x, y))

        return model

    args = torch.ones(2), torch.ones(2)
    assert printed(choose(lambda a, b: a.exp() + b), *args) != printed(
        choose(lambda a, b: b.exp() + a), *args
    )


def test_a_nested_body_is_printed_inside() -> None:
    def nested(x: Tensor) -> Any:
        def inner(a: Tensor) -> Any:
            return torch.cond(a.mean() > 1, lambda b: b + 1, lambda b: b + 2, (a,))

        return torch.cond(x.sum() > 0, inner, lambda a: a - 1, (x,))

    assert "\n    body @true_graph_0(%a: f32[2])\n      %0: f32[2] = aten.add" in printed(
        nested, torch.ones(2)
    )


def test_names_of_nodes_do_not_show() -> None:
    _, program = net_program()
    renamed = program.clone()
    for i, node in enumerate(renamed.operators):
        node._rename(f"something_else_{i}")
    assert text(renamed) == text(program)


def test_the_text_is_the_same_every_time() -> None:
    assert text(net_program()[1], values=True) == text(net_program()[1], values=True)
    program = net_program()[1]
    assert text(program.clone(), values=True) == text(program, values=True)


def test_nothing_of_this_machine_shows() -> None:
    for program in (net_program()[1], branch_program()):
        shown = text(program, values=True)
        assert "0x" not in shown
        assert ".py" not in shown
        assert "/" not in shown


def edited() -> tuple[Program, Program]:
    _, program = net_program()
    rewriter = Rewriter(program.clone(), "test")
    relu = next(n for n in rewriter.program.operators if n.target is aten.relu.default)
    with rewriter.site("swap", relu):
        rewriter.replace(relu, rewriter.call(aten.gelu.default, (relu.args[0],), like=relu))
    return program, rewriter.finish()


def test_a_diff_shows_what_changed_and_nothing_else() -> None:
    before, after = edited()
    lines = diff(before, after).splitlines()
    assert [line for line in lines if line[:1] in "+-" and line[1:2] == " "] == [
        "-  %5: f32[batch, 4] = aten.relu(%4)",
        "+  %5: f32[batch, 4] = aten.gelu(%4)",
    ]
    assert diff(before, before.clone()) == ""


def test_an_excerpt_points_at_the_node() -> None:
    _, program = edited()
    gelu = next(n for n in program.operators if n.target is aten.gelu.default)
    shown = excerpt(program, gelu, around=1).splitlines()
    assert len(shown) == 3
    assert shown[1] == "--> " + node_text(program, gelu, value_names(program))
    assert shown[0].startswith("    %")
    assert "input" in excerpt(program, program.placeholders[0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.zeros(0, 2),
        torch.tensor([True, False]),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(3, 2).t(),
    ],
)
def test_digests_depend_on_the_values_in_row_major_order(tensor: Tensor) -> None:
    assert digest(tensor) == digest(tensor.clone().contiguous())
    if tensor.numel() > 1:
        other = tensor.clone(memory_format=torch.contiguous_format).resolve_conj()
        other.view(-1)[0] = 0
        assert digest(other) != digest(tensor)
