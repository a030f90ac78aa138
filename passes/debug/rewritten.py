"""Which values of a program to measure for the rewrites of a pass, and against which.

A rewritten operator counts by its own value. A rewritten constant counts at the operators that read
it, through what is computed from constants only; a value whose shape changed, at the next value
behind it that can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from planish.ir.changes import Change
from planish.ir.lockstep import is_random
from planish.ir.program import Program
from planish.passes.debug.alone import feedable
from planish.passes.debug.lineage import Stands


@dataclass(frozen=True)
class Rewritten:
    """One value and the site whose work it shows.

    Attributes:
        change: the site.
        node: of the program after.
        old: of the program before, whose value it stands for.
        reader: whether the node was left alone, and shows what was rewritten before it.
        constant: dotted name of the rewritten constant, if that is what it shows.
    """

    change: Change
    node: Node
    old: Node
    reader: bool = False
    constant: str | None = None


def rewritten(before: Program, after: Program, found: Stands) -> list[Rewritten]:
    """The values to measure, in the order of the program after."""
    fixed_before, fixed = fixed_nodes(before), fixed_nodes(after)
    items: dict[tuple[int, Node, Node], Rewritten] = {}
    for node in after.graph.nodes:
        for old, change in found.replaced.get(node, ()):
            constant = node in fixed and old in fixed_before
            name = None
            if constant:
                if node.op == old.op == "get_attr" and after.constant(node) is before.constant(old):
                    continue
                name = str(old.target) if old.op == "get_attr" else old.name
            if not constant and feedable(old, node):
                items.setdefault((change.number, node, old), Rewritten(change, node, old))
                continue
            if constant and any(user.op == "output" for user in node.users):
                items.setdefault(
                    (change.number, node, old), Rewritten(change, node, old, constant=name)
                )
            for reader, partner in _readers(node, fixed, found):
                items.setdefault(
                    (change.number, reader, partner),
                    Rewritten(change, reader, partner, reader=True, constant=name),
                )
    place = {node: position for position, node in enumerate(after.graph.nodes)}
    return sorted(items.values(), key=lambda item: place[item.node])


def fixed_nodes(program: Program) -> set[Node]:
    """The nodes that no input has a part in."""
    fixed: set[Node] = set()
    for node in program.graph.nodes:
        computed = node.op == "call_function" and not is_random(node)
        if node.op == "get_attr" or (computed and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _readers(node: Node, fixed: set[Node], found: Stands) -> Iterator[tuple[Node, Node]]:
    """The nearest values behind a node that an input has a part in and that can be compared."""
    seen, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            old = found.partner(user)
            if user not in fixed and old is not None and feedable(old, user):
                yield user, old
            else:
                pending.append(user)
