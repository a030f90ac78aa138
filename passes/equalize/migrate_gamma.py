"""Take the gain of a norm out of the values that are quantized, and into the weights behind.

Rewrite:
    norm(x; g, b)   ->   norm(x; 1, b / g),   W_i -> W_i diag(g)
    whatever else reads the norm, such as a residual, reads its new output times g
Shapes:       x: [.., I]; g, b: [I]; W_i: [O_i, I].
Requires:     a gain that is constant; products with constant weights that nothing else reads.
Contract:     exact: g (x + b / g) = g x + b.
Cost:         one multiplication where something besides the products reads the norm.
Failures:     where a gain is near 0, b / g would be huge: such channels keep it. Gains that damp
              outliers instead of raising them make quantizing worse: `smooth-quant` measures.
Source:       Wei et al., "Outlier Suppression: Pushing the Limit of Low-bit Transformer Language
              Models", NeurIPS 2022, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.ir.errors import source_line
from planish.ir.ops import argument
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.equalize._edits import scale_site
from planish.passes.equalize._sites import NORMS, Site, find_sites
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.targets import find_weights

_RULE = "migrate-gamma"
_TINY = 1e-3  # of the largest gain


def migrated(gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm's new gain and bias, and what the weights are multiplied by.

    Args:
        gain: [I].
        bias: [I] or None.
    """
    moved = gain.double()
    moved = torch.where(moved.abs() < _TINY * moved.abs().max(), torch.ones_like(moved), moved)
    new_bias = None if bias is None else (bias.double() / moved).to(bias.dtype)
    return (gain.double() / moved).to(gain.dtype), new_bias, moved


@dataclass(frozen=True, kw_only=True)
class MigrateGamma(Pass):
    """Move the gains of norms into the weights that read them.

    Attributes:
        explicit: whether a multiplication may be added for what else reads a norm.
        where: which products take part.
    """

    name: ClassVar[str] = "migrate-gamma"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Wei et al., Outlier Suppression, NeurIPS 2022, section 4.1",
    )

    explicit: bool = True
    where: Where = EVERYWHERE

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Look at every norm that products read."""
        weights, refusals = find_weights(program, embeddings=False, where=self.where)
        rewriter = Rewriter(program, self.name, context.sites)
        for site in find_sites(program, weights):
            if site.root.target not in NORMS:
                continue
            reason = self._obstacle(site, program)
            if reason is not None:
                refusals.append(Refusal(_RULE, site.root.name, reason, source_line(site.root)))
                continue
            gain = program.constant(argument(site.root, "weight"))
            assert gain is not None  # the guards looked
            _, _, moved = migrated(gain, None)
            with rewriter.site(_RULE, site.root) as allowed:
                if allowed:
                    scale_site(rewriter, site, moved)
                    rewriter.note(f"gains of up to {float(moved.abs().max()):.3g}")
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))

    def _obstacle(self, site: Site, program: Program) -> str | None:
        if site.maker is None:
            return "it normalizes more than one axis"
        source = argument(site.root, "weight")
        gain = program.constant(source)
        if gain is None:
            return "it has no gain" if source is None else "its gain is not constant"
        if bool((migrated(gain, None)[2] == 1).all()):
            return "its gain is 1 already, or too near to 0"
        if site.outer and not self.explicit:
            return f"{len(site.outer)} others read it, which would take a multiplication"
        return None
