"""Which products of attention heads can be written in fewer dimensions, and why others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op, op_name
from planish.ir.program import Program
from planish.passes.prune.groups import Group
from planish.passes.quantize.where import ATTENTION

_LAYOUT = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int,
    aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default,
    aten.unsqueeze.default, aten.expand.default, aten.flatten.using_ints,
)  # fmt: skip
_SPLITS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor,
    aten.select.int, aten.unbind.int,
)  # fmt: skip


class RefusedError(Exception):
    """Why a product is left as it is."""


@dataclass(frozen=True)
class HeadProduct:
    """Two linears that share the dimensions of heads: query and key, or value and output."""

    attention: Node
    first: Node
    second: Node
    group: Group
    scores: bool
    width: int
    heads: int  # of the query
    shared: int  # of key and value


def scores_of(program: Program, node: Node, groups: Sequence[Group]) -> HeadProduct:
    """Query and key of an attention.

    Raises:
        RefusedError: why their dimensions cannot be turned.
    """
    query, key = (_projection(program, node.args[i], w) for i, w in ((0, "query"), (1, "key")))
    return _product(node, query, key, groups, scores=True)


def values_of(program: Program, node: Node, groups: Sequence[Group]) -> HeadProduct:
    """Value and output of an attention.

    Raises:
        RefusedError: why their dimensions cannot be turned.
    """
    value = _projection(program, node.args[2], "value")
    output: Any = node
    while is_op(output, ATTENTION, *_LAYOUT) and len(output.users) == 1:
        output = next(iter(output.users))
    if not is_op(output, aten.linear.default):
        raise RefusedError(f"its result is not read by one linear alone, but by {output.name}")
    _owned(program, output, "output")
    return _product(node, value, output, groups, scores=False)


def _projection(program: Program, value: Any, what: str) -> Node:  # noqa: ANN401 - an operand
    node = value
    while is_op(node, *_LAYOUT):
        node = node.args[0]
    if is_op(node, aten.linear.default):
        return _owned(program, node, what)
    if "getitem" in str(node.target) or is_op(node, *_SPLITS):
        raise RefusedError(f"the {what} comes from a weight that others are fused with")
    raise RefusedError(
        f"{op_name(node.target)} stands between the {what}'s projection and the attention (rotary "
        "positions, a norm), so its dimensions may not be turned"
    )


def _owned(program: Program, linear: Node, what: str) -> Node:
    for name in ("weight", "bias"):
        operand = argument(linear, name)
        if operand is not None and (program.constant(operand) is None or len(operand.users) > 1):
            raise RefusedError(f"the {what}'s {name} is shared, or no constant")
    return linear


def _product(
    node: Node, first: Node, second: Node, groups: Sequence[Group], *, scores: bool
) -> HeadProduct:
    if argument(node, "dropout_p"):
        raise RefusedError("dropout is on")
    mine = [(o, 0) for o in (argument(first, "weight"), argument(first, "bias")) if o is not None]
    mine += [(argument(second, "weight"), 0 if scores else 1)]
    if scores and argument(second, "bias") is not None:
        mine.append((argument(second, "bias"), 0))
    for group in groups:
        if group.kind == "head-dims" and {(p.node, p.axis) for p in group.constants} == set(mine):
            break
    else:
        raise RefusedError("its dimensions of heads are coupled with more than two projections")
    width = group.size
    for place in group.constants:
        if not torch.equal(place.unit, torch.arange(len(place.unit)) % width):
            raise RefusedError("its heads do not lie behind each other")
    units = {p.node: len(p.unit) // width for p in group.constants}
    shared = units[argument(second if scores else first, "weight")]
    heads = units[argument(first if scores else second, "weight")]
    if shared > 1 and heads > shared:
        wide = argument(first if scores else second, "weight")
        _in_order(groups, wide, 0 if scores else 1, width * (heads // shared))
    return HeadProduct(node, first, second, group, scores, width, heads, shared)


def _in_order(groups: Sequence[Group], weight: Node, axis: int, rows: int) -> None:
    """Heads that share a key must lie behind each other."""
    for group in groups:
        for place in group.constants if group.kind == "heads" else ():
            if place.node is weight and place.axis == axis:
                if torch.equal(place.unit, torch.arange(len(place.unit)) // rows):
                    return
    raise RefusedError("which query heads share a key is not known")
