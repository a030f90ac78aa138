"""eliminate-dead-code: what nobody reads is removed."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.cleanup.eliminate_dead_code import EliminateDeadCode, is_removable
from tests.passes.cleanup.graphs import Of, captured
from tests.support.check import check, refuses, run_checked

aten = torch.ops.aten
PASS = EliminateDeadCode()
X = torch.randn(2, 3)


def orphaned(module: nn.Module, *names: str) -> Program:
    """The program with these nodes no longer read: the first input is read in their place."""
    program = captured(module, X)
    for node in program.operators:
        if node.name in names:
            node.replace_all_uses_with(program.placeholders[0], propagate_meta=False)
    return program


# -- Fires ------------------------------------------------------------------------------------


def test_a_chain_goes_with_the_constant_it_read() -> None:
    program = orphaned(Of(lambda x, w: torch.relu((x * w).exp()) + x, w=torch.ones(3)), "relu")
    result = check(
        program,
        (),
        PASS,
        """
        program(%x: f32[2, 3])
          %0: f32[2, 3] = aten.add.Tensor(%x, %x)
          return %0
        """,
        changes=1,
    )
    assert result.changes[0].removed[:3] == ("relu", "exp", "mul")
    assert result.program.constants == {}


def test_a_constant_that_nobody_reads_goes() -> None:
    program = captured(Of(lambda x: x + 1), X)
    program.constants["spare"] = torch.ones(3)
    first = program.operators[0]
    with program.graph.inserting_before(first):
        spare = program.graph.create_node("get_attr", "spare")
    spare.meta["val"] = program.fake_mode.from_tensor(torch.ones(3), static_shapes=True)
    result = check(program, (), PASS, changes=1)
    assert result.program.constants == {}


def test_dead_dropout_in_evaluation_mode_goes() -> None:
    check(orphaned(Of(lambda x: nn.functional.dropout(x, 0.5, False) + x), "dropout"), (), PASS)


# -- Refuses ----------------------------------------------------------------------------------


def test_refuses_to_shift_the_random_numbers_of_others() -> None:
    program = orphaned(Of(lambda x: nn.functional.dropout(x, 0.5, True) + x), "dropout")
    refuses(program, (), PASS, "it draws random numbers or has an effect")


def test_inputs_stay_whether_read_or_not() -> None:
    program = captured(Of(lambda x, y: x + 1), X, torch.randn(4))
    assert not PASS.run(program, PassContext()).changes
    assert len(program.placeholders) == 2


# -- Meaning ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.integers(0, 8))
def test_what_remains_is_what_an_output_reaches(reads: list[int], kept: int) -> None:
    """A random chain of operators of which one is returned."""

    def forward(x: Tensor) -> Tensor:
        values = [x.exp()]
        for i in reads:
            values.append(values[i % len(values)] + 1)
        return torch.stack(values)

    program = captured(Of(forward), X)
    stack = program.operators[-1]
    values = stack.args[0]
    assert isinstance(values, (list, tuple))
    chosen = values[kept % len(values)]
    program.output.args = ((chosen,),)
    stack.graph.erase_node(stack)
    reached: set[Node] = set()
    pending = [chosen]
    while pending:
        node = pending.pop()
        assert isinstance(node, Node)
        reached.add(node)
        pending += node.all_input_nodes
    names = {n.name for n in reached}
    result = PASS.run(program, PassContext())
    assert {n.name for n in result.program.operators} == names - {"x"}


def test_random_operators_and_inputs_are_not_removable() -> None:
    program = captured(Of(lambda x: nn.functional.dropout(x, 0.5, True) + torch.rand(3)), X)
    removable = {n.name for n in program.nodes if is_removable(n)}
    assert removable == {"add"}


# -- Neighbors --------------------------------------------------------------------------------


def test_each_dead_value_is_a_site_and_live_ones_are_untouched() -> None:
    program = orphaned(Of(lambda x: x.exp() * x.sin() + x.cos()), "exp", "sin")
    result = run_checked(program, PASS)
    assert [c.node for c in result.changes] == ["sin", "exp"]
    assert [n.name for n in result.program.operators if is_op(n, aten.cos.default)] == ["cos"]
