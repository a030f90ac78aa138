"""Choose zero points and scales so that most weights come out near, and outliers may be far off.

Rewrite:
    W  ->  dequantize(Q, s, z),   min over z and s of  sum |W - s (Q - z)|^p,   p < 1
    half-quadratic splitting: E stands for the error,
        E <- shrink(W - s (Q - z)),  shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
        z <- mean over the group of (Q - (W - E) / s),   Q <- clip(round(W / s + z)),
        beta <- 1.01 beta
Shapes:       W: [O, I] in groups of b along the inputs, or one group per output.
Requires:     constant weights; no data.
Contract:     lossy.
Cost:         O(W) per iteration, seconds for a model.
Failures:     a group of one outlier may not improve at all. The zero point of the method is a real
              number; integers in this program have integer zero points. So ``hqq`` is the method
              as published, and ``hqq_integer``, which the pass runs, keeps the zero point an
              integer and moves the scale instead: s <- sum (W - E)(Q - z) / sum (Q - z)^2, which is
              the same half-quadratic step in the other variable. The group's best step counts.
Source:       Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.ir.quantscheme import SMALLEST_SCALE, QuantScheme, spread
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.quantize.weights import Codes, group_sums
from planish.passes.quantize.where import Where
from planish.passes.rounding.round_weights import WeightType
from planish.passes.rounding.targets import find_weights, required, write_codes

_LARGEST_INVERSE = 2e4  # of a scale


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The proximal step of ``|.|^p``: small errors become 0, large ones lose a little.

    Zeros stay zeros, although ``|0|^(p-1)`` is infinite for p < 1.
    """
    size = x.abs()
    less = torch.where(size > 0, size.clamp(min=1e-30).pow(p - 1), torch.zeros_like(size)) / beta
    return x.sign() * (size - less).clamp(min=0)


def hqq(
    groups: Tensor, bits: int, *, p: float = 0.7, beta: float = 10.0, iterations: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """The method as published, with real zero points.

    Args:
        groups: float ``[groups, n]``.
        bits: of a code.
        p: of the norm; 1 and below favor many small errors over few large ones.
        beta: how strictly E is held to the error at the start.
        iterations: at most; it ends when the mean error falls no more.

    Returns:
        Codes as float ``[groups, n]``, scale and zero point ``[groups, 1]``.
    """
    largest = 2.0**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    inverse = (largest / (high - low).clamp(min=1e-12)).clamp(max=_LARGEST_INVERSE)
    zero = -low * inverse
    codes = (groups * inverse + zero).round().clamp(0, largest)
    best, least = (codes, zero), float("inf")
    for _ in range(iterations):
        codes = (groups * inverse + zero).round().clamp(0, largest)
        real = (codes - zero) / inverse
        error = float((groups - real).abs().mean())
        if error >= least:
            break
        best, least = (codes, zero), error
        e = shrink(groups - real, beta, p)
        zero = (codes - (groups - e) * inverse).mean(1, keepdim=True)
        beta *= 1.01
    return best[0], 1 / inverse, best[1]


def hqq_integer(
    weight: Tensor,
    scheme: QuantScheme,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    iterations: int = 20,
) -> Codes:
    """The same objective with integer zero points: the scales are what is moved.

    The error of no group is above that of rounding to the nearest by its range, in the norm p.

    Args:
        weight: float32, any shape of the scheme.
        scheme: which integers, and what shares a scale.
        p: of the norm.
        beta: how strictly E is held to the error at the start, for weights of scale 1 / q_max.
        iterations: how many.
    """
    scale, zero = scheme.qparams_of(weight)
    axis, block = scheme.layout(weight)
    z = spread(zero, weight, axis, block).float()
    best, least = scale, _norm(weight, scheme, scale, zero, p)
    for _ in range(iterations):
        codes = scheme.quantize(weight, scale, zero).float() - z
        wide = spread(scale, weight, axis, block)
        # In units of the scale, so that beta means the same for large and small weights.
        e = shrink(weight / wide - codes, beta, p)
        numerator = group_sums((weight / wide - e) * codes, scheme)
        denominator = group_sums(codes.square(), scheme)
        step = torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 1.0)
        moved = scale * step.reshape(scale.shape)
        scale = torch.where(moved > SMALLEST_SCALE, moved, scale)
        error = _norm(weight, scheme, scale, zero, p)
        better = error < least
        best, least = torch.where(better, scale, best), torch.minimum(error, least)
        beta *= 1.01
    return Codes(scheme.quantize(weight, best, zero), best, zero, scheme)


def _norm(weight: Tensor, scheme: QuantScheme, scale: Tensor, zero: Tensor, p: float) -> Tensor:
    real = scheme.dequantize(scheme.quantize(weight, scale, zero), scale, zero)
    return group_sums((weight - real).abs().pow(p), scheme).reshape(scale.shape)


@dataclass(frozen=True, kw_only=True)
class Hqq(Pass):
    """Round weights by scales of least error in a norm that forgives outliers; needs no data.

    Attributes:
        dtype: which integers.
        block_size: inputs that share a scale; 0 for one scale per output.
        symmetric: zero stands in the middle; None for what the type suggests.
        p: of the norm.
        iterations: how many half-quadratic steps.
        embeddings: also tables that are only looked up in.
        convolutions: also convolutions, per channel.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "hqq"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[tuple[str, ...]] = (
        "Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023",
    )

    dtype: WeightType = "uint4"
    block_size: int = 32
    symmetric: bool | None = None
    p: float = 0.7
    iterations: int = 20
    embeddings: bool = True
    convolutions: bool = False
    where: Where = field(default_factory=Where)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round every weight."""
        weights, refusals = find_weights(
            program, embeddings=self.embeddings, convolutions=self.convolutions, where=self.where
        )
        rewriter = Rewriter(program, self.name, context.sites)
        weights = required(weights, refusals, self.name)
        for done, weight in enumerate(weights):
            context.tell(done, len(weights))
            scheme = weight.scheme(self.dtype, self.block_size, self.symmetric)
            value = weight.value.float()
            codes = hqq_integer(value, scheme, p=self.p, iterations=self.iterations)
            scale = codes.scale.to(weight.value.dtype)
            integers = scheme.quantize(value, scale.float(), codes.zero_point)
            write_codes(rewriter, weight, Codes(integers, scale, codes.zero_point, scheme))
        context.tell(len(weights), len(weights))
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))
