"""Which value of one program stands for which of another, as the rewrites of a pass left them.

A rewrite records pairs (node before, node after). They are followed through chains within a pass:
where ``b`` replaced ``a`` and ``c`` replaced ``b``, ``c`` stands for ``a``. A node that no rewrite
touched stands for itself. What a pair says is what the rewrite *meant*: an exact pass that moves a
factor from one operator into the next also leaves a pair of values that differ by this factor. So
over exact passes a pair is believed only where the two values agree, of which a few elements of
each, noted while the program ran, are proof enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.changes import Change
from planish.ir.compare import SMALLEST_SCALE, bound_of
from planish.ir.program import Program
from planish.passes.pipeline import OUTSIDE

_ELEMENTS = 64  # of one value, that are noted
_SLACK = 10.0  # times the bound of the type: a bound is for outputs, whose scale is the largest


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
    nodes = [node for node, _ in found]
    behind = {node: _ancestors(node) for node in nodes}
    return tuple(
        (node, change)
        for node, change in found
        if not any(node in behind[other] for other in nodes if other is not node)
    )


def _ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    pending = [node]
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return seen


# -- through a whole run --------------------------------------------------------------------------


class Notes:
    """A few elements of every value of one run; give ``observe`` to whoever runs the program."""

    def __init__(self) -> None:
        self._found: dict[Node, list[object]] = {}

    def observe(self, node: Node, value: Any) -> None:  # noqa: ANN401 - whatever operators give
        """Note one value."""
        self._found[node] = [_noted(leaf) for leaf in _leaves(value)]

    def agree(self, node: Node, other: Notes, mine: Node) -> bool:
        """Whether a value noted here may be one noted there.

        Args:
            node: of the other program.
            other: its notes, of a run on the same inputs.
            mine: of this program.
        """
        old, new = other._found.get(node), self._found.get(mine)
        if old is None or new is None or len(old) != len(new):
            return False
        return all(_alike(b, a) for b, a in zip(old, new, strict=True))


def _leaves(value: object) -> Iterable[object]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    return (value,)


def _noted(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    count = value.numel()
    if not count or value.layout is not torch.strided:
        return tuple(value.shape)
    flat = torch.arange(min(count, _ELEMENTS)) * (count - 1) // max(1, min(count, _ELEMENTS) - 1)
    picked = value[torch.unravel_index(flat, value.shape)] if value.dim() else value.reshape(1)
    return tuple(value.shape), picked.detach().clone()


def _alike(b: object, a: object) -> bool:
    if not isinstance(b, tuple) or not isinstance(a, tuple) or b[0] != a[0] or len(b) != len(a):
        return bool(b == a)
    old, new = b[1], a[1]
    if bound_of(old) == 0.0 or bound_of(new) == 0.0:
        return torch.equal(old, new)
    bound = _SLACK * max(bound_of(old), bound_of(new))
    wide = torch.complex128 if old.is_complex() or new.is_complex() else torch.float64
    old, new = old.to(wide), new.to(wide)
    finite = old.isfinite() & new.isfinite()
    if not torch.equal(old.isfinite(), new.isfinite()):
        return False
    if not bool(finite.any()):
        return True
    scale = max(SMALLEST_SCALE, float(old[finite].abs().max()))
    return float((old - new)[finite].abs().max()) <= bound * scale


def origins(original: Program) -> dict[str, str]:
    """Every value of the original stands for itself."""
    return {node.name: node.name for node in original.graph.nodes}


def follow(
    lineage: Mapping[str, str],
    found: Stands,
    after: Program,
    agree: Callable[[Node, Node], bool] | None = None,
) -> dict[str, str]:
    """Carry a lineage over one pass.

    Args:
        lineage: node before the pass -> node of the original whose value it stands for.
        found: what the pass replaced.
        after: the program after the pass.
        agree: for an exact pass, whether (node before, node after) hold one value; None believes
            what the pass recorded, which is all there is to go by where values may change.

    Returns:
        The lineage of the program after the pass.
    """
    carried = {}
    for node in after.graph.nodes:
        if node.op == "placeholder" or agree is None:
            old = found.partner(node)
        else:
            old = next((c for c in found.candidates(node) if agree(c, node)), None)
        if old is not None and old.name in lineage:
            carried[node.name] = lineage[old.name]
    return carried
