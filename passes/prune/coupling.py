"""Axis coupling: what must be cut together, found from every operator that makes channels.

From each seed (the result of a linear, a convolution, an embedding, or a piece of one that is
split) ties grow in both directions until nothing more follows. Where a reshape lets the units lie
along several axes (heads, or what is in a head) each choice makes a group of its own. What pins
units is said: nothing here ever gives a group whose cut would not fit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import argument, aten, is_op
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.passes.prune.describe import kind_of, name_of
from planish.passes.prune.groups import Group, Place, Read
from planish.passes.prune.labels import (
    CHOICES,
    NONE,
    PINNED,
    AllPinnedError,
    AmbiguousReshapeError,
    Axis,
    Indices,
    Labels,
    sizes_of,
)
from planish.passes.prune.propagate import grow
from planish.passes.prune.rules_contract import (
    CONVOLUTIONS,
    PRODUCTS,
    TRANSPOSED,
    channel_axis,
    contraction,
)
from planish.passes.prune.rules_pointwise import rank
from planish.passes.prune.rules_shape import SPLITS
from planish.passes.quantize.where import EVERYWHERE, Where

RULE = "prune-group"
_WRITERS = (aten.linear.default, aten.addmm.default, aten.embedding.default, *PRODUCTS)


class _RefusedError(Exception):
    """No group grows from a seed: what stands in the way, and where."""

    def __init__(self, node: Node, reason: str):
        super().__init__(reason)
        self.node, self.reason = node, reason


def find_groups(program: Program, where: Where = EVERYWHERE) -> tuple[list[Group], list[Refusal]]:
    """Every group of units that can be cut from a program.

    Args:
        program: is not edited.
        where: only groups whose producers (all that make their units) are chosen.

    Returns:
        The groups, in the order of their producers, and why other channels cannot be cut.
    """
    where.check(program)
    found: list[tuple[Group, dict[Axis, Indices]]] = []
    refused: dict[str, Refusal] = {}
    covered: dict[Axis, NDArray[np.bool_]] = {}
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    for node, axis in _seeds(program):
        size = sizes_of(node)[axis]
        seen = covered.get((node, axis))
        if not isinstance(size, int) or size < 2 or (seen is not None and seen.all()):
            continue
        for outcome in _outcomes(program, node, axis, size):
            if isinstance(outcome, _RefusedError):
                reason = f"{outcome.reason} ({outcome.node.name})"
                refused.setdefault(node.name, Refusal(RULE, node.name, reason, source_line(node)))
                continue
            _add(found, outcome, covered)
    groups = [group for group, _ in found]
    taken = [g for g in groups if all(where.takes(n) for n in writers(g))]
    kept = {node.name for _, axes in found for node, _ in axes}
    taken.sort(key=lambda g: place[g.first])
    return taken, [r for name, r in refused.items() if name not in kept]


def writers(group: Group) -> list[Node]:
    """The operators that make a group's units: their weights lose rows, not columns."""
    readers = {(r.reader, r.weight.node) for r in group.reads if r.weight is not None}
    found = dict.fromkeys(
        user
        for place in group.constants
        for user in place.node.users
        if is_op(user, *_WRITERS, *CONVOLUTIONS, *TRANSPOSED) and (user, place.node) not in readers
    )
    return list(found) or [group.first]


def _seeds(program: Program) -> Iterator[Axis]:
    """Pieces of split values first: a whole one would tie what can be cut apart."""
    nodes = list(program.graph.nodes)
    for node in nodes:
        if is_op(node, operator.getitem) and is_op(node.args[0], *SPLITS):
            split = node.args[0]
            yield node, _dim(split) % rank(node)
        elif is_op(node, aten.slice.Tensor):
            yield node, _dim(node) % rank(node)
    for node in nodes:
        if is_op(node, *_WRITERS) and rank(node) and _has_constant(node):
            yield node, rank(node) - 1
        elif is_op(node, *CONVOLUTIONS, *TRANSPOSED):
            yield node, channel_axis(node)


def _dim(node: Node) -> int:
    return int(argument(node, "dim"))


def _has_constant(node: Node) -> bool:
    return any(n.op == "get_attr" for n in node.all_input_nodes)


def _outcomes(
    program: Program, node: Node, axis: int, size: int
) -> Iterator[tuple[Group, dict[Axis, Indices]] | _RefusedError]:
    """What grows from a seed, by every choice at its reshapes."""
    pending: list[Mapping[tuple[Node, int], tuple[int, int]]] = [{}]
    tried = 0
    while pending and tried < CHOICES:
        choices = pending.pop(0)
        tried += 1
        seed = np.arange(1, size + 1, dtype=np.int64)
        try:
            labels = grow(program, [(node, axis, seed)], size, choices)
            yield _group(program, labels, node)
        except AmbiguousReshapeError as ambiguous:
            pending += [{**choices, ambiguous.key: option} for option in ambiguous.options]
        except AllPinnedError as pinned:
            yield _RefusedError(*pinned.reasons[-1])
        except _RefusedError as refused:
            yield refused


def _group(program: Program, labels: Labels, seed: Node) -> tuple[Group, dict[Axis, Indices]]:
    """The group of what has grown.

    Raises:
        _RefusedError: it has one unit only, or no weights.
    """
    roots = np.unique(labels.parent[1:])
    roots = roots[roots != PINNED]
    number = np.full(len(labels.parent) + 1, NONE, dtype=np.int64)
    number[roots] = np.arange(len(roots))  # the last stays NONE, for what is of no unit
    axes = {a: number[labels.roots(held)] for a, held in labels.of.items()}
    axes = {a: unit for a, unit in axes.items() if (unit >= 0).any()}
    if len(roots) < 2:
        node, reason = labels.reasons[-1] if labels.reasons else (seed, "")
        raise _RefusedError(node, reason or "all its channels are tied to each other")
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    axes = dict(sorted(axes.items(), key=lambda item: (order[item[0][0]], item[0][1])))
    constants = tuple(_place(a, u) for a, u in axes.items() if a[0].op == "get_attr")
    reads = tuple(_reads(axes))
    first = next((n for n, _ in axes if _writes(n)), seed)
    size = len(roots)
    if not constants:
        raise _RefusedError(first, "no weights belong to its units")
    kind = kind_of(axes)
    name = name_of(first, kind, size, axes)
    return Group(name, kind, size, constants, reads, True, first), axes


def _writes(node: Node) -> bool:
    return is_op(node, *_WRITERS, *CONVOLUTIONS, *TRANSPOSED) and _has_constant(node)


def _place(axis: Axis, unit: Indices) -> Place:
    return Place(axis[0], axis[1], torch.from_numpy(unit.copy()))


def _reads(axes: Mapping[Axis, Indices]) -> Iterator[Read]:
    readers = dict.fromkeys(user for node, _ in axes for user in node.users)
    for reader in readers:
        found = contraction(reader)
        if found is None or (found.value, found.axis) not in axes:
            continue
        held = (found.value, found.axis), (found.weight, found.weight_axis)
        value, weight = (_place(a, axes[a]) for a in held)
        if found.weight.op == "get_attr":
            yield Read(reader, value, weight)
        elif found.value.op == "get_attr":
            yield Read(reader, weight, value)
        else:
            yield Read(reader, value, None)


def _add(
    found: list[tuple[Group, dict[Axis, Indices]]],
    new: tuple[Group, dict[Axis, Indices]],
    covered: dict[Axis, NDArray[np.bool_]],
) -> None:
    """Add a group, unless it or a finer one of the same places is there; it may oust coarser."""
    for other in list(found):
        if other[1].keys() == new[1].keys():
            if _coarser(new[1], other[1]):
                return
            if _coarser(other[1], new[1]):
                found.remove(other)
    found.append(new)
    for axis, unit in new[1].items():
        # Indices that share a unit may be cut otherwise as well: within heads, say.
        alone = np.bincount(unit[unit >= 0], minlength=new[0].size)[unit] == 1
        before = covered.get(axis, np.zeros(len(unit), dtype=np.bool_))
        covered[axis] = before | ((unit >= 0) & alone)


def _coarser(a: Mapping[Axis, Indices], b: Mapping[Axis, Indices]) -> bool:
    """Whether the units of ``a`` are unions of units of ``b``, at all the same places."""
    into: dict[int, int] = {}
    for axis, unit in a.items():
        if ((unit >= 0) != (b[axis] >= 0)).any():
            return False
        for mine, theirs in np.unique(np.stack([unit, b[axis]]), axis=1).T:
            if into.setdefault(int(theirs), int(mine)) != mine:
                return False
    return True
