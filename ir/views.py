"""Graph-theoretic views of a program, as ``networkx`` graphs over its own nodes.

A view is a snapshot: make a new one after a rewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from torch.fx import Node

from planish.ir.program import Program

# networkx publishes no way to say what the vertices are.
Digraph = Any


def dataflow(program: Program) -> Digraph:
    """A directed graph with an edge from every value to every node that reads it.

    Vertices are the program's nodes, the output included, in topological order.
    """
    import networkx  # costs 0.15 s, and few programs are looked at this way

    graph: Digraph = networkx.DiGraph()
    graph.add_nodes_from(program.graph.nodes)
    for node in program.graph.nodes:
        graph.add_edges_from((operand, node) for operand in node.all_input_nodes)
    return graph


class Dataflow:
    """Questions about what flows where in one program.

    Args:
        program: must not be edited while this is used.
    """

    def __init__(self, program: Program):
        self.program = program
        self.graph = dataflow(program)
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}

    def reaches(self, source: Node, target: Node) -> bool:
        """Whether ``target`` depends on ``source``; a node reaches itself."""
        seen = {source}
        pending = [source]
        limit = self.order[target]
        while pending:
            node = pending.pop()
            if node is target:
                return True
            for user in node.users:
                # Users come later, so nothing beyond the target's place leads back to it.
                if user not in seen and self.order[user] <= limit:
                    seen.add(user)
                    pending.append(user)
        return False

    def descendants(self, node: Node) -> set[Node]:
        """Everything that depends on a node, without itself."""
        import networkx

        return set(networkx.descendants(self.graph, node))

    def ancestors(self, node: Node) -> set[Node]:
        """Everything a node depends on, without itself."""
        import networkx

        return set(networkx.ancestors(self.graph, node))

    def between(self, source: Node, target: Node) -> list[Node]:
        """The nodes on any path from one node to the other, both included, in order."""
        if not self.reaches(source, target):
            return []
        inside = (self.descendants(source) | {source}) & (self.ancestors(target) | {target})
        return sorted(inside, key=self.order.__getitem__)

    @cached_property
    def _dominators(self) -> dict[Node | None, Node | None]:
        return _immediate(self.graph, [n for n in self.graph if self.graph.in_degree(n) == 0])

    @cached_property
    def _post_dominators(self) -> dict[Node | None, Node | None]:
        backward = self.graph.reverse(copy=True)
        return _immediate(backward, [n for n in backward if backward.in_degree(n) == 0])

    def immediate_dominator(self, node: Node) -> Node | None:
        """The last node that every path from any input or constant to ``node`` goes through.

        None where there is no such node: the paths start apart.
        """
        return self._dominators[node]

    def immediate_post_dominator(self, node: Node) -> Node | None:
        """The first node that every path from ``node`` to any end goes through.

        An end is the output or a dead node. None where there is no such node.
        """
        return self._post_dominators[node]

    def dominates(self, first: Node, second: Node) -> bool:
        """Whether every path from the inputs and constants to ``second`` passes ``first``."""
        return _on_chain(first, second, self._dominators)

    def post_dominates(self, first: Node, second: Node) -> bool:
        """Whether every path from ``second`` to an end passes ``first``."""
        return _on_chain(first, second, self._post_dominators)

    def regions(
        self, belongs: Callable[[Node], bool], joined: Callable[[Node, Node], bool] | None = None
    ) -> list[list[Node]]:
        """Maximal sets of nodes connected through edges between nodes that satisfy a predicate.

        Args:
            belongs: which nodes may be in a region.
            joined: whether the edge from a value to its reader connects; by default all do.

        Returns:
            The regions in the order of their first nodes, each in topological order.
        """
        import networkx

        members = [node for node in self.order if belongs(node)]
        graph: Digraph = networkx.Graph()
        graph.add_nodes_from(members)
        inside = set(members)
        for value, reader in self.graph.edges(members):
            if reader in inside and (joined is None or joined(value, reader)):
                graph.add_edge(value, reader)
        parts = [
            sorted(p, key=self.order.__getitem__) for p in networkx.connected_components(graph)
        ]
        return sorted(parts, key=lambda part: self.order[part[0]])


def _immediate(graph: Digraph, starts: Iterable[Node]) -> dict[Node | None, Node | None]:
    """Immediate dominators from a virtual start (None) before all starts."""
    import networkx

    rooted = graph.copy()
    root = object()
    rooted.add_edges_from((root, start) for start in starts)
    found = networkx.immediate_dominators(rooted, root)
    return {
        node: None if dominator is root else dominator
        for node, dominator in found.items()
        if node is not root
    }


def _on_chain(first: Node, second: Node, parents: dict[Node | None, Node | None]) -> bool:
    current: Node | None = second
    while current is not None:
        if current is first:
            return True
        current = parents[current]
    return False
