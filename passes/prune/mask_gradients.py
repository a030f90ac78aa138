"""Gradients of the loss by a mask on each unit, batch after batch.

A mask of ones multiplies every value that a group's units are summed from, at the reads alone; its
gradient at a unit is the sum over the reads of ``<dL/dX, X>`` on what belongs to it. Batches of one
sample give the Fisher information of the textbook, larger ones the cheaper one of the paper's code.

Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022,
section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.ops import aten
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.prune.groups import Group, Place
from planish.passes.sparsify.gradients import gradients

RULE = "mask-units"


def mask_gradients(
    program: Program,
    groups: Sequence[Group],
    context: PassContext,
    *,
    limit: int | None = None,
) -> Iterator[dict[Group, Tensor]]:
    """One gradient by the mask of each group for each labeled batch.

    Args:
        program: is not changed.
        groups: of it.
        context: holds ``labeled`` and ``loss``.
        limit: batches read at most; None for all.

    Yields:
        For each group float64 ``[units]``; zeros for one that nothing reads.

    Raises:
        RequirementError: there are no labeled batches, or there is no loss.
        UsageError: a batch does not fit the program, the loss is no finite scalar or does not
            depend on the units, or a gradient is not finite; names the batch.
    """
    masked, masks = _masked(program, groups)
    for found in gradients(masked, list(masks), context, limit=limit):
        result = {g: torch.zeros(g.size, dtype=torch.float64) for g in groups}
        for name, (group, unit) in masks.items():
            mine = unit >= 0
            result[group].index_add_(0, unit[mine], found[name].flatten().double()[mine])
        yield result


def _masked(
    program: Program, groups: Sequence[Group]
) -> tuple[Program, dict[str, tuple[Group, Tensor]]]:
    """A copy with masks of ones at all reads: name of each mask -> its group and its units."""
    copy = program.clone()
    now: dict[Node, Node] = dict(
        zip(program.graph.nodes, copy.graph.nodes, strict=True)
    )  # clones keep the order
    rewriter = Rewriter(copy, "mask-gradients")
    read_as: dict[tuple[Node, Node], Node] = {}
    masks: list[tuple[Node, Group, Tensor]] = []
    for group in groups:
        done: set[tuple[Node, Node, int]] = set()
        for read in group.reads:
            key = (read.reader, read.value.node, read.value.axis)
            if key in done:
                continue
            done.add(key)
            reader, pair = now[read.reader], (read.reader, read.value.node)
            value = read_as[pair] if pair in read_as else now[read.value.node]
            mask, read_as[pair] = _mask(rewriter, reader, value, read.value, len(masks))
            masks.append((mask, group, read.value.unit))
    masked = rewriter.finish()
    return masked, {str(mask.target): (group, unit) for mask, group, unit in masks}


def _mask(
    rewriter: Rewriter, reader: Node, value: Node, place: Place, number: int
) -> tuple[Node, Node]:
    """Put a mask between a value and one of its readers; the mask and the product."""
    held: Tensor = value.meta["val"]
    with rewriter.site(RULE, reader) as allowed:
        assert allowed  # no one else counts the sites of this copy
        shape = [1] * held.dim()
        shape[place.axis] = len(place.unit)
        mask = rewriter.constant(torch.ones(shape, dtype=held.dtype), f"unit_mask_{number}")
        product = rewriter.call(aten.mul.Tensor, (value, mask), like=value)
        args, kwargs = map_arg((reader.args, reader.kwargs), lambda n: product if n is value else n)
        rewriter.set_args(reader, args, kwargs)
    return mask, product
