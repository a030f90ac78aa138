"""Write weights in 8 or 4 bits, each number rounded to the nearest.

Rewrite:
    W  ->  dequantize(Q, s, z),   Q = saturate(round(W / s) + z)
    symmetric:   s = max(max W / q_max, -min W / -q_min), z = the middle
    asymmetric:  s = (max W - min W) / (q_max - q_min), z = round(q_min - min W / s), 0 included
Shapes:       W: [O, I] (embedding [V, D]; GPT-2's Conv1D [I, O]); s and z: [O, ceil(I / b)] in
              blocks of b along the inputs, [O] with block_size 0.
Requires:     constant, finite weights read by nothing but linears, constant matrix products,
              embeddings (and convolutions, per channel, where asked for).
Contract:     lossy. An error of at most s / 2 per weight (where it does not saturate), so twice
              the bits halve it 2^b times.
Cost:         with block b and float scales, 4 + 32 / b bits per weight (4 / b more with zero
              points): 5 at b = 32, 4.25 at 128.
Failures:     4 bits per channel ruin most models; small language models lose much in blocks too:
              see gptq, which takes the same options and calibrated inputs.
Source:       Jacob et al., "Quantization and Training of Neural Networks for Efficient
              Integer-Arithmetic-Only Inference", CVPR 2018, section 2.1; blocks as in
              ONNX DequantizeLinear, opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.quantize.weights import Codes, quantize_weight
from planish.passes.quantize.where import Where
from planish.passes.rounding.targets import find_weights, required, write_codes

WeightType = Literal["int8", "uint8", "int4", "uint4"]


def round_to_nearest(weight: Tensor, scheme: QuantScheme, *, search: bool = False) -> Codes:
    """Round a weight by the range of each group.

    Args:
        weight: float, any shape; finite. Halves keep scales of their own type.
        scheme: which integers, and what shares a scale.
        search: cut the range of each group where that lowers its squared error.
    """
    codes = quantize_weight(weight.float(), scheme, search=search)
    if weight.dtype == torch.float32:
        return codes
    scale = codes.scale.to(weight.dtype)
    integers = scheme.quantize(weight.float(), scale.float(), codes.zero_point)
    return Codes(integers, scale, codes.zero_point, scheme)


@dataclass(frozen=True, kw_only=True)
class RoundWeights(Pass):
    """Round weights to the nearest of 8- or 4-bit integers; needs no data.

    Attributes:
        dtype: which integers.
        block_size: inputs that share a scale; 0 for one scale per output. Convolutions always
            have one per output.
        symmetric: zero stands in the middle; None for what the type suggests: signed integers
            are symmetric, unsigned ones are not.
        search: cut the range of each group where that lowers its squared error.
        embeddings: also tables that are only looked up in. A table that is the output layer as
            well is rounded in any case, to one set of integers.
        convolutions: also convolutions.
        where: a choice among the operators.
    """

    name: ClassVar[str] = "round-weights"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[tuple[str, ...]] = (
        "Jacob et al., Quantization and Training of Neural Networks for Efficient "
        "Integer-Arithmetic-Only Inference, CVPR 2018, section 2.1",
    )

    dtype: WeightType = "int8"
    block_size: int = 32
    symmetric: bool | None = None
    search: bool = False
    embeddings: bool = True
    convolutions: bool = False
    where: Where = field(default_factory=Where)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round every weight."""
        weights, refusals = find_weights(
            program,
            embeddings=self.embeddings,
            convolutions=self.convolutions,
            where=self.where,
        )
        rewriter = Rewriter(program, self.name, context.sites)
        for weight in required(weights, refusals, self.name):
            scheme = weight.scheme(self.dtype, self.block_size, self.symmetric)
            codes = round_to_nearest(weight.value, scheme, search=self.search)
            write_codes(rewriter, weight, codes)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))
