"""Kept units of a group made to stand for all: a matrix folded into everything that reads them.

A read sums over the units. If the activations are ``Z ~ Z[:, kept] T``, then ``Z W^T`` is
``Z[:, kept] (W T^T)^T``: the weights of the kept units become ``W T^T``, those of the others zero,
after which ``cut`` may take the others away and nothing changes. A unit that owns several columns
(a channel of a flattened picture) has all of them folded alike, by T x I. At a convolution that
happens at every tap. All reads are folded, or none.

Source: Chee et al., "Model Preserving Compression for Neural Networks", NeurIPS 2022, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError
from planish.ir.ops import argument, aten, is_op, op_name
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.prune.groups import Group, Place, Read
from planish.passes.rounding.targets import CONVOLUTIONS

RULE = "fold-units"


@dataclass(frozen=True, eq=False)
class Fold:
    """What stands for the units of a group.

    Attributes:
        kept: int64 ``[k]``, ascending.
        matrix: T, ``[k, units]``; a diagonal at the kept columns merely scales. ``[c, k, units]``
            for a T of its own at each of the c columns that a unit owns.
        constant: ``[units]``, or ``[c, units]``, added to the activations, into the readers'
            biases; or None.
    """

    kept: Tensor
    matrix: Tensor
    constant: Tensor | None = None


def columns_of(place: Place, size: int) -> Tensor | None:
    """The indices of every unit on the axis of a place, int64 ``[size, c]``.

    None where units own different numbers of indices, or one owns none.
    """
    order = torch.argsort(place.unit, stable=True)
    order = order[int((place.unit < 0).sum()) :]
    counts = torch.bincount(place.unit[order], minlength=size)
    if len(counts) != size or not int(counts.min()) or int(counts.min()) != int(counts.max()):
        return None
    return order.reshape(size, -1)


def problem(program: Program, group: Group, *, constant: bool = False) -> str | None:
    """Why nothing can be folded into the reads of a group; None where it can.

    Args:
        program: holds the group.
        group: what is to be folded into.
        constant: whether biases are to take in a constant.
    """
    if not group.reads:
        return "nothing reads its units"
    readers = {read.reader for read in group.reads}
    for read in group.reads:
        name = f"{op_name(read.reader.target)} {read.reader.name}"
        if read.weight is None or program.constant(read.weight.node) is None:
            return f"{name} multiplies its units by no constant, which could be corrected"
        others = [user for user in read.weight.node.users if user not in readers]
        if others:
            return f"{op_name(others[0].target)} reads the weight of {name} as well"
        if any(_same(read.weight, place) for place in _written(group)):
            return f"the weight of {name} is also what makes the units"
        for place in (read.weight, read.value):
            if columns_of(place, group.size) is None:
                return f"its units have unequal numbers of columns at {name}"
        if constant and (reason := _no_bias(program, read.reader)):
            return f"{name} {reason}"
    return None


def unfit(program: Program, group: Group) -> str | None:
    """Why the units of a group cannot be made up by one another; None where they can."""
    if group.kind == "heads":
        return "whole heads have no directions in common to make one from others by"
    if group.size < 2:
        return "it is a single unit"
    return problem(program, group)


def _written(group: Group) -> list[Place]:
    read = [r.weight for r in group.reads if r.weight is not None]
    return [p for p in group.constants if not any(_identical(p, w) for w in read)]


def _identical(a: Place, b: Place) -> bool:
    return a.node is b.node and a.axis == b.axis and torch.equal(a.unit, b.unit)


def _same(a: Place, b: Place) -> bool:
    return a.node is b.node and a.axis == b.axis


def _no_bias(program: Program, reader: Node) -> str | None:
    """Why a constant cannot go through a reader into its bias."""
    if is_op(reader, *CONVOLUTIONS):
        padding = argument(reader, "padding")
        zero = padding == "valid" or (not isinstance(padding, str) and not any(_numbers(padding)))
        if not zero:
            return "pads with zeros, which are no constant"
    elif not is_op(reader, aten.linear.default):
        return "has no bias of its own to take in a constant"
    bias = argument(reader, "bias")
    if program.constant(bias) is None or len(bias.users) > 1:
        return "has no bias of its own to take in a constant"
    if len(reader.args[1].users) > 1:  # type: ignore[union-attr]  # a linear's weight is a node
        return "shares its weight, so that a constant would go into several biases"
    return None


def _numbers(value: object) -> list[int]:
    return [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]  # operands of a call are what its schema says


def fold(rewriter: Rewriter, folds: Mapping[Group, Fold]) -> dict[Group, Tensor]:
    """Fold into all reads of all these groups.

    Constants are replaced, so that groups found before name nodes which are gone: go on with those
    that are returned.

    Args:
        rewriter: of the program that holds the groups.
        folds: by group.

    Returns:
        The same groups on the new constants, each with its kept units, as ``cut`` takes them.

    Raises:
        PassError: a group cannot be folded into; ask ``problem`` first.
    """
    for group, given in folds.items():
        reason = problem(rewriter.program, group, constant=given.constant is not None)
        if reason is not None:
            raise PassError(f"{group.name}: {reason}", where=group.first)
    moved: dict[Node, Node] = {}
    for group, given in folds.items():
        done: set[tuple[Node, int]] = set()
        for read in group.reads:
            assert read.weight is not None  # problem() has looked
            place = _moved(read.weight, moved)
            if (place.node, place.axis) in done:
                continue  # one weight, read twice
            new = _fold_read(rewriter, group, replace(read, weight=place), given, moved)
            done.add((new, place.axis))
    return {_on(group, moved): given.kept for group, given in folds.items()}


def _moved(place: Place, moved: Mapping[Node, Node]) -> Place:
    node = place.node
    while node in moved:
        node = moved[node]
    return replace(place, node=node)


def _on(group: Group, moved: Mapping[Node, Node]) -> Group:
    reads = tuple(
        replace(r, weight=_moved(r.weight, moved)) if r.weight is not None else r
        for r in group.reads
    )
    return replace(group, constants=tuple(_moved(p, moved) for p in group.constants), reads=reads)


def _fold_read(
    rewriter: Rewriter, group: Group, read: Read, given: Fold, moved: dict[Node, Node]
) -> Node:
    """Replace the weight of one read, and its bias; returns the weight's new node."""
    place, reader = read.weight, read.reader
    assert place is not None
    weight = rewriter.program.constant(place.node)
    columns = columns_of(place, group.size)
    assert weight is not None
    assert columns is not None
    matrix = given.matrix.double()
    new = place.node
    with rewriter.site(RULE, reader) as allowed:
        if allowed:
            k, top = len(given.kept), float(matrix.abs().max())
            rewriter.note(f"{group.name}: {k} stand for {group.size}, max |T| {top:.3g}")
            rewriter.insert_before(place.node)
            name = str(place.node.target)
            value = folded(weight, place.axis, columns, given.kept, matrix)
            new = moved[place.node] = rewriter.constant(value, name, like=place.node)
            if given.constant is not None:
                added = _through(weight, place.axis, columns, given.constant)
                _add_constant(rewriter, reader, added, moved)
            rewriter.replace(place.node, new)
    return new


def folded(weight: Tensor, axis: int, columns: Tensor, kept: Tensor, matrix: Tensor) -> Tensor:
    """A weight whose kept units stand for all, and whose others are zero.

    Args:
        weight: of any shape.
        axis: of the units.
        columns: ``[units, c]`` of that axis.
        kept: ``[k]``.
        matrix: ``[k, units]``, or one for each column, ``[c, k, units]``.
    """
    last = weight.double().movedim(axis, -1)
    every = matrix.double().expand(columns.shape[1], *matrix.shape[-2:])
    sums = torch.einsum("...uc,cku->...kc", last[..., columns], every)
    new = last.clone()
    new[..., columns.flatten()] = 0
    new[..., columns[kept].flatten()] = sums.flatten(-2)
    return new.movedim(-1, axis).to(weight.dtype).contiguous()


def _through(weight: Tensor, axis: int, columns: Tensor, constant: Tensor) -> Tensor:
    """What a constant of the units adds to each output, ``[outputs]``: axis 0 of the weight."""
    last = weight.double().movedim(axis, -1)[..., columns]
    every = constant.double().expand(columns.shape[1], constant.shape[-1])
    added = torch.einsum("...uc,cu->...", last, every)
    return added.flatten(1).sum(1) if added.dim() > 1 else added


def _add_constant(rewriter: Rewriter, reader: Node, added: Tensor, moved: dict[Node, Node]) -> None:
    bias = argument(reader, "bias")
    held = rewriter.program.constant(bias)
    assert held is not None  # problem() has looked
    rewriter.insert_before(bias)
    value = (held.double() + added).to(held.dtype)
    moved[bias] = rewriter.constant(value, str(bias.target), like=bias)
    rewriter.replace(bias, moved[bias])
