"""Set weights to zero in a pattern, and repair what stays.

Rewrite:
    W  ->  W' with  W'[o, i] = 0  outside of the pattern,   min ||W X - W' X||^2  or  min L(W')
Shapes:       W: [O, I]; a convolution's windows are its inputs, the channels of a tap together.
Requires:     calibrated inputs for wanda, obc and sparsegpt; labeled batches and a loss for
              fisher, woodfisher and undecayed; nothing for magnitude.
Contract:     lossy; the constant is typed (``sparse<2:4, axis=1>``), which is checked after every
              later pass.
Cost:         magnitude, wanda: O(O I log I). sparsegpt: O(I^3 + O I^2), obc: O(O I^3) per layer.
Failures:     a reduction axis that the groups do not divide is refused; so is a weight that is
              looked up in as well, unless ``tied``.
Source:       see the methods: scores, obc, sparsegpt, woodfisher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.quantize.where import Where
from planish.passes.sparsify.methods import LAYER_METHODS, Score
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sequence import prune_in_sequence
from planish.passes.sparsify.sites import find_sites, required


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pass):
    """Set weights to zero where that costs least.

    Attributes:
        pattern: ``2:4`` (any N:M), ``4x4`` (any blocks) or ``unstructured``.
        score: how weights are ranked, and repaired.
        ratio: the share that goes, for blocks and unstructured.
        damping: share of the mean of diag H that is added to it; None for the method's own.
        tied: also weights that are embedding tables as well.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out of H.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "sparsify"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024",
    )

    pattern: str = "2:4"
    score: Score = "magnitude"
    ratio: float = 0.5
    damping: float | None = None
    tied: bool = False
    padding_mask: str = ""
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, not between 0 and 1: the share that goes")

    def needs(self) -> frozenset[Fact]:
        """Calibration, but for magnitude."""
        return frozenset() if self.score == "magnitude" else self.requires

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Prune every weight, in program order."""
        pattern = Pattern.parse(self.pattern)
        sites, refusals = find_sites(program, pattern, self.where, tied=self.tied)
        rewriter = Rewriter(program, self.name, context.sites)
        prune_in_sequence(
            rewriter,
            required(sites, refusals, pattern),
            context,
            pattern,
            {site.name: self.ratio for site in sites},
            LAYER_METHODS[self.score],
            reads_inputs=Fact.CALIBRATED in self.needs(),
            damping=self.damping,
            padding_mask=self.padding_mask,
        )
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))
