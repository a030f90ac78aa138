"""Which value of one program stands for which of the one before, as the rewrites left them.

A rewrite records pairs (node before, node after). They are followed through chains within a pass:
where ``b`` replaced ``a`` and ``c`` replaced ``b``, ``c`` stands for ``a``. A node that no rewrite
touched stands for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.changes import Change
from planish.ir.program import Program
from planish.passes.pipeline import OUTSIDE


@dataclass(frozen=True)
class Stands:
    """How the nodes of a program stand for those of the program before one pass.

    Attributes:
        replaced: node after -> the nodes before whose place a rewrite gave it, with that change;
            a node that was edited in place replaced itself.
        touched: nodes after that were added or edited, with the last change that did.
        itself: node after -> the node before of this name, unless a new one took the name.
    """

    replaced: Mapping[Node, tuple[tuple[Node, Change], ...]]
    touched: Mapping[Node, Change]
    itself: Mapping[Node, Node]

    def partner(self, node: Node) -> Node | None:
        """The node before whose value a node after stands for; None where there is none."""
        if node in self.itself and node not in self.touched:
            return self.itself[node]
        found = self.replaced.get(node)
        return found[-1][0] if found else None

    def candidates(self, node: Node) -> list[Node]:
        """All nodes before whose value it may hold, the likeliest first."""
        found = [self.itself[node]] if node in self.itself else []
        return found + [old for old, _ in reversed(self.replaced.get(node, ()))]


def stands(before: Program, after: Program, changes: Sequence[Change]) -> Stands:
    """Read the pairs of one pass.

    Where a rewrite let one node stand for two, of which one is computed from the other (a
    convolution for itself and for the batch norm behind it), the later one counts.
    """
    old = {node.name: node for node in before.graph.nodes}
    new = {node.name: node for node in after.graph.nodes}
    replaced: dict[str, dict[str, Change]] = {}
    touched: dict[str, Change] = {}
    added: set[str] = set()
    for change in changes:
        added.update(change.added)
        touched.update(dict.fromkeys(change.added, change))
        for source, goal in change.replaced:
            sources = dict.fromkeys(replaced.get(source, ()), change)
            if source in old and source not in added:
                sources[source] = change
            replaced[goal] = {**replaced.get(goal, {}), **sources}
            if source == goal:
                touched[goal] = change
    itself = {node: old[name] for name, node in new.items() if name in old and name not in added}
    for change in changes:
        if change.rule == OUTSIDE:
            for node in _edited(itself, before, after):
                if node.name not in touched:
                    touched[node.name] = change
                    replaced[node.name] = {node.name: change}
    return Stands(
        {
            new[goal]: _latest([(old[source], change) for source, change in sources.items()])
            for goal, sources in replaced.items()
            if goal in new and sources
        },
        {new[name]: change for name, change in touched.items() if name in new},
        itself,
    )


def _edited(itself: Mapping[Node, Node], before: Program, after: Program) -> list[Node]:
    """Nodes that kept their names but not their operands, for edits that nobody recorded."""
    return [
        node
        for node, old in itself.items()
        if node.op in ("call_function", "get_attr")
        and (
            node.target != old.target
            or _arguments(node) != _arguments(old)
            or after.constant(node) is not before.constant(old)
        )
    ]


def _arguments(node: Node) -> str:
    return repr(map_arg((node.args, node.kwargs), lambda n: f"%{n.name}"))


def _latest(found: list[tuple[Node, Change]]) -> tuple[tuple[Node, Change], ...]:
    """Leave out what another one is computed from."""
    if len(found) < 2:
        return tuple(found)
    behind = _ancestors([node for node, _ in found])
    return tuple((node, change) for node, change in found if node not in behind)


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    """Everything that any of these nodes is computed from."""
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return seen
