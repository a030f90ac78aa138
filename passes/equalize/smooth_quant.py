"""Divide the channels of a value by scales, and multiply the weights that read them.

Rewrite:
    y_i = x W_i^T   ->   y_i = (x / s) (W_i diag(s))^T,  i = 1..n
    x / s is folded into what makes x: gain and bias of a norm, the rows of a linear (also the
    value projection before an attention), or it is an operator of its own. Whatever else reads a
    folded x, such as the residual of a post-norm transformer, reads (x / s) s.
    s_j = max|x_j|^a / max|W_:,j|^(1-a), or only outliers: s_j = max(1, max|x_j| / t)^p
Shapes:       x: [..., I]; W_i: [O_i, I]; s: [I], positive.
Requires:     constant weights that nothing else reads; calibration, for max|x_j| and the search.
Contract:     exact: s cancels in real numbers.
Cost:         folded: none. Otherwise one multiplication of x.
Failures:     an alpha found on text says little about code: outliers that calibration never saw
              are clipped later. A scale by which nothing is gained is refused.
Source:       Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for
              Large Language Models", ICML 2023, equation 4 (alpha); the choice of alpha for each
              site by the error of its outputs, and the scales of outliers alone, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.ir.errors import source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._edits import scale_site
from planish.passes.equalize._rows import Rows, sample_rows
from planish.passes.equalize._scales import Choice, search, smooth_scale
from planish.passes.equalize._sites import Site, find_sites
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.targets import Weight, find_weights

_RULE = "smooth"


def smoothed(x: Tensor, weights: list[Tensor], alpha: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """SmoothQuant on numbers: ``x / s``, each ``W diag(s)``, and ``s``.

    Args:
        x: [n, I].
        weights: [O_i, I] each; they share s.
        alpha: how much of the difficulty goes to the weights.
    """
    w_max = torch.cat(weights).abs().amax(0)
    scale = smooth_scale(x.abs().amax(0), w_max, alpha)
    return x / scale, [w * scale for w in weights], scale


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Pass):
    """Move the outliers of values into the weights that read them.

    Attributes:
        alpha: one for all sites; None searches at each site for the scale of least error.
        steps: how many steps from 0 to 1 the search tries.
        outliers: whether the search tries scales of outliers alone as well.
        explicit: whether a multiplication may be added where no norm or linear takes the scale, or
            where something else reads what they give.
        min_gain_db: by how much the error of the outputs must fall; below, a second run of the pass
            would find scales again, and multiplications would not be worth their time.
        rows: how many rows of each value the search looks at.
        padding_mask: the input that is 0 at padding, whose rows are left out; "auto" takes one
            called attention_mask, null none.
        where: which products take part.
    """

    name: ClassVar[str] = "smooth-quant"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = ("Xiao et al., SmoothQuant, ICML 2023, section 4",)

    alpha: float | None = None
    steps: int = 10
    outliers: bool = True
    explicit: bool = True
    min_gain_db: float = 1.0
    rows: int = 256
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, not within 0 and 1")
        if self.steps < 1 or self.rows < 1:
            raise ValueError("steps and rows are at least 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the sites, look at their values once, and scale those that gain."""
        weights, refusals = find_weights(program, embeddings=False, where=self.where)
        refusals += [_shared(w) for w in weights if len(w.readers) > 1]
        sites = []
        for site in find_sites(program, weights):
            if site.cost and not self.explicit:
                refusals.append(_refusal(site, "it would take a multiplication of its own"))
            else:
                sites.append(site)
        if not sites and not refusals:
            # No error: it stands in recipes for all kinds of networks.
            context.remark(
                "no product has a constant weight; convolutions are balanced by equalize-layers"
            )
            return PassResult(program)
        seen = sample_rows(
            program,
            [site.root for site in sites],
            context.calibration,
            self.rows,
            context.generator,
            padding_mask=self.padding_mask,
            tell=lambda done, total: context.tell(done, total + len(sites)),
        )
        batches = len(context.calibration or ())
        rewriter = Rewriter(program, self.name, context.sites)
        for done, site in enumerate(sites, 1):
            choice = self._choose(site, seen[site.root])
            context.tell(batches + done, batches + len(sites))
            if isinstance(choice, str):
                refusals.append(_refusal(site, choice))
                continue
            with rewriter.site(_RULE, site.root) as allowed:
                if allowed:
                    scale_site(rewriter, site, choice.scale)
                    rewriter.note(_note(site, choice))
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))

    def _choose(self, site: Site, seen: Rows) -> Choice | str:
        """The scale of a site, or why it has none."""
        columns = site.columns()
        grid = [step / self.steps for step in range(self.steps + 1)]
        if self.alpha is not None:
            grid = [self.alpha]
        outliers = self.outliers and self.alpha is None
        found = search(seen.rows, seen.absmax, columns, grid, outliers=outliers)
        if bool((found.scale == 1).all()):
            return f"no scale lowers its error ({found.plain_db:.1f} dB in 8 bits)"
        if found.gain_db < self.min_gain_db:
            gain = f"{found.name} would gain {found.gain_db:.2f} dB"
            return f"{gain}, less than {self.min_gain_db:g}"
        return found


def _note(site: Site, choice: Choice) -> str:
    how = f"folded into {site.maker.name}" if site.maker is not None else "multiplied by itself"
    if site.maker is not None and site.outer:
        how += f", {len(site.outer)} others multiplied back"
    return f"{choice.name}: {choice.plain_db:.1f} to {choice.sqnr_db:.1f} dB, {how}"


def _refusal(site: Site, reason: str) -> Refusal:
    return Refusal(_RULE, site.root.name, reason, source_line(site.root))


def _shared(weight: Weight) -> Refusal:
    node = weight.readers[0]
    reason = f"{len(weight.readers)} operators read its weight and would have to share a scale"
    return Refusal(_RULE, node.name, reason, source_line(node))
