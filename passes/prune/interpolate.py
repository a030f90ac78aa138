"""``interpolate``: fewer units in every layer, and the next layer makes up those that are gone.

Of what a layer reads, over calibration inputs, a few columns give nearly all others (see
decompose): the units of the others are cut, and how they follow from the kept ones is folded into
every layer that reads them (see fold). Nothing is trained, and no label is read.

Either all groups at once, from the activations of the net as it is, or one a round (see rounds),
measured on the net as cut so far, until the work is down to a share.

Source: Chee, Flynn, Damle, De Sa, "Model Preserving Compression for Neural Networks", NeurIPS 2022.
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
from planish.passes.observe.feeding import Batches, required
from planish.passes.prune.activations import Activations
from planish.passes.prune.agreement import agreement, decisions
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.cut import cut
from planish.passes.prune.decompose import Interpolation, Pivoted, pivoted_qr
from planish.passes.prune.fold import Fold, fold, problem, unfit
from planish.passes.prune.groups import Group
from planish.passes.prune.rounds import Rounds
from planish.passes.prune.triangle import Triangle
from planish.passes.quantize.where import Where

_RULE = "interpolate"


@dataclass(frozen=True, kw_only=True)
class Interpolate(Pass):
    """Cut units, and fold how they follow from the others into what reads them.

    Attributes:
        keep: the share of units that every group keeps, for one-shot.
        tolerance: in its place, the fewest units with ``|R_kk| / |R_00|`` at most this.
        mode: "one-shot" cuts all groups by what the net is now; "iterated" one a round.
        macs: the share of multiply-accumulates to come down to, for iterated.
        step: the share of a group's units that it proposes to keep each round.
        constant: whether units are also made up by a constant, which goes into biases; groups that
            are read with zeros padded go without.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out.
        where: a choice among the producers of groups.
    """

    name: ClassVar[str] = "interpolate"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Chee, Flynn, Damle, De Sa, Model Preserving Compression for Neural Networks, NeurIPS 2022",
    )

    keep: float | None = None
    tolerance: float | None = None
    mode: Literal["one-shot", "iterated"] = "one-shot"
    macs: float | None = None
    step: float = 0.95
    constant: bool = False
    padding_mask: str = ""
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        for name in ("keep", "macs", "step"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is {value}, not a share between 0 and 1")
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance is {self.tolerance}, not from 0 to 1")
        if self.mode == "iterated":
            if self.keep is not None or self.tolerance is not None:
                raise ValueError("keep and tolerance are of mode=one-shot: iterated takes macs")
        elif self.macs is not None or self.step != 0.95:
            raise ValueError("macs and step are of mode=iterated: one-shot takes keep or tolerance")
        elif self.keep is not None and self.tolerance is not None:
            raise ValueError("keep and tolerance both say how many units stay: give one")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Decompose what the groups are read as, fold and cut."""
        batches = required(context.calibration)
        judged = context.held_out or batches
        before = decisions(program, judged)
        macs = cost(program).macs
        rewriter = Rewriter(program, self.name, context.sites)
        work = _Work(self, rewriter, batches, context)
        largest = work.iterate() if self.mode == "iterated" else work.at_once()
        after = rewriter.finish()
        left = cost(after).macs
        context.remark(
            f"{macs} to {left} multiply-accumulates ({100 * left / macs:.1f} %); "
            f"max |T| {largest[0]:.3g} at {largest[1]}"
        )
        if before is not None:
            kind = "held-out" if context.held_out else "calibration"
            share, count = agreement(before, decisions(after, judged))
            context.remark(
                f"decisions agree with those before on {100 * share:.2f} % of {count} {kind} inputs"
            )
        return PassResult(after, tuple(rewriter.changes), tuple(work.refusals))


class _Work:
    """One run of the pass."""

    def __init__(
        self, options: Interpolate, rewriter: Rewriter, batches: Batches, context: PassContext
    ):
        self.options, self.rewriter, self.context = options, rewriter, context
        self.program = rewriter.program
        self.batches = len(batches)
        self.activations = Activations(self.program, batches, options.padding_mask)
        self.refusals: list[Refusal] = []
        self._said: set[str] = set()
        self._without: set[str] = set()

    def groups(self) -> list[Group]:
        """The groups that can be folded into; why others cannot is noted once."""
        groups, refusals = find_groups(self.program, self.options.where)
        taken = []
        for group in groups:
            reason = unfit(self.program, group)
            if reason is None:
                taken.append(group)
            else:
                refusals.append(_refusal(group, reason))
        self.note(refusals)
        return taken

    def note(self, refusals: list[Refusal]) -> None:
        """Keep refusals of nodes that none was kept of."""
        self.refusals += [r for r in refusals if r.node not in self._said]
        self._said.update(r.node for r in refusals)

    def with_constant(self, group: Group) -> bool:
        """Whether a constant is fitted too; what goes without one is told once."""
        if not self.options.constant:
            return False
        reason = problem(self.program, group, constant=True)
        if reason is not None and group.first.name not in self._without:
            self._without.add(group.first.name)
            self.context.remark(f"{group.name}: no constant, as {reason}")
        return reason is None

    def pivoted(self, group: Group, seen: Triangle) -> Pivoted | None:
        """The pivoted QR of a group; None where it was seen at too few positions."""
        if seen.rows < 2 * group.size:
            reason = (
                f"{group.name}: seen at {seen.rows} positions, which says nothing of "
                f"{group.size} units: at least {2 * group.size} are wanted"
            )
            self.note([_refusal(group, reason)])
            return None
        parts = tuple(p.r() for p in seen.parts if p.rows >= 2 * group.size)
        return pivoted_qr(seen.r(), constant=self.with_constant(group), parts=parts)

    def required(self, groups: list[Group]) -> None:
        """Refuse to do nothing.

        Raises:
            NothingToDoError: no group is left.
        """
        if not groups:
            said = f": {self.refusals[0].node}: {self.refusals[0].reason}" if self.refusals else ""
            raise NothingToDoError(
                f"interpolate found no units to cut{said}",
                hint="units lie between two layers of constant weights, seen twice as often",
            )

    def at_once(self) -> tuple[float, str]:
        """Cut all groups; returns the greatest |T|, and whose it is."""
        groups = self.groups()
        self.required(groups)
        self.context.tell(0, self.batches)
        seen = self.activations.triangles(
            groups,
            constant=self.with_constant,
            tell=lambda batch: self.context.tell(batch + 1, self.batches),
        )
        found: dict[Group, Interpolation] = {}
        for group in groups:
            pivoted = self.pivoted(group, seen[group])
            if pivoted is None:
                continue
            k = self.units(group, pivoted)
            if k < group.size:
                found[group] = pivoted.keep(k)
        if not found and any(seen[g].rows >= 2 * g.size for g in groups):
            self.context.remark("within this tolerance every unit stays")
            return 1.0, "no group"
        self.required(list(found))
        self.context.remark("; ".join(f"{g.name}: {i}" for g, i in found.items()))
        return self.apply(found)

    def units(self, group: Group, pivoted: Pivoted) -> int:
        """How many units a group keeps."""
        if self.options.tolerance is not None:
            return pivoted.within(self.options.tolerance)
        keep = 0.5 if self.options.keep is None else self.options.keep
        return max(1, int(keep * group.size + 1e-9))

    def apply(self, found: dict[Group, Interpolation]) -> tuple[float, str]:
        """Fold and cut; returns the greatest |T|, and whose it is."""
        folds = {g: Fold(i.kept, i.matrix, i.constant) for g, i in found.items()}
        kept: dict[Group, Tensor] = fold(self.rewriter, folds)
        cut(self.rewriter, kept)
        return max((i.largest, g.name) for g, i in found.items())

    def iterate(self) -> tuple[float, str]:
        """Cut one group a round until the budget is met; returns the greatest |T|, and whose."""
        rounds = Rounds(self.program, self.activations, self.pivoted, self.with_constant)
        total = cost(self.program).macs
        target = (0.5 if self.options.macs is None else self.options.macs) * total
        largest = 0.0, "no group"
        left = total
        self.context.tell(0, 100)
        while left > target:
            groups = self.groups()
            choice = rounds.choose(groups, self.options.step)
            if choice is None:
                break
            group, found = choice
            largest = max(largest, self.apply({group: found}))
            self.rewriter.finish()
            rounds.done(group)
            left = cost(self.program).macs
            self.context.tell(min(99, int(100 * (total - left) / (total - target))), 100)
        if not rounds.count and not rounds.denied:
            self.required([])
        if left > target:
            self.context.remark(
                f"{100 * left / total:.1f} % of the multiply-accumulates is the least "
                f"that can be reached; macs asks for {100 * target / total:.1f} %"
            )
        self.context.remark(f"{rounds.count} rounds")
        self.context.tell(100, 100)
        return largest


def _refusal(group: Group, reason: str) -> Refusal:
    return Refusal(_RULE, group.first.name, reason, source_line(group.first))
