"""One run of ``factorize``: ranks first, then one layer after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import RequirementError
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.factorize.factors import Basis, Moments, Task, solve
from planish.passes.factorize.importance import output_importance
from planish.passes.factorize.ranks import (
    Choice,
    Ranks,
    by_budget,
    by_error,
    by_fraction,
    candidates,
)
from planish.passes.factorize.rewrite import write_factors
from planish.passes.factorize.sequence import Reading, few_rows
from planish.passes.factorize.sites import Site
from planish.passes.sparsify.gradients import gradients

if TYPE_CHECKING:
    from planish.passes.factorize.factorize import Factorize

_BUDGETS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "seconds"}


class Work:
    """One run of the pass.

    Args:
        options: of the pass.
        program: to be rewritten.
        context: what the pass may look at.
        sites: the weights that it takes, in program order.
    """

    def __init__(
        self, options: Factorize, program: Program, context: PassContext, sites: Sequence[Site]
    ):
        self.options, self.program, self.context, self.sites = options, program, context, sites
        self._fisher = self._information() if options.method == "fisher" else {}
        self._importance = self._reach()
        self._told, self._steps = 0, len(sites) * (1 if options.rule == "keep" else 2)
        self._known: dict[str, Basis] = {}

    def ranks(self) -> Ranks:
        """The rank of every layer."""
        o = self.options
        if o.rule == "keep":
            return by_fraction(self.sites, o.keep, o.rank_multiple)
        reading = self._reading(self.program, None)
        bases = {s.name: self._basis(s, reading) for s in self.sites}
        if not o.sequential or o.method != "whitened":
            self._known = bases
        if o.rule in ("energy", "error"):
            bound = o.error if o.rule == "error" else (1 - o.energy) ** 0.5
            return by_error(self.sites, lambda s, r: bases[s.name].error(r), bound, o.rank_multiple)
        return by_budget(self.sites, self._choices(bases), o.keep, _BUDGETS[o.rule])

    def _choices(self, bases: Mapping[str, Basis]) -> dict[str, list[Choice]]:
        """What each layer can be, and what that costs."""
        o = self.options
        tried = {
            s.name: [
                r for r in candidates(s, o.rank_multiple) if r >= o.least * o.keep * s.break_even
            ]
            for s in self.sites
        }
        costs = self._costs(tried)
        return {
            s.name: [
                Choice(None, costs[s.name][None], 0.0),
                *(Choice(r, costs[s.name][r], self._lost(bases[s.name], r)) for r in tried[s.name]),
            ]
            for s in self.sites
        }

    def _lost(self, basis: Basis, rank: int) -> float:
        """What a rank of a layer costs, in a unit that all layers share."""
        outputs = basis.metric is not None and self.options.method == "whitened"
        return basis.energy(rank) if outputs else basis.error(rank) ** 2

    def _costs(
        self, tried: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Mapping[int | None, float]]:
        if self.options.rule == "latency":
            if self.context.timer is None:
                raise RequirementError(
                    "rule=latency measures layers on the target, and nothing runs here",
                    hint="take a target that runs on this machine, or rule=macs",
                )
            from planish.passes.factorize.latency import latencies

            return latencies(self.sites, tried, self.context.timer)
        if self.options.rule == "macs":
            return {
                s.name: {None: s.macs, **{r: s.macs_at(r) for r in tried[s.name]}}
                for s in self.sites
            }
        return {
            s.name: {None: s.parameters, **{r: s.parameters_at(r) for r in tried[s.name]}}
            for s in self.sites
        }

    def rewrite(self, rewriter: Rewriter, sites: Sequence[Site], ranks: Ranks) -> None:
        """Factor the layers one after another."""
        o = self.options
        fitted = o.method == "whitened" and o.sequential and o.compensate
        reading = self._reading(self.program, self.program.clone() if fitted else None)
        if not o.sequential and not self._known:  # layers must not see each other
            self._known = {s.name: self._basis(s, reading) for s in sites}
        seen: list[tuple[Site, Moments]] = []
        for site in sites:
            basis = self._known.get(site.name) or self._basis(site, reading)
            rank = ranks.rank[site.name]
            assert rank is not None
            if basis.task.moments is not None:
                seen.append((site, basis.task.moments))
            before_count, after_count = site.parameters, site.parameters_at(rank)
            note = (
                f"{site.name} to rank {rank} of {site.largest}: {after_count / before_count:.2f} "
                f"of its parameters, predicted error {basis.error(rank):.3g}"
            )
            write_factors(rewriter, site, basis.factors(rank), note)
        if (remark := few_rows(seen)) is not None:
            self.context.remark(remark)
        self.context.tell(self._steps, self._steps)

    def _reading(self, program: Program, before: Program | None) -> Reading | None:
        if self.options.method != "whitened":
            return None
        mask = self.options.padding_mask
        return Reading(program, self.context, before=before, padding_mask=mask)

    def _basis(self, site: Site, reading: Reading | None) -> Basis:
        self.context.tell(self._told, self._steps)
        self._told += 1
        center = self.options.bias and not isinstance(site.bias, Node)
        center = center and site.form != "spatial"  # its mean differs at the borders
        important = self._importance.get(site.name)
        if important is not None and site.form == "spatial":  # the columns of a window count alike
            columns = torch.eye(len(site.rows) // len(important), dtype=important.dtype)
            important = torch.kron(important, columns)
        task = Task(site.rows, fisher=self._fisher.get(site.name), center=False)
        if reading is not None and site.form == "table":
            counts = reading.counts(site)
            task = Task(site.rows, counts=counts, importance=important, center=False)
        elif reading is not None:
            task = Task(
                site.rows,
                reading.of(site),
                importance=important,
                center=center,
                damping=self.options.damping,
            )
        return solve(task, self.options.method)

    def _reach(self) -> dict[str, Tensor]:
        """What an error of each layer's output makes of the model's outputs."""
        if self.options.method != "whitened" or self.options.aim == "layer":
            return {}
        axes = {s.reader: -(s.weight.value.dim() - 1) if s.weight.is_convolution else -1
                for s in self.sites}  # fmt: skip
        found = output_importance(self.program, axes, self.context, self.options.padding_mask)
        return {s.name: found[s.reader] for s in self.sites}

    def _information(self) -> dict[str, Tensor]:
        """Sums of squared gradients for each output of each weight, over all labeled batches."""
        names = [s.name for s in self.sites]
        found: dict[str, Tensor] = {
            s.name: torch.zeros(len(s.rows), dtype=torch.float64) for s in self.sites
        }
        for batch in gradients(self.program, names, self.context):
            for site in self.sites:
                found[site.name] += site.matrix(batch[site.name]).double().square().sum(1)
        return found
