"""``prune``: cut the units of the lowest scores, and repair nothing; what other passes must beat.

Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; Molchanov et al., "Pruning
Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017; Theis et al., "Faster
gaze prediction with dense networks and Fisher pruning", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from planish.ir.cost import cost
from planish.ir.errors import NothingToDoError, source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.prune.budget import under_budget
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.cut import cut
from planish.passes.prune.groups import Group
from planish.passes.prune.mask_gradients import mask_gradients
from planish.passes.prune.scores import best, leveled, magnitude, of_gradients
from planish.passes.quantize.where import Where


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Cut the units that matter least.

    Attributes:
        score: "magnitude" of the weights that make a unit; "taylor" or "fisher", of the loss.
        rule: "keep" cuts every group alike; "macs" ranks the units of all groups together.
        keep: the share of units that every group keeps, for rule=keep; None for 0.7.
        ratio: the share of multiply-accumulates to come down to, for rule=macs; None for 0.5.
        where: a choice among the producers of groups.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LABELS, Fact.LOSS})
    source: ClassVar[tuple[str, ...]] = (
        "Li, Kadav, Durdanovic, Samet, Graf, Pruning Filters for Efficient ConvNets, ICLR 2017",
        "Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient "
        "Inference, ICLR 2017",
        "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018",
    )

    score: Literal["magnitude", "taylor", "fisher"] = "magnitude"
    rule: Literal["keep", "macs"] = "keep"
    keep: float | None = None
    ratio: float | None = None
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        for name, rule in (("keep", "keep"), ("ratio", "macs")):
            value = getattr(self, name)
            if value is not None and self.rule != rule:
                raise ValueError(f"{name} is of rule={rule}")
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is {value}, not a share between 0 and 1")

    def needs(self) -> frozenset[Fact]:
        """Labels and a loss, but for magnitude."""
        return frozenset() if self.score == "magnitude" else self.requires

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Score all units, choose, and cut."""
        groups, refusals = find_groups(program, self.where)
        scores = self._scores(program, groups, context, refusals)
        if not scores:
            said = f": {refusals[0].node}: {refusals[0].reason}" if refusals else ""
            raise NothingToDoError(
                f"prune found no units to cut{said}",
                hint="units are those between two layers, of two or more",
            )
        total = cost(program).macs
        counts = self._counts(program, scores, context)
        kept = {g: best(scores[g], k) for g, k in counts.items() if k < g.size}
        rewriter = Rewriter(program, self.name, context.sites)
        if kept:
            cut(rewriter, kept)
        after = rewriter.finish()
        left = cost(after).macs
        share = f" ({100 * left / total:.1f} %)" if total else ""
        context.remark(
            f"by {self.score}: {total} to {left} multiply-accumulates{share}; "
            + (", ".join(f"{g.name}: {len(k)} kept" for g, k in kept.items()) or "no unit cut")
        )
        return PassResult(after, tuple(rewriter.changes), tuple(refusals))

    def _scores(
        self,
        program: Program,
        groups: list[Group],
        context: PassContext,
        refusals: list[Refusal],
    ) -> dict[Group, Tensor]:
        """Of all groups that have a score; adds a refusal for each other."""
        found: dict[Group, Tensor] = {}
        reason = {g: "it is a single unit" for g in groups if g.size < 2}
        taken = [g for g in groups if g not in reason]
        if self.score == "magnitude":
            for group in taken:
                score = magnitude(program, group)
                if score is None:
                    reason[group] = "no matrix makes its units, so they have no magnitude"
                else:
                    found[group] = score
        else:
            reason.update({g: "nothing reads its units" for g in taken if not g.reads})
            taken = [g for g in taken if g.reads]
            if taken:
                batches = mask_gradients(program, taken, context)
                found = of_gradients(batches, taken, squared=self.score == "fisher")
        refusals += [
            Refusal("prune", g.first.name, f"{g.name}: {why}", source_line(g.first))
            for g, why in reason.items()
        ]
        return found

    def _counts(
        self, program: Program, scores: dict[Group, Tensor], context: PassContext
    ) -> dict[Group, int]:
        """How many units each group keeps."""
        if self.rule == "keep":
            keep = 0.7 if self.keep is None else self.keep
            return {g: max(1, int(keep * g.size + 1e-9)) for g in scores}
        total = cost(program).macs
        target = (0.5 if self.ratio is None else self.ratio) * total
        counts, left = under_budget(program, {g: leveled(s) for g, s in scores.items()}, target)
        if left > target:
            context.remark(
                f"{100 * left / total:.1f} % of the multiply-accumulates is the least that "
                f"can be reached; ratio asks for {100 * target / total:.1f} %"
            )
        return counts
