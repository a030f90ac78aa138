"""One rewrite alone: compute a rewritten value from the values of the program before.

For a value of the program after and one site, everything the site added is computed anew; so is
whatever stands for nothing before. What stands for a value before is fed with that value, other
sites' constants included. What remains is the error that this one site makes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.ir.changes import Change
from planish.ir.errors import PassError
from planish.ir.execute import evaluate
from planish.ir.program import Program
from planish.passes.debug.lineage import Stands


@dataclass(frozen=True)
class Replay:
    """How to compute one value alone.

    Attributes:
        root: the node of the program after.
        order: the nodes to compute, operands first; constants of the program after are among them.
        feeds: node of the program after -> the node before whose value it is fed with.
        frees: node of ``order`` -> values that nobody needs after it.
        after: the program after.
    """

    root: Node
    order: tuple[Node, ...]
    feeds: Mapping[Node, Node]
    frees: Mapping[Node, tuple[Node, ...]]
    after: Program

    def value(self, fed: Mapping[Node, Any]) -> Any:  # noqa: ANN401 - whatever the operator gives
        """The value of ``root``.

        Args:
            fed: node of the program before -> its value, for all of ``feeds``.

        Raises:
            PassError: an operator rejects what it is fed.
        """
        try:
            return self._computed(fed)
        except PassError:
            # A view may need the strides that its operand has after the pass, and not before.
            return self._computed(fed, contiguous=True)

    def _computed(self, fed: Mapping[Node, Any], *, contiguous: bool = False) -> Any:  # noqa: ANN401 - as above
        env = {
            node: _as_declared(fed[old], node.meta.get("val"), contiguous=contiguous)
            for node, old in self.feeds.items()
        }
        for node in self.order:
            if node.op == "get_attr":
                env[node] = self.after.constants[str(node.target)]
            else:
                env[node] = evaluate(node, env)
            for dead in self.frees[node]:
                del env[dead]
        return env[self.root]


def replay(
    after: Program,
    found: Stands,
    fixed: Container[Node],
    change: Change,
    root: Node,
    place: Mapping[Node, int],
    *,
    reader: bool,
) -> Replay:
    """Plan one value.

    Args:
        after: the program after the pass.
        found: how it stands for the one before.
        fixed: the nodes of ``after`` that are computed from constants only; they are computed
            anew, since a constant of the site may be among theirs.
        change: the site that is to act alone.
        root: the value.
        place: node of ``after`` -> its position.
        reader: whether the root itself was left alone and reads a constant of the site.
    """
    computed: set[Node] = set()
    feeds: dict[Node, Node] = {}
    pending = [root]
    while pending:
        node = pending.pop()
        if node in computed or node in feeds:
            continue
        forced = node is root and (reader or root in found.touched)
        kept = node.op == "call_function" and node in fixed and node in found.itself
        alone = forced or kept or _belongs(node, change, found)
        old = None if alone else found.partner(node)
        if old is not None and feedable(old, node):
            feeds[node] = old
        else:
            computed.add(node)
            pending.extend(node.all_input_nodes)
    order = tuple(sorted(computed, key=place.__getitem__))
    return Replay(root, order, feeds, _frees(order, root), after)


def _belongs(node: Node, change: Change, found: Stands) -> bool:
    """Whether a site made a node what it is."""
    made = found.touched.get(node)
    return made is not None and made.number == change.number


def _frees(order: tuple[Node, ...], root: Node) -> dict[Node, tuple[Node, ...]]:
    seen = {root}
    frees = {}
    for node in reversed(order):
        fresh = tuple(dict.fromkeys(n for n in node.all_input_nodes if n not in seen))
        seen.update(fresh)
        frees[node] = fresh
    return frees


def feedable(old: Node, new: Node) -> bool:
    """Whether the value of one node can be put in the place of another: same shapes and kinds."""
    return _like(old.meta.get("val"), new.meta.get("val"))


def _like(old: object, new: object) -> bool:
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(_like(b, a) for b, a in zip(old, new, strict=True))
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return type(old) is type(new)
    kinds = {(t.is_floating_point(), t.is_complex()) for t in (old, new)}
    same = len(kinds) == 1 and (old.is_floating_point() or old.dtype == new.dtype)
    return same and [str(n) for n in old.shape] == [str(n) for n in new.shape]


def _as_declared(value: object, declared: object, *, contiguous: bool) -> object:
    """A value before in the type that its place now has: a narrower one rounds what it is fed."""
    if isinstance(value, Tensor) and isinstance(declared, Tensor):
        converted = value.to(declared.dtype)
        return converted.contiguous() if contiguous else converted
    if isinstance(value, (tuple, list)) and isinstance(declared, (tuple, list)):
        pairs = zip(value, declared, strict=True)
        return type(value)([_as_declared(v, d, contiguous=contiguous) for v, d in pairs])
    return value
