"""Write the weights that few bits hurt most in more of them, within a budget of bits per weight.

Rewrite:
    W  ->  dequantize(Q, s, z) in ``dtype``,   for the weights that are chosen
    chosen by falling  n_i / b_i  while  sum of bits <= mean_bits * sum of numbers
    n_i: the noise that W_i in ``low_dtype`` makes at the outputs of the model
    b_i: the bits that ``dtype`` takes more than ``low_dtype``, with scales and zero points
Shapes:       W: [O, I] (embedding [V, D]; GPT-2's Conv1D [I, O]).
Requires:     constant, finite weights. What is not chosen stays float: a pass behind this one
              (gptq, hqq, round-weights) writes it in ``low_dtype``.
Contract:     lossy.
Cost:         with calibration, one forward and ``projections`` backward runs for each of
              ``batches`` batches, whatever the number of weights (``quantize.sensitivity``), the
              noise of different tokens taken as independent. Without, O(W).
Failures:     without calibration n_i is the relative error of the weight, which says nothing of
              what the layers behind it do with the error. Noise is measured by rounding to the
              nearest; a pass that rounds better removes more of it in some layers than in others.
Source:       Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks",
              NeurIPS 2020, section 3 (bits by sensitivity within a budget).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

from planish.ir.errors import MisusedPassError
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, OperatorError, Pass, PassContext, PassResult
from planish.passes.quantize.one_by_one import counted
from planish.passes.quantize.outputs import Padding
from planish.passes.quantize.ranges import AUTO, padding_input
from planish.passes.quantize.sensitivity import NotDerivableError, sensitivities
from planish.passes.quantize.weights import decibels
from planish.passes.quantize.where import Where
from planish.passes.rounding.round_weights import WeightType, round_to_nearest
from planish.passes.rounding.targets import Weight, find_weights, required, write_codes

_SCALE_BITS = 32
_CHANNEL_BLOCK = 128  # in which files repeat the one scale of an output


def stored_bits(weight: Weight, scheme: QuantScheme) -> int:
    """What a weight takes in a file: whole blocks, a float scale each, zero points."""
    rows = weight.rows()
    block = scheme.block_size or _CHANNEL_BLOCK
    blocks = rows.shape[0] * -(-rows.shape[1] // block)
    each = block * scheme.storage_bits + _SCALE_BITS
    return blocks * (each if scheme.symmetric else each + scheme.storage_bits)


def affordable(
    noise: Mapping[str, float], extra: Mapping[str, int], budget: float
) -> tuple[str, ...]:
    """The names of most noise per extra bit that fit into a budget together, in that order."""
    chosen = []
    for name in sorted(noise, key=lambda n: (-noise[n] / max(extra[n], 1), n)):
        if noise[name] > 0 and extra[name] <= budget:
            chosen.append(name)
            budget -= extra[name]
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class ChooseBits(Pass):
    """Write the weights that few bits hurt most in more bits; measured, or guessed without data.

    Attributes:
        dtype: what the chosen weights are written in.
        block_size: of these, inputs that share a scale.
        low_dtype: what the pass behind this one writes the others in.
        low_block_size: of those.
        mean_bits: of all weights together, with scales and zero points: the size of the file is
            about this over 32.
        batches: calibration batches to measure with, at most.
        projections: backward runs for each.
        embeddings: also tables that are only looked up in.
        where: a choice among the operators.
        padding_mask: input that is 0 where there is padding; None for none.
    """

    name: ClassVar[str] = "choose-bits"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[tuple[str, ...]] = (
        "Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, "
        "NeurIPS 2020, section 3",
    )

    dtype: WeightType = "int8"
    block_size: int = 128
    low_dtype: WeightType = "uint4"
    low_block_size: int = 32
    mean_bits: float = 5.82
    batches: int = 2
    projections: int = 2
    embeddings: bool = True
    where: Where = field(default_factory=Where)
    padding_mask: str | None = AUTO

    def __post_init__(self) -> None:
        if self.batches < 1 or self.projections < 1:
            raise ValueError("no batch or no projection measures nothing")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Measure, choose, round the chosen.

        Raises:
            NothingToDoError: there is no weight.
            MisusedPassError: ``mean_bits`` is below what ``low_dtype`` takes.
        """
        weights, refusals = find_weights(program, embeddings=self.embeddings, where=self.where)
        if not required(weights, refusals, self.name):
            context.remark("all weights are quantized already: there is nothing to choose")
            return PassResult(program, (), tuple(refusals))
        low = {w.name: stored_bits(w, self._low(w)) for w in weights}
        high = {w.name: stored_bits(w, self._high(w)) for w in weights}
        numbers = sum(w.value.numel() for w in weights)
        budget = self.mean_bits * numbers - sum(low.values())
        if budget < 0 and self.mean_bits >= self._least():
            context.remark(
                f"rows of weights fill up blocks of {self.low_block_size} so badly that "
                f"{self.low_dtype} alone takes {sum(low.values()) / numbers:.2f} bits, over the "
                f"{self.mean_bits:g} allowed: none is written in {self.dtype}"
            )
            return PassResult(program, (), tuple(refusals))
        if budget < 0:
            raise MisusedPassError(
                f"mean_bits is {self.mean_bits:g}, and {self.low_dtype} in blocks of "
                f"{self.low_block_size} takes {sum(low.values()) / numbers:.3f}",
                hint="raise mean_bits, or low_block_size both here and in the pass behind",
            )
        noise, errors, how = self._noise(program, weights, context)
        extra = {name: high[name] - low[name] for name in low}
        chosen = affordable(noise, extra, budget)
        rewriter = Rewriter(program, self.name, context.sites)
        for weight in weights:
            if weight.name in chosen:
                codes = round_to_nearest(weight.value, self._high(weight), search=True)
                said = f"{self.low_dtype} would make {_db(noise[weight.name])} of noise"
                write_codes(rewriter, weight, codes, said)
        spent = sum(high[n] if n in chosen else low[n] for n in low) / numbers
        context.remark(
            f"{len(chosen)} of {len(weights)} weights are in {self.dtype}, blocks of "
            f"{self.block_size}, the others are left for {self.low_dtype}, blocks of "
            f"{self.low_block_size}: {spent:.2f} bits on the mean, {self.mean_bits:g} allowed; "
            f"by {how}; in {self.dtype}: {', '.join(chosen) or 'none fits'}"
        )
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals), errors)

    def _least(self) -> float:
        """Bits that a number of ``low_dtype`` takes where all blocks are full."""
        bits = int(self.low_dtype.removeprefix("u").removeprefix("int"))
        zero = bits if self.low_dtype.startswith("u") else 0
        return bits + (_SCALE_BITS + zero) / (self.low_block_size or _CHANNEL_BLOCK)

    def _low(self, weight: Weight) -> QuantScheme:
        return weight.scheme(self.low_dtype, self.low_block_size, None)

    def _high(self, weight: Weight) -> QuantScheme:
        return weight.scheme(self.dtype, self.block_size, None)

    def _noise(
        self, program: Program, weights: list[Weight], context: PassContext
    ) -> tuple[dict[str, float], tuple[OperatorError, ...], str]:
        """Noise that each weight makes in few bits, what was measured, and how."""
        trial = Rewriter(program.clone(), self.name)
        own: dict[str, float] = {}
        for weight in find_weights(trial.program, embeddings=self.embeddings, where=self.where)[0]:
            codes = round_to_nearest(weight.value, self._low(weight))
            own[weight.name] = _energy(decibels(weight.value.float(), codes.real().float()))
            write_codes(trial, weight, codes)
        if context.calibration is None:
            return own, (), "the relative error of each weight, since there is no calibration data"
        mask = padding_input(program) if self.padding_mask == AUTO else self.padding_mask
        owners = {reader.name: weight.name for weight in weights for reader in weight.readers}
        batches = list(islice(context.calibration, self.batches))
        try:
            errors = sensitivities(
                program, trial.finish(), tuple(owners),
                counted(batches, context.tell, len(batches)), generator=context.generator,
                padding=Padding.named(program, mask), projections=self.projections,
                independent_rows=True,
            )  # fmt: skip
        except NotDerivableError:
            return (
                own,
                (),
                "the relative error of each weight, since outputs have no derivative",
            )
        noise = dict.fromkeys(own, 0.0)
        for error in errors:
            noise[owners[error.node]] += _energy(error.output_db)
        return noise, errors, f"their noise at the outputs on {len(batches)} batches"


def _energy(db: float) -> float:
    return 10 ** (-db / 10)  # of an infinite ratio: 0


def _db(energy: float) -> str:
    return f"{-10 * math.log10(energy):.1f} dB"
