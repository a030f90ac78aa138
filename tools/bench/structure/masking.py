"""Units of a group cut away, and the same units set to zero at all reads, side by side."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import aten
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.prune.cut import cut
from planish.passes.prune.groups import Group, Place, Read


def share_kept(group: Group, share: float, seed: int) -> Tensor:
    """Ascending random units to keep, at least one, and at least one fewer than there are."""
    count = min(max(round(group.size * share), 1), group.size - 1)
    drawn = torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))
    return drawn[:count].sort().values


def without(program: Program, kept: dict[Group, Tensor]) -> Program:
    """A copy of a program with units cut from groups that were found in it."""
    copy = program.clone()
    rewriter = Rewriter(copy, "cut")
    cut(rewriter, {_moved(copy, group): units for group, units in kept.items()})
    return rewriter.finish()


def masked(program: Program, kept: dict[Group, Tensor]) -> Program:
    """A copy of a program with units multiplied by zero at all reads of their groups."""
    copy = program.clone()
    rewriter = Rewriter(copy, "mask")
    products: dict[Node, Node] = {}
    for group, units in kept.items():
        mine = _moved(copy, group)
        for read in mine.reads:
            with rewriter.site("mask-units", read.reader) as allowed:
                if allowed:
                    _mask(rewriter, read.reader, read.value, units, products)
    return rewriter.finish()


def _mask(
    rewriter: Rewriter, reader: Node, place: Place, kept: Tensor, products: dict[Node, Node]
) -> None:
    value = place.node.meta["val"]
    # Whoever masked the reader for another group put a product in front of it.
    current = next(n for n in reader.all_input_nodes if products.get(n, n) is place.node)
    stays = ((place.unit < 0) | torch.isin(place.unit, kept)).to(value.dtype)
    shape = [1] * value.dim()
    shape[place.axis] = len(stays)
    mask = rewriter.constant(stays.reshape(shape), "mask")
    product = rewriter.call(aten.mul.Tensor, (current, mask), like=reader)
    products[product] = place.node
    args = tuple(product if a is current else a for a in reader.args)
    rewriter.set_args(reader, args)


def _moved(copy: Program, group: Group) -> Group:
    """The same group in a copy: nodes keep their names."""
    named = {node.name: node for node in copy.graph.nodes}

    def there(place: Place) -> Place:
        return replace(place, node=named[place.node.name])

    reads = tuple(
        Read(named[r.reader.name], there(r.value), None if r.weight is None else there(r.weight))
        for r in group.reads
    )
    places = tuple(there(place) for place in group.constants)
    return replace(group, constants=places, reads=reads, first=named[group.first.name])
