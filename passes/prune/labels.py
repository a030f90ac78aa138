"""The units of one group while it grows: which index of which axis belongs to which unit.

Two indices that can only leave together are *tied*. Ties are transitive, whatever the order in
which operators are looked at, so the least fixed point over all operators is the group: an index
that belongs to no unit stays, and a unit that touches what cannot be cut is *pinned*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

Indices = NDArray[np.int64]
Axis = tuple[Node, int]
NONE = -1
PINNED = 0  # a class of its own: units tied to it cannot be cut
CHOICES = 8  # at most so many ways of growing one seed


class AmbiguousReshapeError(Exception):
    """A reshape gives the units several axes to lie along.

    Attributes:
        options: the pairs of axes (of its operand, of its result) that are possible.
    """

    def __init__(self, key: tuple[Node, int], options: list[tuple[int, int]]):
        super().__init__(f"{key[0].name} has {len(options)} readings")
        self.key, self.options = key, options


class AllPinnedError(Exception):
    """No unit is left that could be cut.

    Attributes:
        reasons: what pinned them, with the node.
    """

    def __init__(self, reasons: list[tuple[Node, str]]):
        super().__init__(reasons[-1][1] if reasons else "")
        self.reasons = reasons


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a tensor value; None for other values."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def sizes_of(node: Node) -> tuple[int | torch.SymInt, ...]:
    """The shape of what is known to be a tensor."""
    shape = shape_of(node)
    assert shape is not None, node
    return shape


class Labels:
    """Units of the axes of values, and which units have turned out to be one.

    Args:
        units: how many to start with, numbered from 1.
        choices: by reshape and block, which of its axes the units lie along.
    """

    def __init__(self, units: int, choices: Mapping[tuple[Node, int], tuple[int, int]]):
        self.choices = choices
        self.parent = np.arange(units + 1, dtype=np.int64)
        self.of: dict[Axis, Indices] = {}
        self.reasons: list[tuple[Node, str]] = []
        self.pending: deque[Node] = deque()
        self._queued: set[Node] = set()
        self.merges = 0

    # -- classes --------------------------------------------------------------------------

    def roots(self, labels: Indices) -> Indices:
        """The representatives of the classes of labels; NONE stays."""
        found = np.where(labels < 0, NONE, self.parent[np.maximum(labels, 0)])
        return found.astype(np.int64)

    def axis(self, node: Node, axis: int) -> Indices | None:
        """Classes of the indices of an axis, or None where none is of a unit."""
        held = self.of.get((node, axis))
        return None if held is None else self.roots(held)

    def labelled(self, node: Node) -> list[int]:
        """The axes of a value that hold units."""
        value = node.meta.get("val")
        rank = value.dim() if isinstance(value, Tensor) else 0
        return [i for i in range(rank) if (node, i) in self.of]

    def reach_only(self, places: Iterable[tuple[Node, int, Tensor]]) -> bool:
        """Whether units lie in these places of constants (unit of each index, or -1) alone."""
        wanted: dict[Axis, NDArray[np.bool_]] = {}
        for node, axis, unit in places:
            wanted[node, axis] = wanted.get((node, axis), np.False_) | (unit.numpy() >= 0)
        held = {a: units > 0 for a, units in self.of.items() if a[0].op == "get_attr"}
        held = {axis: mask for axis, mask in held.items() if mask.any()}
        return held.keys() == wanted.keys() and all(
            np.array_equal(mask, wanted[axis]) for axis, mask in held.items()
        )

    def _merge(self, a: Indices, b: Indices) -> None:
        changed = False
        for x, y in {(int(p), int(q)) for p, q in zip(a, b, strict=True) if p != q}:
            low, high = sorted((int(self.parent[x]), int(self.parent[y])))
            if low != high:
                self.parent[self.parent == high] = low
                self.merges += 1
                changed = True
        if changed:
            self._check()

    def _check(self) -> None:
        if not self.parent.any():
            raise AllPinnedError(self.reasons)

    # -- growing --------------------------------------------------------------------------

    def touch(self, node: Node) -> None:
        """Look at a value's producer and readers again."""
        for each in (node, *node.users):
            if each not in self._queued:
                self._queued.add(each)
                self.pending.append(each)

    def next(self) -> Node | None:
        """A node to look at, or None at the fixed point."""
        if not self.pending:
            return None
        node = self.pending.popleft()
        self._queued.discard(node)
        return node

    def assign(self, node: Node, axis: int, indices: Indices, labels: Indices) -> None:
        """Make indices of an axis belong to units; those that do already are tied to them."""
        given = labels >= 0
        if not given.any():
            return
        indices, labels = indices[given], self.roots(labels[given])
        shape = shape_of(node)
        assert shape is not None
        size = shape[axis]
        if not isinstance(size, int):
            self.pin_units(node, labels, f"axis {axis} of its result has a dynamic size")
            return
        if (node, axis) not in self.of:
            if not (labels > PINNED).any():
                return
            self.of[node, axis] = np.full(size, NONE, dtype=np.int64)
        held = self.of[node, axis]
        fresh = (held[indices] < 0) & (labels > PINNED)  # nothing follows from what stays
        if fresh.any():
            held[indices[fresh]] = labels[fresh]
            self.touch(node)
        # An index named twice with two units ties them.
        now = self.roots(held[indices])
        apart = (now >= 0) & (now != labels)
        if apart.any():
            self._merge(now[apart], labels[apart])

    def tie(self, a: Axis, at: Indices, b: Axis, bt: Indices) -> None:
        """Index ``at[i]`` of axis ``a`` and index ``bt[i]`` of axis ``b`` leave together."""
        for (one, one_at), (other, other_at) in (((a, at), (b, bt)), ((b, bt), (a, at))):
            labels = self.axis(*one)
            if labels is not None:
                self.assign(other[0], other[1], other_at, labels[one_at])

    def same(self, a: Axis, b: Axis) -> None:
        """Two axes of one size, index by index."""
        if a in self.of or b in self.of:
            size = len(self.of[a if a in self.of else b])
            index = np.arange(size, dtype=np.int64)
            self.tie(a, index, b, index)

    # -- giving up ------------------------------------------------------------------------

    def pin_units(self, node: Node, labels: Indices, reason: str) -> None:
        """Units that cannot be cut, because of a node."""
        found = np.unique(labels[labels > PINNED])
        if len(found):
            self.reasons.append((node, reason))
            self.parent[np.isin(self.parent, found)] = PINNED
            self._check()

    def pin(self, value: Node, axis: int, reader: Node, reason: str) -> None:
        """All units of an axis of a value cannot be cut, because of ``reader``."""
        labels = self.axis(value, axis)
        if labels is not None:
            self.pin_units(reader, labels, reason)

    def pin_value(self, value: Node, reader: Node, reason: str) -> None:
        """All units of all axes of a value."""
        for axis in self.labelled(value):
            self.pin(value, axis, reader, reason)
