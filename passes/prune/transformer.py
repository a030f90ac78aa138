"""``prune-transformer``: heads and neurons cut after training, without training again.

Rewrite:
    A head or neuron goes from its makers' rows and its reader's columns; those left are scaled.
Shapes:       [.., heads x width] to [.., fewer x width]; [.., neurons] to [.., fewer].
Requires:     labeled batches, a loss, and calibrated inputs to tune by; a timer for latency.
Contract:     lossy.
Cost:         a run and its gradient for every labeled batch; two runs of the calibration.
Failures:     units that no constant matrix reads, or whose weight something else reads: refused.
              Every layer keeps one unit at least.
Source:       see the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.cost import cost, macs_of, sample_shape
from planish.ir.errors import NothingToDoError, RequirementError, source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.prune import tuned_scales as tuning
from planish.passes.prune.coupling import find_groups, writers
from planish.passes.prune.cut import cut
from planish.passes.prune.fold import Fold, fold, problem
from planish.passes.prune.groups import Group
from planish.passes.prune.latency_table import Shape, measure
from planish.passes.prune.mask_gradients import mask_gradients
from planish.passes.prune.rearrange import rearrange
from planish.passes.prune.transformer_search import Choice, Layer, by_latency, by_macs
from planish.passes.quantize.where import Where

RULE = "prune-transformer"


@dataclass(frozen=True, kw_only=True)
class PruneTransformer(Pass):
    """Cut heads and neurons of a trained transformer to a budget.

    Attributes:
        macs: share of the program's multiply-accumulates to come down to; None for 0.6 where
            there is no latency.
        latency: share of its seconds on the target instead.
        rearrange: choose units of a layer by what they do together, not each by itself.
        tune: scale what stays to give what each layer gave before.
        damping: ridge of the scales, as a share of the mean of the diagonal.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out.
        where: a choice among the producers of units.
    """

    name: ClassVar[str] = "prune-transformer"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LABELS, Fact.LOSS, Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022",
    )

    macs: float | None = None
    latency: float | None = None
    rearrange: bool = True
    tune: bool = True
    damping: float = 0.01
    padding_mask: str = ""
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        if self.macs is not None and self.latency is not None:
            raise ValueError("give macs or latency, not both")
        for name in ("macs", "latency"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is {value}, not a share between 0 and 1")
        if not self.damping >= 0:
            raise ValueError(f"damping is {self.damping}, not at least 0")

    def needs(self) -> frozenset[Fact]:
        """Calibration only to tune by."""
        return self.requires if self.tune else self.requires - {Fact.CALIBRATED}

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Weigh units, choose, exchange, scale, cut."""
        groups, refusals = _groups(program, self.where)
        if not groups:
            said = f": {refusals[0].node}: {refusals[0].reason}" if refusals else ""
            raise NothingToDoError(
                f"prune-transformer found no heads or neurons to cut{said}",
                hint="units are heads of attentions, and neurons between two linears",
            )
        found = list(mask_gradients(program, groups, context))
        gradients = {g: torch.stack([batch[g] for batch in found]) for g in groups}
        choice = self._search(program, groups, gradients, context)
        kept = dict(zip(groups, choice.kept, strict=True))
        if self.rearrange:
            kept = {g: rearrange(gradients[g], len(k)) for g, k in kept.items()}
        kept = {g: k for g, k in kept.items() if len(k) < g.size}
        scales = self._scales(program, kept, context, refusals)
        total = cost(program).macs
        rewriter = Rewriter(program, self.name, context.sites)
        if kept:
            cut(rewriter, fold(rewriter, {g: _fold(g, k, scales.get(g)) for g, k in kept.items()}))
        after = rewriter.finish()
        left = cost(after).macs
        context.remark(
            f"{left} of {total} multiply-accumulates are left ({100 * left / total:.1f} %): "
            + (", ".join(f"{g.name}: {len(k)} kept" for g, k in kept.items()) or "no unit cut")
        )
        return PassResult(after, tuple(rewriter.changes), tuple(refusals))

    def _search(
        self,
        program: Program,
        groups: Sequence[Group],
        gradients: Mapping[Group, Tensor],
        context: PassContext,
    ) -> Choice:
        """How many units of each group stay, and which by themselves."""
        worth = {g: gradients[g].square().sum(0) for g in groups}
        if self.latency is None:
            unit, total = _macs(program, groups)
            layers = [Layer(_class(g), worth[g], unit[g], least=1) for g in groups]
            share, kind = 0.6 if self.macs is None else self.macs, "multiply-accumulates"
            fixed = total - sum(unit[g] * g.size for g in groups)
            choice = by_macs(layers, share * total - fixed)
        else:
            layers, total = _timed(program, groups, worth, context)
            share, kind = self.latency, "seconds"
            full = sum(t(len(x.worth)) for x in layers if (t := x.table) is not None)
            fixed = max(total - full, 0.0)
            choice = by_latency(layers, share * total - fixed)
        if not choice.met:
            context.remark(
                f"{100 * (choice.cost + fixed) / total:.1f} % of the {kind} is the least that can "
                f"be reached, every layer keeping one unit; asked for were {100 * share:.1f} %"
            )
        return choice

    def _scales(
        self,
        program: Program,
        kept: Mapping[Group, Tensor],
        context: PassContext,
        refusals: list[Refusal],
    ) -> Mapping[Group, Tensor]:
        """Of the groups that could be tuned; adds a refusal for each other."""
        if not self.tune or not kept:
            return {}
        found = tuning.tuned_scales(
            program, kept, context, damping=self.damping, padding_mask=self.padding_mask
        )
        context.tell(len(found), len(found))
        for group in kept:
            why = tuning.problem(group)
            if why is None and found[group] is None:
                why = "scales beyond 10 or none at all: its units are too alike"
            if why is not None:
                refusals.append(_refusal(group, f"is cut but not tuned: {why}"))
        return {g: r for g, r in found.items() if r is not None}


def _refusal(group: Group, why: str) -> Refusal:
    return Refusal(RULE, group.first.name, f"{group.name}: {why}", source_line(group.first))


def _class(group: Group) -> Literal["heads", "neurons"]:
    return "heads" if group.kind == "heads" else "neurons"


def _groups(program: Program, where: Where) -> tuple[list[Group], list[Refusal]]:
    """Heads and neurons whose readers can be scaled, and why others stay."""
    found, refusals = find_groups(program, where)
    groups = []
    for group in found:
        if group.kind in ("heads", "neurons") and group.size > 1:
            why = problem(program, group)
            if why is None:
                groups.append(group)
            else:
                refusals.append(_refusal(group, why))
    return groups, refusals


def _fold(group: Group, kept: Tensor, r: Tensor | None) -> Fold:
    matrix = torch.zeros(len(kept), group.size, dtype=torch.float64)
    matrix[torch.arange(len(kept)), kept] = 1.0 if r is None else r
    return Fold(kept, matrix)


def _macs(program: Program, groups: Sequence[Group]) -> tuple[dict[Group, float], float]:
    """Multiply-accumulates of a unit of each group, and of the whole program."""
    unit = {g: sum(macs_of(program, n) for n in _operators(g)) / g.size for g in groups}
    return unit, float(cost(program).macs)


def _operators(group: Group) -> list[Node]:
    """What makes the units, what reads them, and what is between: its work goes with them."""
    made = set(writers(group))
    found = dict.fromkeys(made | {read.reader for read in group.reads})
    pending = [read.value.node for read in group.reads]
    while pending:
        node = pending.pop()
        if node not in found and node.op == "call_function":
            found[node] = None
            pending.extend(node.all_input_nodes)
    return list(found)


def _timed(
    program: Program, groups: Sequence[Group], worth: Mapping[Group, Tensor], context: PassContext
) -> tuple[list[Layer], float]:
    """Layers with the tables of the target, and seconds of the whole program."""
    if context.timer is None:
        raise RequirementError(
            "latency is measured on the target, and nothing runs here",
            hint="take a target that runs on this machine, or give macs",
        )
    shapes = [_shape(program, g) for g in groups]
    tables = measure(shapes, context.timer)
    (whole,) = context.timer.seconds([(program, program.samples[0])])
    layers = [
        Layer(_class(g), worth[g], least=1, table=tables[s])
        for g, s in zip(groups, shapes, strict=True)
    ]
    return layers, whole


def _shape(program: Program, group: Group) -> Shape:
    source = writers(group)[0].all_input_nodes[0]
    sizes = sample_shape(program, source)
    tokens = sizes[-2] if len(sizes) > 1 else 1
    rows = 1
    for size in sizes[:-2]:
        rows *= size
    read = group.reads[0]
    outputs = sample_shape(program, read.reader)[-1]
    width = len(read.value.unit) // group.size if group.kind == "heads" else 1
    return Shape(_class(group), group.size, (rows, tokens, sizes[-1]), outputs, width)
