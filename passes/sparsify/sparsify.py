"""Set weights to zero in a pattern, and repair what stays.

Rewrite:
    W  ->  W' with  W'[o, i] = 0  outside of the pattern,   min ||W X - W' X||^2  or  min L(W')
Shapes:       W: [O, I]; a convolution's windows are its inputs, the channels of a tap together.
Requires:     calibrated inputs for wanda, obc and sparsegpt; labeled batches and a loss for
              fisher, woodfisher and undecayed; nothing for magnitude.
Contract:     lossy; the constant is typed (``sparse<2:4, axis=1>``), which is checked after every
              later pass.
Cost:         magnitude, wanda: O(O I log I). sparsegpt: O(I^3 + O I^2), obc: O(O I^3) per layer.
              fisher, undecayed: N gradients. woodfisher: these, and O(N O I block_size).
Failures:     a reduction axis that the groups do not divide is refused; so is a weight that is
              looked up in as well, unless ``tied``.
Source:       see the methods: scores, obc, sparsegpt, woodfisher.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, OperatorError, Pass, PassContext, PassResult
from planish.passes.quantize.where import Where
from planish.passes.sparsify.gradual import prune_by_loss
from planish.passes.sparsify.judging import How, check_options
from planish.passes.sparsify.methods import LAYER_METHODS, Score
from planish.passes.sparsify.nonuniform import Bounds, choose_ratios, told_later
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
        damping: share of the mean of diag H that is added to it; of the Fisher matrix what is
            added itself, so that it means the same in all layers (1e-5; 0.1 with ``taylor``; 0 for
            fisher). None for the method's own.
        scope: rank the weights of each "layer" by themselves, or all in one "global" order; None
            for global where scores are of the loss (woodfisher, fisher, undecayed). Groups are
            always ranked by themselves.
        refit: steps of conjugate gradients in which sparsegpt fits the weights that stay to the
            mask it found; 0 for the sweep alone.
        steps: times that gradients are read anew on the way to the ratio (see gradual).
        block_size: entries of a block of the Fisher matrix, for woodfisher; raised to the next
            multiple of M.
        taylor: woodfisher with its gradient term, for a model whose training has not ended.
        decay: the weight decay of the training, for undecayed.
        gradients: how many are planned, one for each labeled batch; None for all.
        layers: every layer gives up the same ("uniform"), or each what costs least together, by
            what pruning it alone does to the outputs ("sensitivity"); ``ratio`` is then of the
            weights of all layers, and with groups some layers stay dense.
        least: with sensitivity, the share that every layer gives up, but for groups.
        most: with sensitivity, the share that any layer gives up; None for (3 + ratio) / 4.
        batches: with sensitivity, calibration batches to measure on.
        tied: also weights that are embedding tables as well.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out of H.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "sparsify"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED, Fact.LABELS, Fact.LOSS})
    source: ClassVar[tuple[str, ...]] = (
        "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024",
        "Frantar, Singh, Alistarh, Optimal Brain Compression, NeurIPS 2022",
        "Frantar, Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in "
        "One-Shot, ICML 2023",
        "Singh, Alistarh, WoodFisher: Efficient Second-Order Approximation, NeurIPS 2020",
    )

    pattern: str = "2:4"
    score: Score = "sparsegpt"
    ratio: float = 0.5
    damping: float | None = None
    scope: Literal["layer", "global"] | None = None
    refit: int = 30
    steps: int = 1
    block_size: int = 64
    taylor: bool = False
    decay: float = 5e-4
    gradients: int | None = None
    layers: Literal["uniform", "sensitivity"] = "uniform"
    least: float = 0.0
    most: float | None = None
    batches: int = 4
    tied: bool = False
    padding_mask: str = ""
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, not between 0 and 1: the share that goes")
        if self.score in LAYER_METHODS and self.score != "magnitude" and self.scope == "global":
            raise ValueError(f"{self.score} scores the output of one layer: use scope=layer")
        if self.refit < 0:
            raise ValueError(f"refit is {self.refit}, a number of steps")
        if self.steps < 1 or (self.steps > 1 and self.score in LAYER_METHODS):
            raise ValueError(
                f"steps is {self.steps}: at least 1, and more only for woodfisher, fisher and "
                "undecayed, whose gradients are read anew"
            )
        check_options(self.how())
        self._check_layers()

    def _check_layers(self) -> None:
        problem = Bounds(self.ratio, self.least, self.most, self.batches).problem()
        if self.layers == "uniform":
            if (self.least, self.most, self.batches) != (0.0, None, 4):
                raise ValueError("least, most and batches are of layers=sensitivity")
        elif problem is not None:
            raise ValueError(problem)
        elif self._together and Pattern.parse(self.pattern).kind != "grouped":
            raise ValueError(
                "one global order decides what each layer gives up: use scope=layer with "
                "layers=sensitivity"
            )

    @property
    def _together(self) -> bool:
        """Whether weights of all layers are ranked in one order."""
        of_loss = self.score not in LAYER_METHODS
        return self.scope == "global" or (of_loss and self.scope is None)

    def how(self) -> How:
        """The options of scores that are of the loss."""
        m = Pattern.parse(self.pattern).m
        return How(
            self.score,
            -(-self.block_size // m) * m,
            self.damping,
            self.decay,
            self.taylor,
            self.gradients,
        )

    def needs(self) -> frozenset[Fact]:
        """Calibration, or labels and a loss; calibration too where layers are measured."""
        calibrated = frozenset({Fact.CALIBRATED})
        wanted = calibrated if self.layers == "sensitivity" else frozenset()
        if self.score == "magnitude":
            return wanted
        return calibrated if self.score in LAYER_METHODS else wanted | self.requires - calibrated

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Prune every weight, in program order."""
        pattern = Pattern.parse(self.pattern)
        sites, refusals = find_sites(program, pattern, self.where, tied=self.tied)
        ratios = {site.name: self.ratio for site in required(sites, refusals, pattern)}
        operators: tuple[OperatorError, ...] = ()
        if self.layers == "sensitivity":
            chosen = choose_ratios(
                program,
                sites,
                pattern,
                self.score,
                Bounds(self.ratio, self.least, self.most, self.batches),
                context,
                damping=self.damping,
                refit=self.refit,
                padding_mask=self.padding_mask,
            )
            ratios, operators = chosen.ratios, chosen.operators
            refusals.extend(chosen.refusals)
            context = told_later(context, len(sites))
        rewriter = Rewriter(program, self.name, context.sites)
        if self.score not in LAYER_METHODS or self.scope == "global":
            together, how = self._together, self.how()
            prune_by_loss(rewriter, sites, context, pattern, ratios, how,
                          together=together, steps=self.steps)  # fmt: skip
        else:
            prune_in_sequence(
                rewriter,
                sites,
                context,
                pattern,
                ratios,
                LAYER_METHODS[self.score],
                reads_inputs=self.score != "magnitude",
                damping=self.damping,
                padding_mask=self.padding_mask,
                refit=self.refit,
            )
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals), operators)
