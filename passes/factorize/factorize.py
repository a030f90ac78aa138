"""Write a product as two thin ones, through a space of lower rank.

Rewrite:
    W x + b  ->  A (B x) + b'    with  A B of rank r,   min ||W x - A B x||^2 over the samples
Shapes:       W: [O, I]; A: [O, r], B: [r, I]. A convolution's windows are its inputs: k*k to r
              channels, then 1*1; or k*1 to r, then 1*k. A table: [words, r], then [features, r].
Requires:     calibrated inputs for whitened; labeled batches and a loss for fisher.
Contract:     lossy; A and B are ordinary linears and convolutions, which later passes quantize.
Cost:         O(O I^2 + I^3) per layer, and one run of the calibration (two to choose ranks).
Failures:     a shared or tied weight, channels in groups, a sparse layout, alpha or beta of addmm:
              refused. A layer that a rank would not make smaller or faster stays dense, refused.
Source:       see the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import RequirementError, source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.factorize.factors import Basis, Method, Moments, Task, solve
from planish.passes.factorize.importance import output_importance
from planish.passes.factorize.ranks import (
    Choice,
    Ranks,
    Rule,
    by_budget,
    by_error,
    by_fraction,
    candidates,
)
from planish.passes.factorize.rewrite import write_factors
from planish.passes.factorize.sequence import Reading, few_rows
from planish.passes.factorize.sites import RULE, Site, find_sites
from planish.passes.quantize.where import Where
from planish.passes.sparsify.gradients import gradients

_BUDGETS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "seconds"}


@dataclass(frozen=True, kw_only=True)
class Factorize(Pass):
    """Factor linears, convolutions and tables into pairs of low rank.

    Attributes:
        method: what is least: the error of the weight ("svd"), of the layer's output on the
            calibration inputs ("whitened"), of the weight as the loss sees it ("fisher").
        keep: share of the parameters that stays in every layer; under a budget, share of the
            parameters, MACs or seconds of all of them together.
        rule: every layer keeps the same ("keep"), or the rank that "energy" or "error" asks for,
            or all share a budget of "parameters", "macs" or measured "latency".
        energy: share of the energy that a rank has to hold.
        error: relative error that a rank may leave.
        least: under a budget, every layer keeps at least this share of the rank that it has under
            ``rule=keep``: estimates to first order do not hold for large errors.
        rank_multiple: ranks are multiples of it, as kernels like them.
        convolution: two convolutions, k*k and 1*1 ("pair"), or k*1 and 1*k ("spatial", by svd).
        embeddings: also tables; they get smaller, not faster.
        bias: the bias takes up the mean of the error; a layer without one gets one. Whitened only.
        sequential: each layer is factored by what the ones before it give by then. Whitened only.
        compensate: and fitted to the output that it had in the program before. Whitened only.
        damping: share of the mean of diag G that is added where a layer is fitted anew.
        aim: what an error counts by: the energy of the layer's own output ("layer"), or what it
            makes of the model's outputs to first order ("outputs", see importance). Whitened only.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "factorize"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED, Fact.LABELS, Fact.LOSS})
    source: ClassVar[tuple[str, ...]] = (
        "Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language "
        "Model Compression, ICLR 2025",
        "Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP Models, NeurIPS 2021",
        "Hsu et al., Language Model Compression with Weighted Low-rank Factorization, ICLR 2022",
        "Jaderberg, Vedaldi, Zisserman, Speeding up Convolutional Neural Networks with Low Rank "
        "Expansions, BMVC 2014",
    )

    method: Method = "whitened"
    keep: float = 0.5
    rule: Rule = "keep"
    energy: float = 0.95
    error: float = 0.1
    least: float = 0.75
    rank_multiple: int = 8
    convolution: Literal["pair", "spatial"] = "pair"
    embeddings: bool = False
    bias: bool = True
    sequential: bool = True
    compensate: bool = True
    damping: float = 0.1
    aim: Literal["layer", "outputs"] = "outputs"
    padding_mask: str = ""
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        for name in ("keep", "energy", "error"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not between 0 and 1")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least is {self.least}, not between 0 and 1")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple is {self.rank_multiple}, at least 1")
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, not above 0")
        if self.convolution == "spatial" and self.method != "svd":
            raise ValueError("convolution=spatial takes method=svd: its halves share no inputs")

    def needs(self) -> frozenset[Fact]:
        """Calibration for whitened, labels and a loss for fisher, nothing for svd."""
        calibrated = frozenset({Fact.CALIBRATED})
        return {
            "svd": frozenset[Fact](),
            "whitened": calibrated,
            "fisher": self.requires - calibrated,
        }[self.method]

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose ranks, then factor every weight, in program order."""
        sites, refusals = find_sites(
            program,
            self.where,
            spatial=self.convolution == "spatial",
            embeddings=self.embeddings,
        )
        work = _Work(self, program, context, sites)
        ranks = work.ranks()
        for remark in ranks.remarks:
            context.remark(remark)
        for site in sites:
            if (why := ranks.dense.get(site.name)) is not None:
                at = site.reader
                refusals.append(Refusal(RULE, at.name, f"stays dense: {why}", source_line(at)))
        rewriter = Rewriter(program, self.name, context.sites)
        work.rewrite(rewriter, [s for s in sites if ranks.rank[s.name] is not None], ranks)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


class _Work:
    """One run of the pass."""

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
                *(Choice(r, costs[s.name][r], bases[s.name].error(r) ** 2) for r in tried[s.name]),
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
        important = self._importance.get(site.name)
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
