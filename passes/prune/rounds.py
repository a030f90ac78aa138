"""Which group is cut next, where one is cut a round: the least loss for the work it saves.

Each group proposes to keep a share of its units. What it would lose is the first diagonal entry of
R that is left out, over the first of all; what it would save goes with the work of the layers that
make its units and of those that read them. After a cut only the groups behind it are looked at
anew, and only the operators from there on are run again.

Source: Chee et al., "Model Preserving Compression for Neural Networks", NeurIPS 2022, section 5,
and the code of the authors for the score.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from planish.ir.cost import macs_of
from planish.ir.program import Program
from planish.passes.prune.activations import Activations
from planish.passes.prune.decompose import Interpolation, Pivoted
from planish.passes.prune.groups import Group
from planish.passes.prune.triangle import Triangle

_Key = tuple[tuple[str, int], ...]


class Rounds:
    """What is known of the groups from one round to the next.

    Args:
        program: is cut in between.
        activations: of it.
        decompose: the pivoted QR of a group, None where there is none.
        constant: whether a constant is fitted for a group.

    Attributes:
        count: groups cut so far.
        denied: groups whose cut was not allowed.
    """

    def __init__(
        self,
        program: Program,
        activations: Activations,
        decompose: Callable[[Group, Triangle], Pivoted | None],
        constant: Callable[[Group], bool],
    ):
        self.program, self.activations = program, activations
        self.count = self.denied = 0
        self._decompose, self._constant = decompose, constant
        # The values a group is read as, its size, and its QR.
        self._known: dict[_Key, tuple[set[Node], int, Pivoted | None]] = {}
        self._stuck: set[_Key] = set()  # groups that a cut did not change
        self._chosen: tuple[_Key, int, set[Node]] | None = None  # and what its cut leaves alone

    def choose(self, groups: list[Group], step: float) -> tuple[Group, Interpolation] | None:
        """The group to cut, and what stands for it; None where none can give up a unit."""
        if self._chosen is not None:
            self._after(groups)
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        groups = [g for g in groups if g.size > 1 and _key(g) not in self._stuck]
        new = [g for g in groups if self._stale(g)]
        starts = {start(g, order) for g in groups}
        nodes = list(order)
        seen = self.activations.triangles(
            new, constant=self._constant, resume=[nodes[s] for s in starts]
        )
        for group in new:
            values = {read.value.node for read in group.reads}
            self._known[_key(group)] = values, group.size, self._decompose(group, seen[group])
        best: tuple[float, int, Group, int, Pivoted] | None = None
        for place, group in enumerate(groups):
            pivoted = self._known[_key(group)][2]
            if pivoted is None:
                continue
            k = max(1, min(group.size - 1, int(step * group.size + 1e-9)))
            score = pivoted.score(k) / max(1, work(self.program, group))
            if best is None or (score, place) < best[:2]:
                best = score, place, group, k, pivoted
        if best is None:
            return None
        _, _, group, k, pivoted = best
        self._chosen = _key(group), group.size, set(nodes[: start(group, order)])
        return group, pivoted.keep(k)

    def done(self, group: Group) -> None:
        """Say that the chosen group was folded and cut, or that both sites were denied."""
        assert self._chosen is not None
        assert self._chosen[0] == _key(group)
        alike = self._chosen[2]
        self.count += 1
        self.activations.forget(alike)
        self._known = {key: known for key, known in self._known.items() if known[0] <= alike}

    def _after(self, groups: list[Group]) -> None:
        """Leave alone what a round did not make smaller: its site was denied."""
        assert self._chosen is not None
        key, size, _ = self._chosen
        if any(_key(g) == key and g.size == size for g in groups):
            self._stuck.add(key)
            self.count -= 1
            self.denied += 1

    def _stale(self, group: Group) -> bool:
        known = self._known.get(_key(group))
        return known is None or known[1] != group.size


def _key(group: Group) -> _Key:
    """What a group is known by after a cut: the operators that read it."""
    return tuple(
        (read.reader.name, read.value.axis)
        for read in sorted(group.reads, key=lambda r: r.reader.name)
    )


def start(group: Group, order: dict[Node, int]) -> int:
    """The position of the first operator that a cut of a group changes."""
    users = {user for place in group.constants for user in place.node.users}
    return min(order[user] for user in users)


def work(program: Program, group: Group) -> int:
    """Multiply-accumulates of the layers that make the units, and of those that read them."""
    users = {user for place in group.constants for user in place.node.users}
    users.update(read.reader for read in group.reads)
    return sum(macs_of(program, user) for user in users)
