"""Round weights up or down by what is learned from the inputs of each layer.

Rewrite:
    W  ->  dequantize(Q, s, 0),  Q = clip(floor(W / s) + h),  h in {0, 1}
    h minimizes the error of the layer's outputs, tr((s Q - W) H (s Q - W)^T) with H = X X^T over
    what the layer reads once the layers before it are rounded
Shapes:       W: [O, I], a convolution's as [G, O/G, I/G * kernel]; H: [G, I, I]; s: [O] or blocks.
Requires:     calibration; constant weights of linears and convolutions.
Contract:     lossy: the outputs on the calibration inputs are never farther off than by rounding to
              the nearest.
Cost:         `iterations` products [O, I] x [I, I] for each layer, then `sweeps` of coordinate
              descent; all batches keep their live values meanwhile. Nothing at run time.
Failures:     fewer rows of calibration than inputs of a layer: it fits noise. `damping` helps.
              A table that is embedding and output layer at once is rounded before anything else
              runs, so its H is that of the program as it came (see layerwise).
Source:       Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML
              2020, equation 21 with the quadratic loss of equation 13; that coordinate descent
              finishes what gradient descent began is ours. A nonlinearity behind the layer has no
              part in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme, spread
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._rows import padding_name
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.weights import Codes, quantize_weight
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.layerwise import mask_of, tied_grams
from planish.passes.rounding.learned import Learning, learn_rounding, output_error
from planish.passes.rounding.lockstep import Lockstep, gram, operand_key
from planish.passes.rounding.targets import (
    Weight,
    find_weights,
    required,
    row_scheme,
    write_codes,
)


def adaround(
    rows: Tensor,
    h: Tensor,
    scheme: QuantScheme,
    learning: Learning,
    *,
    damping: float = 0.01,
    kept: Tensor | None = None,
) -> tuple[Codes, float]:
    """Round one matrix.

    Args:
        rows: [O, I].
        h: [G, I, I], of each group of O/G rows; G is 1 but for convolutions in groups.
        scheme: with axis 0 (channels) or 1 (blocks).
        learning: how.
        damping: share of the mean of diag H that is added to it.
        kept: what may be nonzero, bool [O, I]; the rows are zero elsewhere, and stay so.

    Returns:
        The integers, and by how many decibels the error of the outputs fell against the nearest.
    """
    groups = h.shape[0]
    nearest = quantize_weight(rows, scheme, search=scheme.storage_bits < 8)
    scale = _spread(nearest.scale, rows, scheme, groups)
    zero = _spread(nearest.zero_point, rows, scheme, groups).float()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    damped = h + damping * mean[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype)
    split = rows.float().unflatten(0, (groups, -1))
    free = None if kept is None else kept.unflatten(0, (groups, -1))
    found = learn_rounding(split / scale + zero, damped, scale, scheme.range, learning, free)
    codes = Codes(found.flatten(0, 1).to(scheme.storage), nearest.scale, nearest.zero_point, scheme)
    errors = [
        float(output_error((c.real() - rows).unflatten(0, (groups, -1)).double(), damped).sum())
        for c in (nearest, codes)
    ]
    ratio = torch.tensor(max(errors[0], 1e-30) / max(errors[1], 1e-30))
    return codes, float(10 * ratio.log10())


def _spread(p: Tensor, rows: Tensor, scheme: QuantScheme, groups: int) -> Tensor:
    """A scale or zero point for every element of ``[outputs, inputs]``, as [G, O/G, I]."""
    wide = spread(p, rows, *scheme.layout(rows)).expand_as(rows)
    split: Tensor = wide.unflatten(0, (groups, -1))
    return split


@dataclass(frozen=True, kw_only=True)
class AdaRound(Pass):
    """Learn the rounding of weights, layer by layer.

    Attributes:
        dtype: which integers.
        block_size: inputs that share a scale; 0 for one scale per output.
        symmetric: zero stands in the middle; None for what the type suggests.
        iterations: steps of gradient descent for each layer; 0 leaves it to coordinate descent.
        sweeps: of coordinate descent behind it.
        damping: share of the mean of diag H that is added to it.
        convolutions: also convolutions, per channel.
        padding_mask: the input that is 0 at padding, which is left out of H; "auto" takes one
            called attention_mask, null none.
        where: which operators.
    """

    name: ClassVar[str] = "adaround"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020",
    )

    dtype: Literal["int8", "uint8", "int4", "uint4"] = "int8"
    block_size: int = 0
    symmetric: bool | None = None
    iterations: int = 100
    sweeps: int = 2
    damping: float = 0.05
    convolutions: bool = True
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.sweeps < 0 or self.iterations + self.sweeps == 0:
            raise ValueError("iterations and sweeps are not negative, and one of them is not 0")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round every weight in program order; each layer reads what the rounded ones give."""
        weights, refusals = find_weights(
            program, embeddings=False, convolutions=self.convolutions, where=self.where
        )
        weights = required([w for w in weights if w.products], refusals, self.name)
        assert context.calibration is not None  # required
        rewriter = Rewriter(program, self.name, context.sites)
        mask = padding_name(program, self.padding_mask) or ""
        tied = tied_grams(rewriter, weights, context, mask)
        state = Lockstep(program, context.calibration, mask)
        learning = Learning(iterations=self.iterations, sweeps=self.sweeps)
        last: tuple[object, Tensor] | None = None
        for done, weight in enumerate(weights):
            context.tell(done, len(weights))
            reader = weight.products[0]
            h = tied.get(weight.name)
            if h is None:
                state.advance(reader)
                key = operand_key(reader)
                if last is None or last[0] != key:
                    last = key, gram(state.inputs_of(reader), reader)
                h = last[1]
            scheme = weight.scheme(self.dtype, self.block_size, self.symmetric)
            codes, gain = adaround(
                weight.rows(), h, row_scheme(scheme), learning, damping=self.damping,
                kept=mask_of(weight),
            )  # fmt: skip
            write_codes(rewriter, weight, _shaped(weight, codes, scheme), f"{gain:+.1f} dB learned")
        context.tell(len(weights), len(weights))
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _shaped(weight: Weight, codes: Codes, scheme: QuantScheme) -> Codes:
    """Integers of rows in the shape of the weight."""
    scale, zero = codes.scale.to(weight.value.dtype), codes.zero_point
    if scheme.granularity == "block":
        scale, zero = weight.from_blocks(scale), weight.from_blocks(zero)
    return Codes(weight.from_rows(codes.codes), scale, zero, scheme)
