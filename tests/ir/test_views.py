"""Graph-theoretic views, checked on small graphs by hand and against definitions by search."""

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from planish.ir import Program, Signature, capture
from planish.ir.ops import is_op
from planish.ir.views import Dataflow, dataflow

aten = torch.ops.aten


class Diamond(nn.Module):
    """One value, two roads, one meeting point, and an end."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        top = x.relu()
        left, right = top.neg(), top.exp()
        return (left + right).sin() * y


@pytest.fixture(scope="module")
def diamond() -> tuple[Dataflow, dict[str, Node]]:
    program = capture(Diamond().eval(), (torch.ones(2), torch.ones(2)))
    return Dataflow(program), {n.name: n for n in program.nodes}


def test_edges_go_from_values_to_readers(diamond: tuple[Dataflow, dict[str, Node]]) -> None:
    flow, named = diamond
    graph = dataflow(flow.program)
    assert list(graph) == list(flow.program.nodes)
    assert set(graph.predecessors(named["add"])) == {named["neg"], named["exp"]}
    assert list(graph.successors(named["mul"])) == [flow.program.output]
    assert networkx.is_directed_acyclic_graph(graph)


def test_reachability(diamond: tuple[Dataflow, dict[str, Node]]) -> None:
    flow, named = diamond
    assert flow.reaches(named["relu"], named["mul"])
    assert flow.reaches(named["neg"], named["neg"])
    assert not flow.reaches(named["neg"], named["exp"])
    assert not flow.reaches(named["mul"], named["relu"])
    assert flow.between(named["relu"], named["add"]) == [
        named[n] for n in ("relu", "neg", "exp", "add")
    ]
    assert flow.between(named["neg"], named["exp"]) == []


def test_dominators_of_a_diamond(diamond: tuple[Dataflow, dict[str, Node]]) -> None:
    flow, named = diamond
    assert flow.immediate_dominator(named["add"]) is named["relu"]
    assert flow.immediate_dominator(named["neg"]) is named["relu"]
    assert flow.immediate_dominator(named["x"]) is None
    assert flow.immediate_dominator(named["mul"]) is None  # x and y start apart
    assert flow.dominates(named["x"], named["sin"])
    assert flow.dominates(named["sin"], named["sin"])
    assert not flow.dominates(named["neg"], named["add"])


def test_post_dominators_of_a_diamond(diamond: tuple[Dataflow, dict[str, Node]]) -> None:
    flow, named = diamond
    assert flow.immediate_post_dominator(named["relu"]) is named["add"]
    assert flow.immediate_post_dominator(named["mul"]) is flow.program.output
    assert flow.immediate_post_dominator(flow.program.output) is None
    assert flow.post_dominates(named["mul"], named["y"])
    assert not flow.post_dominates(named["exp"], named["relu"])


def test_a_dead_end_is_an_end(diamond: tuple[Dataflow, dict[str, Node]]) -> None:
    program = diamond[0].program.clone()
    relu = next(n for n in program.operators if n.name == "relu")
    with program.graph.inserting_after(relu):
        program.graph.call_function(aten.abs.default, (relu,))
    assert Dataflow(program).immediate_post_dominator(relu) is None


def test_regions_are_connected_through_the_predicate(
    diamond: tuple[Dataflow, dict[str, Node]],
) -> None:
    flow, named = diamond
    roads = flow.regions(lambda n: n.name in {"relu", "neg", "sin", "mul", "exp"})
    assert [[n.name for n in part] for part in roads] == [["relu", "neg", "exp"], ["sin", "mul"]]
    cut = flow.regions(
        lambda n: n.op == "call_function", lambda value, _: not is_op(value, aten.relu.default)
    )
    assert [[n.name for n in part] for part in cut] == [
        ["relu"],
        ["neg", "exp", "add", "sin", "mul"],
    ]
    assert flow.regions(lambda n: False) == []
    assert flow.regions(lambda n: n is named["add"]) == [[named["add"]]]


def random_program(operands: list[list[int]]) -> Program:
    """Nodes that each read some earlier ones; unread nodes go to the output."""
    graph = Graph()
    nodes = [graph.placeholder("a"), graph.placeholder("b")]
    for reads in operands:
        picked = [nodes[i % len(nodes)] for i in reads]
        nodes.append(graph.call_function(aten.cat.default, (picked,)))
    graph.output(tuple(n for n in nodes if not n.users))
    spec = pytree.tree_structure(((0, 0), {}))
    out = pytree.tree_structure((0,) * len(graph.output_node().args[0]))  # type: ignore[arg-type]
    return Program(graph, {}, Signature((), 2, ("a", "b"), {}, spec, out, ()))


def reached_without(
    flow: Dataflow, starts: list[Node], banned: Node | None, *, back: bool
) -> set[Node]:
    graph = flow.graph.reverse() if back else flow.graph
    kept = graph.subgraph(n for n in graph if n is not banned)
    found: set[Node] = set()
    for start in starts:
        if start is not banned:
            found |= {start} | networkx.descendants(kept, start)
    return found


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=12))
def test_every_answer_agrees_with_its_definition(operands: list[list[int]]) -> None:
    program = random_program(operands)
    flow = Dataflow(program)
    nodes = list(program.nodes)
    inputs, ends = program.placeholders, [n for n in nodes if not n.users]
    for first in nodes:
        forward = reached_without(flow, inputs, first, back=False)
        backward = reached_without(flow, ends, first, back=True)
        for second in nodes:
            assert flow.reaches(first, second) == (second in flow.descendants(first) | {first})
            assert flow.dominates(first, second) == (second not in forward)
            assert flow.post_dominates(first, second) == (second not in backward)
