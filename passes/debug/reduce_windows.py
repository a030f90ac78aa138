"""Where to look first: parts of a program around a place, or halves of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.fx import Node

from planish.ir.program import Program
from planish.passes.debug.subgraph import closure

_SMALL = 24  # operators; so few are tried in no time


def halves(items: list[str]) -> list[list[str]]:
    """The first, the last and the middle half; nothing of a single item."""
    size = (len(items) + 1) // 2
    if size == len(items):
        return []
    middle = (len(items) - size) // 2
    return [items[:size], items[-size:], items[middle : middle + size]]


def windows(program: Program, anchors: Sequence[str]) -> Iterator[frozenset[str]]:
    """Operators within growing distance of an anchor, as legal sets; smaller distances first.

    A window ends at an eighth of the program: a failure that shows at none of that size is not
    where it was thought to be, and halving finds it with fewer tries.
    """
    nodes = {node.name: node for node in program.operators}
    largest = max(_SMALL, len(nodes) // 8)
    balls = {name: {nodes[name]} for name in anchors}
    edges = {name: {nodes[name]} for name in anchors}
    radius, due = 0, 0
    while balls:
        if radius == due:
            due = radius + max(1, radius // 2)
            for ball in balls.values():
                yield closure(program, frozenset(n.name for n in ball))
        for name in list(balls):
            edges[name] = {m for n in edges[name] for m in _neighbors(n)} - balls[name]
            balls[name] |= edges[name]
            if not edges[name] or len(balls[name]) > largest:
                del balls[name]
        radius += 1


def _neighbors(node: Node) -> Iterator[Node]:
    """Operators that make what a node reads, or read what it makes; sizes connect nothing."""
    for other in node.all_input_nodes:
        if other.op == "call_function" and _carries_tensors(other):
            yield other
    if _carries_tensors(node):
        for other in node.users:
            if other.op == "call_function":
                yield other


def _carries_tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    )
