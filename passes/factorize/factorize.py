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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from planish.ir.errors import NothingToDoError, source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.factorize.factors import Method
from planish.passes.factorize.heads import factor_heads
from planish.passes.factorize.ranks import Rule
from planish.passes.factorize.sites import RULE, find_sites
from planish.passes.factorize.work import Work
from planish.passes.quantize.where import Where


@dataclass(frozen=True, kw_only=True)
class Factorize(Pass):
    """Factor linears, convolutions and tables into pairs of low rank.

    Attributes:
        method: what is least: the error of the weight ("svd"), of the layer's output on the
            calibration inputs ("whitened"), of the weight as the loss sees it ("fisher").
        keep: share of the parameters (biases aside) that stays in every layer; under a budget,
            share of the parameters, MACs or seconds of all of them together.
        rule: every layer keeps the same ("keep"), or the rank that "energy" or "error" asks for,
            or all share a budget of "parameters", "macs" or measured "latency".
        energy: share of the energy that a rank has to hold.
        error: relative error that a rank may leave.
        least: under a budget, every layer keeps at least this share of the rank that it has under
            ``rule=keep``: estimates to first order do not hold for large errors.
        rank_multiple: ranks are multiples of it, as kernels like them.
        convolution: two convolutions, k*k and 1*1 ("pair"), or k*1 and 1*k ("spatial"; whitened
            counts what each column of a window makes of the rows that it reads, as if columns were
            not added up, and the bias takes up nothing).
        embeddings: also tables; they get smaller, not faster.
        heads: also what query and key, and value and output, share inside attention heads: each
            keeps this share of its dimensions; these four weights are then left as they are.
        bias: the bias takes up the mean of the error; a layer without one gets one. Whitened only.
        sequential: each layer is factored by what the ones before it give by then. Whitened only.
        compensate: and fitted to the output that it had in the program before, or where that is
            added to something, to the sum. Whitened only.
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
    least: float = 0.5
    rank_multiple: int = 8
    convolution: Literal["pair", "spatial"] = "pair"
    embeddings: bool = False
    heads: bool = False
    bias: bool = True
    sequential: bool = True
    compensate: bool = True
    damping: float = 0.3
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
        if self.heads and (self.method == "fisher" or self.rule != "keep"):
            raise ValueError("heads=true takes method=svd or whitened, and rule=keep")

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
        rewriter = Rewriter(program, self.name, context.sites)
        done, refused = self._heads(rewriter, context) if self.heads else ((), ())
        try:
            sites, refusals = find_sites(
                program,
                self.where,
                spatial=self.convolution == "spatial",
                embeddings=self.embeddings,
            )
        except NothingToDoError:
            if not done:  # of heads neither
                raise
            sites, refusals = [], []
        sites = [site for site in sites if site.name not in done]
        if done and not sites:
            return PassResult(rewriter.finish(), tuple(rewriter.changes), (*refused, *refusals))
        work = Work(self, program, context, sites)
        ranks = work.ranks()
        for remark in ranks.remarks:
            context.remark(remark)
        for site in sites:
            if (why := ranks.dense.get(site.name)) is not None:
                at = site.reader
                refusals.append(Refusal(RULE, at.name, f"stays dense: {why}", source_line(at)))
        work.rewrite(rewriter, [s for s in sites if ranks.rank[s.name] is not None], ranks)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), (*refused, *refusals))

    def _heads(
        self, rewriter: Rewriter, context: PassContext
    ) -> tuple[Sequence[str], Sequence[Refusal]]:
        """Take dimensions out of attention heads; the program is whole again."""
        found = factor_heads(
            rewriter,
            context,
            keep=self.keep,
            multiple=self.rank_multiple,
            calibrated=self.method == "whitened",
            absorb=self.bias,
            padding_mask=self.padding_mask,
            where=self.where,
        )
        rewriter.finish()
        return found
