"""Round a layer's weights one input after another, each error repaired by the inputs to come.

Rewrite:
    W  ->  dequantize(Q, s, z),   min ||W X - W' X||^2
    for each input i:   q = Q(w_i) (0 where the weight is typed sparse and was zero),
                        e = (w_i - q) / U_ii,  w_j -= e U_ij for j > i
    H = (2 / n) X X^T + d I,   d = damping * mean(diag H),   H^-1 = U^T U
Shapes:       W: [O, I], X: [I, n]; H: [I, I]. A convolution is a linear layer on its windows, one
              per group of channels.
Requires:     calibrated inputs. The layers are taken in the order of the program and read what the
              rounded layers before them give (see lockstep), so that no statistic is stale.
Contract:     lossy; the sum of e^2 / 2 is exactly the output error tr(D H D^T) / 2 of the layer.
Cost:         O(I^3 + O I^2) per layer, one run over the calibration inputs; memory I^2 and the
              live values of all batches.
Failures:     a table that is embedding and output layer at once is rounded before anything else
              runs, so its H comes from the float program, plus a multiple of the identity for
              the rows it is looked up by. Dead inputs (H_ii = 0) get a weight of 0. Columns may be
              taken in the order of diag H; scales are those of the original order, so that no
              index is needed at run time.
Source:       Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
              Transformers", ICLR 2023, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.quantize.weights import Codes
from planish.passes.quantize.where import Where
from planish.passes.rounding.clipping import clipped_ranges, fitted, spread_rows
from planish.passes.rounding.columns import BATCH, inverse_factor, sweep
from planish.passes.rounding.hqq import Hqq
from planish.passes.rounding.layerwise import Factors, round_in_sequence
from planish.passes.rounding.round_weights import WeightType
from planish.passes.rounding.targets import find_weights, required

_ROWS = 512  # at a time, so that a batch of columns stays in the cache


def gptq(
    rows: Tensor,
    h: Tensor,
    scheme: QuantScheme,
    *,
    damping: float = 0.01,
    reorder: bool = True,
    static: bool = True,
    clip: bool = True,
    fit: bool = True,
    factors: Factors | None = None,
    kept: Tensor | None = None,
) -> tuple[Codes, float]:
    """Round one matrix.

    Args:
        rows: float ``[O, I]``.
        h: ``(2 / n) X X^T``, ``[I, I]``.
        scheme: blocks along axis 1, or channels along axis 0.
        damping: share of the mean of diag H that is added to it.
        reorder: take the inputs in the order of falling diag H; needs ``static`` scales.
        static: scales come from the original weights; else from the weights as the errors of
            earlier blocks have left them.
        clip: cut each group's range where that lowers its squared error.
        fit: choose the scales of blocks once more, for the codes found; see ``fitted``.
        factors: keeps the factor of H for other matrices on the same inputs.
        kept: what may be nonzero, bool ``[O, I]``; all else becomes exactly zero.

    Returns:
        The integers, and ``tr(D H D^T) / 2`` with the damping in H.
    """
    if reorder and not static:
        raise ValueError("columns can be reordered only with static scales")
    factors = {} if factors is None else factors
    if static and len(rows) > _ROWS:
        masks = [None] * -(-len(rows) // _ROWS) if kept is None else kept.split(_ROWS)
        parts = [
            gptq(part, h, scheme, damping=damping, reorder=reorder, clip=clip, fit=fit,
                 factors=factors, kept=mask)
            for part, mask in zip(rows.split(_ROWS), masks, strict=True)
        ]  # fmt: skip
        return _joined([codes for codes, _ in parts]), sum(loss for _, loss in parts)
    h, dead = h.double().clone(), h.diagonal() == 0
    kept = torch.ones_like(rows, dtype=torch.bool) if kept is None else kept
    rows = torch.where(kept & ~dead, rows.float(), 0)
    order, factor = _factor(h, dead, damping, reorder, factors)
    ranges = _searched(scheme) if clip else _plain(scheme)
    scale, zero = ranges(rows, h)
    scales, zeros = (spread_rows(p, rows, scheme).float().contiguous() for p in (scale, zero))
    scales, zeros = scales.t()[order].contiguous(), zeros.t()[order].contiguous()
    low, high = scheme.range
    stays = kept.t()[order].contiguous()

    def round_column(column: Tensor, i: int) -> Tensor:
        s, z = scales[i], zeros[i]
        # What earlier errors gave to a masked weight is an error of its own, repaired by the rest.
        return torch.where(stays[i], (((column / s).round() + z).clamp(low, high) - z) * s, 0)

    def regroup(w: Tensor, i: int) -> None:
        if scheme.granularity == "block" and i % scheme.block_size == 0:
            stop = min(i + scheme.block_size, w.shape[1])
            s, z = ranges(w[:, i:stop].contiguous(), h[i:stop, i:stop])
            group = i // scheme.block_size
            scale[:, group], zero[:, group] = s[:, 0], z[:, 0]
            scales[i:stop], zeros[i:stop] = s.t(), z.t().float()

    # A group must not straddle two batches: its later columns would be repaired too late.
    batch = BATCH if static else max(BATCH, scheme.block_size)
    done, loss = sweep(
        rows[:, order], factor, round_column, batch=batch, before=None if static else regroup
    )
    real = torch.empty_like(done)
    real[:, order] = done
    codes = Codes(scheme.quantize(real, scale, zero), scale, zero, scheme)
    if fit and scheme.granularity == "block":
        return fitted(rows, h, codes, damping), loss
    return codes, loss


def _joined(parts: list[Codes]) -> Codes:
    """The rows of several parts, one below the other."""
    return Codes(
        torch.cat([c.codes for c in parts]),
        torch.cat([c.scale for c in parts]),
        torch.cat([c.zero_point for c in parts]),
        parts[0].scheme,
    )


def _searched(scheme: QuantScheme) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    # By the error of the weight: ranges that are best for its output when rounded to the nearest
    # are worse than these once errors are repaired by later columns (measured on SmolLM2).
    return lambda rows, h: clipped_ranges(rows, scheme, torch.eye(len(h)))


def _plain(scheme: QuantScheme) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda rows, h: scheme.qparams_of(rows)


def _factor(
    h: Tensor,
    dead: Tensor,
    damping: float,
    reorder: bool,
    known: Factors | None,
) -> tuple[Tensor, Tensor]:
    """The order of the columns, and the factor of the inverse of H in that order."""
    if known and reorder in known:
        return known[reorder]
    living = h + torch.diag(dead.double())
    order = torch.arange(len(h))
    if reorder:
        order = living.diagonal().argsort(descending=True, stable=True)
    found = order, inverse_factor(living[order][:, order], damping).float()
    if known is not None:
        known[reorder] = found
    return found


@dataclass(frozen=True, kw_only=True)
class Gptq(Pass):
    """Round weights so that each layer's output on calibrated inputs stays.

    Attributes:
        dtype: which integers.
        block_size: inputs that share a scale; 0 for one scale per output.
        symmetric: zero stands in the middle; None for what the type suggests.
        damping: share of the mean of diag H that is added to it.
        reorder: take inputs in the order of falling diag H.
        clip: cut each group's range where that lowers its squared error.
        embeddings: also tables that are only looked up in; of these each number is rounded alone.
        convolutions: also convolutions, per channel.
        padding_mask: input that is 1 for tokens and 0 for padding, which is left out of H.
        without_data: what to do where there is no calibration: fail, or round by hqq and say so.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "gptq"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained "
        "Transformers, ICLR 2023, sections 3.2 and 3.3",
    )

    dtype: WeightType = "uint4"
    block_size: int = 32
    symmetric: bool | None = None
    damping: float = 0.01
    reorder: bool = True
    clip: bool = True
    embeddings: bool = True
    convolutions: bool = False
    padding_mask: str = ""
    without_data: Literal["fail", "hqq"] = "fail"
    where: Where = field(default_factory=Where)

    def needs(self) -> frozenset[Fact]:
        """Calibration, but for where ``hqq`` may stand in."""
        return self.requires if self.without_data == "fail" else frozenset()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round every weight, in program order."""
        if context.calibration is None and self.without_data == "hqq":
            context.remark("there is no calibration data: hqq rounded, not gptq")
            return self._without_data().run(program, context)
        weights, refusals = find_weights(
            program, embeddings=self.embeddings, convolutions=self.convolutions, where=self.where
        )
        rewriter = Rewriter(program, self.name, context.sites)
        round_in_sequence(
            rewriter,
            required(weights, refusals, self.name),
            context,
            lambda w: w.scheme(self.dtype, self.block_size, self.symmetric),
            self._round,
            self.padding_mask,
        )
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))

    def _without_data(self) -> Hqq:
        return Hqq(
            dtype=self.dtype, block_size=self.block_size, symmetric=self.symmetric,
            embeddings=self.embeddings, convolutions=self.convolutions, where=self.where,
        )  # fmt: skip

    def _round(
        self, rows: Tensor, h: Tensor, scheme: QuantScheme, factors: Factors, kept: Tensor | None
    ) -> tuple[Codes, float]:
        return gptq(
            rows, h, scheme, damping=self.damping, reorder=self.reorder, clip=self.clip,
            factors=factors, kept=kept,
        )  # fmt: skip
