"""The weights of a program that can be made sparse, as matrices, and the rewrite itself.

A weight is found by its readers as for rounding: linears, matrix products with a constant right
side (their weight is transposed), convolutions. A layer of several groups is several matrices, one
below the other; all share the columns' meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError, source_line
from planish.ir.ops import argument, aten, is_op
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.quantize.weights import decibels
from planish.passes.quantize.where import Where
from planish.passes.rounding.targets import Weight, find_weights
from planish.passes.sparsify.patterns import Pattern

RULE = "sparsify-weight"


@dataclass(frozen=True)
class Site:
    """A weight to be made sparse.

    Attributes:
        weight: the constant and its readers.
        groups: of a convolution; its rows are that many matrices one below the other.
        window: taps of a convolution, 1 for all else.
    """

    weight: Weight
    groups: int
    window: int

    @property
    def name(self) -> str:
        """Of the constant."""
        return self.weight.name

    @property
    def reader(self) -> Node:
        """The first operator that multiplies by it."""
        return self.weight.products[0]

    def rows(self, like: Tensor | None = None) -> Tensor:
        """The weight, or anything of its shape, as ``[outputs, inputs]``, channels innermost."""
        rows = self.weight.as_rows(self.weight.value if like is None else like)
        ordered: Tensor = rows.unflatten(1, (-1, self.window)).transpose(1, 2).flatten(1)
        return ordered

    def from_rows(self, rows: Tensor) -> Tensor:
        """``[outputs, inputs]`` in the shape of the weight."""
        taps_last = rows.unflatten(1, (self.window, -1)).transpose(1, 2).flatten(1)
        return self.weight.from_rows(taps_last)

    def columns(self, h: Tensor) -> Tensor:
        """``H [.., inputs, inputs]`` of windows, in the order of the columns of ``rows``."""
        if self.window == 1:
            return h
        order = torch.arange(h.shape[-1]).unflatten(0, (-1, self.window)).t().flatten()
        return h[..., order, :][..., order]


def find_sites(
    program: Program, pattern: Pattern, where: Where, *, tied: bool = False
) -> tuple[list[Site], list[Refusal]]:
    """Weights that can have a pattern, in the order of their first readers, and why others cannot.

    Args:
        program: where to look.
        pattern: what they are to have.
        where: a choice among the operators.
        tied: whether a table that is also the weight of a product counts.
    """
    weights, refusals = find_weights(program, embeddings=True, convolutions=True, where=where)
    sites = []
    for weight in weights:
        if not weight.products:
            continue  # a table of rows to be looked up: nothing is summed over
        site, problem = _site(program, weight, pattern, tied)
        if problem is None:
            sites.append(site)
        else:
            reader = weight.products[0]
            refusals.append(Refusal(RULE, reader.name, problem, source_line(reader)))
    return sites, refusals


def _site(
    program: Program, weight: Weight, pattern: Pattern, tied: bool
) -> tuple[Site, str | None]:
    groups = window = 1
    if weight.is_convolution:
        groups = int(argument(weight.products[0], "groups"))
        window = weight.value.shape[2:].numel()
    site = Site(weight, groups, window)
    if weight.name in program.layouts:
        return site, f"it is {program.layouts[weight.name]} already"
    if not tied and any(is_op(r, aten.embedding.default) for r in weight.readers):
        return site, "its rows are looked up as well (a tied embedding): tied=true takes it"
    rows = site.rows()
    return site, pattern.problem(len(rows) // groups, rows.shape[1], window)


def required(sites: list[Site], refusals: list[Refusal], pattern: Pattern) -> list[Site]:
    """The sites.

    Raises:
        PassError: there are none, so that the pass would have no effect.
    """
    if not sites:
        why = f": {refusals[0].node}: {refusals[0].reason}" if refusals else ""
        raise PassError(
            f"sparsify found no weight for {pattern}{why}",
            hint="weights are constants read by linears, convolutions or constant matrix products",
        )
    return sites


def write_rows(
    rewriter: Rewriter, site: Site, rows: Tensor, kept: Tensor, pattern: Pattern, note: str = ""
) -> bool:
    """Replace a weight by a sparse one, typed as such; False where the rewrite was denied.

    Args:
        rewriter: of the program.
        site: the weight.
        rows: its new numbers, ``[outputs, inputs]``.
        kept: the mask; what is not in it becomes zero here.
        pattern: what the mask has.
        note: for the change.
    """
    weight = site.weight
    with rewriter.site(RULE, weight.readers[0]) as allowed:
        if not allowed:
            return False
        dtype = weight.value.dtype
        value = site.from_rows(torch.where(kept, rows, 0)).to(dtype)
        like = weight.sources[0] if "stack_trace" in weight.sources[0].meta else site.reader
        layout = pattern.layout(kept, weight.in_axis)
        new = rewriter.constant(value, weight.name, like=like, layout=layout)
        loss = decibels(weight.value.float(), value.float())
        rewriter.note(f"{weight.name} to {layout}: {loss:.1f} dB" + (f"; {note}" if note else ""))
        for source in weight.sources:
            rewriter.replace(source, new)
    return True
