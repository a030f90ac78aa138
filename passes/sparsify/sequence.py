"""Prune the layers of a program one after another, each by what it reads by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.observe.feeding import required as required_spool
from planish.passes.rounding.layerwise import tied_grams
from planish.passes.rounding.lockstep import Lockstep, gram, operand_key
from planish.passes.sparsify.methods import LayerMethod, Pruned, Task
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import Site, write_rows


class Inputs:
    """``H`` of one layer after another, as the layers before it have become.

    Args:
        rewriter: of the program.
        sites: all of them, in program order.
        context: holds the calibration.
        padding_mask: input that is 0 for padding, or "".

    Raises:
        RequirementError: there is no calibration.
    """

    def __init__(
        self, rewriter: Rewriter, sites: Sequence[Site], context: PassContext, padding_mask: str
    ):
        required_spool(context.calibration)
        assert context.calibration is not None
        self._tied = tied_grams(rewriter, [s.weight for s in sites], context, padding_mask)
        self._state = Lockstep(rewriter.program, context.calibration, padding_mask)
        self._key: object = None
        self._last: Tensor = torch.empty(0)
        self._known: list[dict[str, Any]] = []

    def of(self, site: Site) -> tuple[Tensor, list[dict[str, Any]]]:
        """``[groups, inputs, inputs]`` in the order of the site's columns, and what is known of it.

        Sites must be asked for in program order.
        """
        if site.name in self._tied:
            h = site.columns(self._tied[site.name])
            return h, [{} for _ in h]
        self._state.advance(site.reader)
        key = operand_key(site.reader)
        if key != self._key:
            self._last, self._known = torch.empty(0), []  # not beside the next one
            h = site.columns(gram(self._state.inputs_of(site.reader), site.reader))
            self._key, self._last, self._known = key, h, [{} for _ in h]
        return self._last, self._known


def prune_in_sequence(
    rewriter: Rewriter,
    sites: Sequence[Site],
    context: PassContext,
    pattern: Pattern,
    ratios: Mapping[str, float],
    method: LayerMethod,
    *,
    reads_inputs: bool,
    damping: float | None = None,
    padding_mask: str = "",
    refit: int = 0,
) -> None:
    """Prune weights in program order; every layer reads what the pruned ones before it give.

    Args:
        rewriter: of the program.
        sites: in the order of their first readers.
        context: holds the calibration where the method reads inputs; told of every weight.
        pattern: what the weights are to have.
        ratios: by name of weight, the share that goes; a weight of ratio 0 stays as it is.
        method: prunes one matrix.
        reads_inputs: whether it wants ``H``.
        damping: for the method.
        padding_mask: input that is 0 for padding, or "".
        refit: for the method.

    Raises:
        RequirementError: there is no calibration, and the method wants it.
    """
    inputs = Inputs(rewriter, sites, context, padding_mask) if reads_inputs else None
    for done, site in enumerate(sites):
        context.tell(done, len(sites))
        if not ratios[site.name]:
            continue
        h, known = (None, None) if inputs is None else inputs.of(site)
        rows, kept, note = _pruned(
            site, h, known, pattern, ratios[site.name], method, damping=damping, refit=refit
        )
        write_rows(rewriter, site, rows, kept, pattern, note)
        del rows, kept, h, known  # not beside what the next layer needs
    context.tell(len(sites), len(sites))


def _pruned(
    site: Site,
    h: Tensor | None,
    known: Sequence[dict[str, Any]] | None,
    pattern: Pattern,
    ratio: float,
    method: LayerMethod,
    *,
    damping: float | None,
    refit: int,
) -> tuple[Tensor, Tensor, str]:
    """The rows and the mask of all groups of a layer, and what to say of them."""
    parts = site.rows().float().chunk(site.groups)
    made: list[Pruned] = []
    loss = 0.0
    for number, part in enumerate(parts):
        task = Task(
            part,
            None if h is None else h[number],
            pattern,
            pattern.zeros(part.numel(), ratio),
            damping,
            {} if known is None else known[number],
            refit,
        )
        made.append(method(task))
        loss += made[-1].loss(task)
    notes = [*dict.fromkeys(p.note for p in made if p.note)]
    if h is not None:
        notes.insert(0, f"output error {loss:.4g}")
    rows, kept = (torch.cat([getattr(p, w) for p in made]) for w in ("rows", "kept"))
    return rows, kept, "; ".join(notes)
