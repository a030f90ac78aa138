"""Scale up the inputs that matter before weights are rounded, and cut the ranges of the rest.

Rewrite:
    y_i = x W_i^T   ->   y_i = (x / s) Q(W_i diag(s))^T,   s_j = mean|x_j|^r, normalized
    x / s is folded into what makes x (the gain of a norm, the rows of a linear, also of the value
    projection before an attention and of the up projection of a gated unit)
    then each group's range is cut by the share that lowers its output error
Shapes:       x: [..., I]; W_i: [O_i, I], all that read x share s: [I], positive.
Requires:     calibrated inputs; constant weights. A value that is read by more than these layers
              keeps s = 1.
Contract:     lossy. The scales alone change nothing in real numbers; r = 0 (s = 1) is tried as
              well, so the output error of the layers on one x is never above that of rounding to
              the nearest. It is not monotone in r: the grid is searched.
Cost:         one run over the calibration inputs for the scales, one for the rounding; for each
              step of the grid O(O I^2) per layer. Nothing at run time.
Failures:     none; where no maker can take the scale, the ranges are cut all the same.
Source:       Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
              Acceleration", MLSys 2024, sections 3.2 and 4; here the error is that of the layers
              that read x, by the matrix X^T X, so no sampled tokens are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.ir.errors import source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._edits import scale_inputs, scale_maker
from planish.passes.equalize._sites import Site, find_sites
from planish.passes.observe.feeding import required as required_spool
from planish.passes.quantize.weights import Codes
from planish.passes.quantize.where import Where
from planish.passes.rounding.clipping import clipped_ranges
from planish.passes.rounding.gptq import gptq
from planish.passes.rounding.layerwise import Factors, round_in_sequence
from planish.passes.rounding.lockstep import Lockstep, gram
from planish.passes.rounding.round_weights import WeightType
from planish.passes.rounding.targets import Weight, find_weights, required, row_scheme

_RULE = "scale-inputs"


def scales(mean: Tensor, ratio: float) -> Tensor:
    """``mean^ratio``, at least 1e-4, divided by the root of its largest times its smallest.

    Args:
        mean: mean of ``|x_j|``, ``[I]``.
        ratio: r; 0 gives ones.
    """
    s = mean.double().pow(ratio).clamp(min=1e-4)
    return (s / (s.max() * s.min()).sqrt()).float()


def output_error(
    weights: Sequence[Tensor], schemes: Sequence[QuantScheme], h: Tensor, s: Tensor
) -> float:
    """``sum_i |x (Q(W_i diag(s)) / s - W_i)^T|^2`` as tr(D H D^T) over all tokens.

    Args:
        weights: ``[O_i, I]`` each.
        schemes: row schemes, one for each.
        h: ``X^T X`` times any factor, ``[I, I]``.
        s: ``[I]``.
    """
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        d = scheme.fake(weight * s) / s - weight
        total += float(((d @ h) * d).sum())
    return total


@dataclass(frozen=True)
class Found:
    """The scale of one value.

    Attributes:
        scale: ``[I]``.
        ratio: of the mean; 0 for none.
        error: of the outputs with it.
        plain: of the outputs without.
    """

    scale: Tensor
    ratio: float
    error: float
    plain: float


def search_scale(
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    h: Tensor,
    mean: Tensor,
    steps: int = 20,
) -> Found:
    """The scale of least output error on the grid r = 0, 1 / steps, ...; see ``output_error``."""
    h = h.float()
    plain = output_error(weights, schemes, h, torch.ones_like(mean))
    best = Found(torch.ones_like(mean), 0.0, plain, plain)
    for step in range(1, steps):
        s = scales(mean, step / steps)
        error = output_error(weights, schemes, h, s)
        if error < best.error:
            best = Found(s, step / steps, error, plain)
    return best


@dataclass(frozen=True, kw_only=True)
class Awq(Pass):
    """Scale inputs by what activations they see, then round with searched ranges.

    Attributes:
        dtype: which integers.
        block_size: inputs that share a scale; 0 for one scale per output.
        symmetric: zero stands in the middle; None for what the type suggests.
        steps: of the grid of r between 0 and 1.
        rounding: "clip" cuts the range of each group by its output error and rounds to the
            nearest; "gptq" repairs each error by the inputs to come.
        embeddings: also tables that are only looked up in; of these each number is rounded alone.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "awq"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and "
        "Acceleration, MLSys 2024, sections 3.2 and 4",
    )

    dtype: WeightType = "uint4"
    block_size: int = 32
    symmetric: bool | None = None
    steps: int = 20
    rounding: Literal["clip", "gptq"] = "clip"
    embeddings: bool = True
    padding_mask: str = ""
    where: Where = field(default_factory=Where)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Scale, then round every weight."""
        weights, refusals = self._weights(program)
        required(weights, refusals, self.name)
        rewriter = Rewriter(program, self.name, context.sites)
        unscaled = self._scale(rewriter, weights, context)
        program = rewriter.finish()
        before = len(weights)
        weights, _ = self._weights(program)
        context = replace(context, tell=_behind(context, before))
        rounding = Rewriter(program, self.name, context.sites)
        rounder = _clipped if self.rounding == "clip" else _repaired
        round_in_sequence(rounding, weights, context, self._scheme, rounder, self.padding_mask)
        changes = (*rewriter.changes, *rounding.changes)
        return PassResult(rounding.finish(), changes, (*refusals, *unscaled))

    def _weights(self, program: Program) -> tuple[list[Weight], list[Refusal]]:
        return find_weights(program, embeddings=self.embeddings, where=self.where)

    def _scheme(self, weight: Weight) -> QuantScheme:
        return weight.scheme(self.dtype, self.block_size, self.symmetric)

    def _scale(
        self, rewriter: Rewriter, weights: list[Weight], context: PassContext
    ) -> list[Refusal]:
        """Find all scales by the program as it is, then fold them in."""
        required_spool(context.calibration)
        assert context.calibration is not None
        state = Lockstep(rewriter.program, context.calibration, self.padding_mask)
        found: list[tuple[Site, Found]] = []
        refusals = []
        done = 0
        for site in find_sites(rewriter.program, weights):
            context.tell(done, 2 * len(weights))
            done += len(site.weights)
            if site.maker is None or site.outer:
                because = "nothing that makes its input can take a scale"
                if site.maker is not None:
                    because = f"its input is read by {site.outer[0].name} as well"
                first = site.products[0]
                refusals.append(Refusal(_RULE, first.name, because, source_line(first)))
                continue
            found.append((site, self._search(state, site)))
        for site, best in found:
            if best.ratio:
                self._fold(rewriter, site, best)
        return refusals

    def _search(self, state: Lockstep, site: Site) -> Found:
        first = site.products[0]
        state.advance(first)
        h = gram(state.inputs_of(first), first)[0]
        count, total = 0, torch.zeros(len(h), dtype=torch.float64)
        for x in state.inputs_of(first):
            total += x[0].abs().double().sum(0)
            count += x.shape[1]
        rows = [weight.rows().float() for weight in site.weights]
        schemes = [row_scheme(self._scheme(weight)) for weight in site.weights]
        return search_scale(rows, schemes, h, (total / count).float(), self.steps)

    def _fold(self, rewriter: Rewriter, site: Site, best: Found) -> None:
        assert site.maker is not None
        with rewriter.site(_RULE, site.maker) as allowed:
            if not allowed:
                return
            # What makes the value may have been scaled as a reader itself: its numbers are new.
            scale_maker(rewriter, site.maker, 1 / best.scale)
            for product, weight in zip(site.products, site.weights, strict=True):
                scale_inputs(rewriter, product, _as_now(rewriter.program, product, weight),
                             best.scale)  # fmt: skip
            rewriter.note(
                f"r = {best.ratio:g} for {len(site.products)} layers: output error "
                f"{best.plain:.4g} to {best.error:.4g}"
            )


def _behind(context: PassContext, before: int) -> Callable[[int, int], None]:
    """``tell`` for steps that have others before them."""
    return lambda done, total: context.tell(before + done, before + total)


def _as_now(program: Program, product: object, weight: Weight) -> Weight:
    """A weight as earlier scales have left it: a layer may make one value and read another."""
    return next(w for w in find_weights(program)[0] if w.readers[0] is product)


def _clipped(
    rows: Tensor, h: Tensor, scheme: QuantScheme, factors: Factors, kept: Tensor | None
) -> tuple[Codes, float]:
    """Round by ranges of least output error; a zero is rounded to zero."""
    scale, zero = clipped_ranges(rows.float(), scheme, h)
    codes = Codes(scheme.quantize(rows, scale, zero), scale, zero, scheme)
    d = (codes.real() - rows).double()
    return codes, float(((d @ h) * d).sum()) / 2


def _repaired(
    rows: Tensor, h: Tensor, scheme: QuantScheme, factors: Factors, kept: Tensor | None
) -> tuple[Codes, float]:
    """Round by GPTQ."""
    return gptq(rows, h, scheme, factors=factors, kept=kept)
