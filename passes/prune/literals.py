"""The literal sizes in operators' arguments, after some indices of their values are gone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.passes.prune.labels import Axis, sizes_of
from planish.passes.prune.rules_contract import CONVOLUTIONS, channel_axis, is_depthwise
from planish.passes.prune.rules_pointwise import rank, tensors
from planish.passes.prune.rules_shape import SPLITS, slice_bounds

Removed = dict[Axis, NDArray[np.bool_]]  # per axis, which of its indices are gone

_SIZES = {
    aten.view.default: "size",
    aten.reshape.default: "shape",
    aten._unsafe_view.default: "size",
    aten.expand.default: "size",
    aten.repeat.default: "repeats",
    aten.unflatten.int: "sizes",
}


def literals(node: Node, removed: Removed) -> dict[str, Any]:
    """The arguments of a call that must change, by name.

    Args:
        node: a call of the program as it was; types are still the old ones.
        removed: of the program as it was.
    """
    if node.target in _SIZES:
        return _sizes(node, _SIZES[node.target], removed)
    if is_op(node, *SPLITS):
        return _split(node, removed)
    if is_op(node, aten.slice.Tensor):
        return _slice(node, removed)
    if is_op(node, *CONVOLUTIONS) and is_depthwise(node):
        value = node.args[0]
        assert isinstance(value, Node)
        return _if_gone("groups", removed.get((value, channel_axis(node))), 1)
    if is_op(node, aten.group_norm.default):
        value, groups = node.args[0], argument(node, "num_groups")
        assert isinstance(value, Node)
        channels = sizes_of(value)[1]
        return _if_gone("num_groups", removed.get((value, 1)), int(channels) // groups)
    if is_op(node, aten.scaled_dot_product_attention.default):
        return _scale(node, removed)
    return {}


def _if_gone(name: str, gone: NDArray[np.bool_] | None, each: int) -> dict[str, Any]:
    """A number of groups of ``each`` channels that are cut whole."""
    return {} if gone is None else {name: int((~gone).sum()) // each}


def _sizes(node: Node, name: str, removed: Removed) -> dict[str, Any]:
    given = list(argument(node, name))
    operand = tensors(node)[0]
    start = argument(node, "dim") % rank(operand) if is_op(node, aten.unflatten.int) else 0
    changed = False
    for i, size in enumerate(given):
        gone = removed.get((node, start + i))
        if gone is None or not isinstance(size, int) or size == -1:
            continue
        if is_op(node, aten.repeat.default) and size != len(gone):
            continue  # a number of copies of units, not of what is copied to be units
        given[i] = int((~gone).sum())
        changed = True
    return {name: given} if changed else {}


def _split(node: Node, removed: Removed) -> dict[str, Any]:
    dim, sizes = old_sizes(node)
    gone = removed.get((tensors(node)[0], dim))
    if gone is None:
        return {}
    ends = np.cumsum([0, *sizes])
    new = [int((~gone[a:b]).sum()) for a, b in itertools.pairwise(ends)]
    return {"split_size" if is_op(node, aten.split.sizes) else "split_sizes": new}


def old_sizes(node: Node) -> tuple[int, list[int]]:
    """The axis of a split, and the sizes of its pieces, all literal."""
    dim = argument(node, "dim") % rank(tensors(node)[0])
    return dim, [int(piece.shape[dim]) for piece in node.meta["val"]]


def _slice(node: Node, removed: Removed) -> dict[str, Any]:
    operand = tensors(node)[0]
    gone = removed.get((operand, argument(node, "dim") % rank(operand)))
    bounds = slice_bounds(node)
    if gone is None or bounds is None:
        return {}
    start, end = (int((~gone[:bound]).sum()) for bound in bounds)
    return {"start": start, "end": end}


def _scale(node: Node, removed: Removed) -> dict[str, Any]:
    """What scores are divided by stays what it was."""
    query = node.args[0]
    assert isinstance(query, Node)
    last = rank(query) - 1
    if (query, last) not in removed or argument(node, "scale") is not None:
        return {}
    return {"scale": 1 / math.sqrt(len(removed[query, last]))}
