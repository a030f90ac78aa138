"""How units pass a reshape: axes are split and merged in blocks that hold the same elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy
from torch import SymInt
from torch.fx import Node

from planish.ir.ops import aten, is_op
from planish.passes.prune.labels import (
    PINNED,
    AmbiguousReshapeError,
    Indices,
    Labels,
    shape_of,
)
from planish.passes.prune.rules_pointwise import rule, tensors

Block = tuple[tuple[int, int], tuple[int, int]]  # axes [from, to) of the operand, of the result
_LARGEST = 1 << 22  # elements of a block; more is no axis of units


def _expression(size: int | SymInt) -> Any:  # noqa: ANN401 - sympy is untyped
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _products(shape: Sequence[int | SymInt]) -> list[Any]:
    products = [sympy.Integer(1)]
    for size in shape:
        products.append(sympy.expand(products[-1] * _expression(size)))
    return products


def blocks(before: Sequence[int | SymInt], after: Sequence[int | SymInt]) -> list[Block]:
    """The smallest runs of axes that hold the same elements on both sides."""
    ours, theirs = _products(before), _products(after)
    found: list[Block] = []
    start = (0, 0)
    for i in range(1, len(ours)):
        for j in range(start[1] + 1, len(theirs)):
            if ours[i] == theirs[j]:
                found.append(((start[0], i), (start[1], j)))
                start = (i, j)
                break
    if start != (len(before), len(after)):
        # What is left is of size 1 on one side, or of one element: it joins the last block.
        (a, _), (b, _) = found.pop() if found else ((0, 0), (0, 0))
        found.append(((a, len(before)), (b, len(after))))
    return found


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.reshape_as.default,
    aten.view_as.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def reshape(node: Node, labels: Labels) -> None:
    """Tie the axes of each block."""
    operand = tensors(node)[0]
    before, after = shape_of(operand), shape_of(node)
    assert before is not None
    assert after is not None
    if is_op(node, aten.reshape_as.default, aten.view_as.default):
        other = tensors(node)[-1]
        for axis in range(len(after)):
            labels.same((node, axis), (other, axis))
    for number, ((a, b), (c, d)) in enumerate(blocks(before, after)):
        _block(node, operand, number, (range(a, b), range(c, d)), labels)


def _block(
    node: Node, operand: Node, number: int, axes: tuple[range, range], labels: Labels
) -> None:
    before, after = shape_of(operand), shape_of(node)
    assert before is not None
    assert after is not None
    shapes = before, after
    values = (operand, node)
    held = [[i for i in axes[s] if (values[s], i) in labels.of] for s in (0, 1)]
    if not any(held):
        return
    wide = [[i for i in axes[s] if shapes[s][i] != 1] for s in (0, 1)]
    reason = _obstacle([[shapes[s][i] for i in wide[s]] for s in (0, 1)], held)
    if any(i not in wide[s] for s in (0, 1) for i in held[s]):
        reason = "its units lie along an axis of a single index"
    if reason is not None:
        for side in (0, 1):
            for i in held[side]:
                labels.pin(values[side], i, node, reason)
        return
    sizes = [[int(shapes[s][i]) for i in wide[s]] for s in (0, 1)]
    sides = [held[s] or _not_expanded(values[s], wide[s]) for s in (0, 1)]
    options = [(i, j) for i in sides[0] for j in sides[1]]
    grids = [_grid(wide[s], sizes[s]) for s in (0, 1)]
    chosen = labels.choices.get((node, number))
    if chosen not in options:
        chosen = options[0] if len(options) == 1 else None
    if chosen is None:
        chosen = next(
            (o for o in options if _fits(labels, values, o, (grids[0][o[0]], grids[1][o[1]]))),
            None,
        )
    if chosen is None:
        raise AmbiguousReshapeError((node, number), options)
    i, j = chosen
    pairs = np.unique(np.stack([grids[0][i], grids[1][j]]), axis=1)
    labels.tie((operand, i), pairs[0], (node, j), pairs[1])


def _obstacle(sizes: list[list[int | SymInt]], held: list[list[int]]) -> str | None:
    if any(not isinstance(s, int) for side in sizes for s in side):
        return "a reshape mixes its units with an axis of dynamic size"
    if len(held[0]) > 1 or len(held[1]) > 1:
        return "a reshape merges several axes of its units"
    if not sizes[0] or not sizes[1] or math.prod(int(s) for s in sizes[0]) > _LARGEST:
        return "a reshape of an axis that is no axis of units"
    return None


def _not_expanded(value: Node, axes: list[int]) -> list[int]:
    """The axes along which a value is no mere copy: units are what is copied."""
    if not is_op(value, aten.expand.default):
        return axes
    before, count = shape_of(value.args[0]), len(shape_of(value) or ())  # type: ignore[arg-type]  # operands of a call are what its schema says
    assert before is not None
    own = [i for i in axes if i >= count - len(before) and before[i - count + len(before)] != 1]
    return own or axes


def _grid(axes: list[int], sizes: list[int]) -> dict[int, Indices]:
    """The index along each axis of every element of a block, in order."""
    every = np.indices(sizes, dtype=np.int64).reshape(len(sizes), -1)
    return {axis: every[i] for i, axis in enumerate(axes)}


def _fits(
    labels: Labels, values: tuple[Node, Node], option: tuple[int, int], at: tuple[Indices, Indices]
) -> bool:
    """Whether the units lie along an axis as they are, none merged."""
    for one, other in ((0, 1), (1, 0)):
        mine = labels.axis(values[one], option[one])
        if mine is None:
            continue
        theirs = np.full(int(at[other].max()) + 1, PINNED, dtype=np.int64)
        theirs[at[other]] = mine[at[one]]
        if (theirs[at[other]] != mine[at[one]]).any() or len(np.unique(mine)) < 2:
            return False
    return True
