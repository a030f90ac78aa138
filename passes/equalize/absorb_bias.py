"""Move high biases through a relu into the bias of the layer behind it.

Rewrite:
    W2 * f(W1 * x + b1) + b2   ->   W2 * f(W1 * x + b1 - c) + (b2 + W2 c)
    c_i = max(0, mean_i - sigmas * deviation_i) of what the first layer gives
    f = relu or leaky_relu, for which f(y) = f(y - c) + c wherever y >= c
Shapes:       W1: [C, ..]; W2: [O, C, ..], or [C, 1, ..] depthwise; c: [C].
Requires:     calibration; constant weights and biases that nothing else reads; between the layers
              a relu alone, read once, and no padding: zeros around an image are no values less c.
Contract:     lossy: exact where y >= c, off by W2 (c - y) elsewhere (1 in 740 values of a Gaussian
              at 3 deviations).
Cost:         one sweep over the calibration inputs. Nothing at run time.
Failures:     channels whose values lie near zero have nothing to absorb, which is most of them
              behind a batch norm. relu6 is refused: its upper bound would have to move as well.
Source:       Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
              Correction", ICCV 2019, section 4.1.3; that mean and deviation are those of
              calibration inputs, not of a batch norm, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import argument
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._chains import Chain, find_chain, reads_weight
from planish.passes.equalize._rows import padding_name
from planish.passes.observe import observe
from planish.passes.quantize.operands import Slot, with_operands
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.where import EVERYWHERE, Where

_RULE = "absorb-bias"
_LEAST = 0.01  # of a channel's maximum; less is the rounding of what was absorbed before


def absorbed(mean: Tensor, deviation: Tensor, sigmas: float = 3.0) -> Tensor:
    """``max(0, mean - sigmas * deviation)`` of each channel.

    Args:
        mean: [C].
        deviation: [C], not negative.
        sigmas: how far below its mean a channel is taken to reach.
    """
    return (mean - sigmas * deviation).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class AbsorbBias(Pass):
    """Move what a channel always exceeds from one bias into the next.

    Attributes:
        sigmas: how far below its mean, in deviations, a channel is taken to reach.
        padding_mask: the input that is 0 at padding, which means leave out; "auto" takes one
            called attention_mask, null none.
        where: which first layers.
    """

    name: ClassVar[str] = "absorb-bias"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, "
        "ICCV 2019, section 4.1.3",
    )

    sigmas: float = 3.0
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.sigmas < 0:
            raise ValueError(f"sigmas is {self.sigmas}: what lies above the mean is no bound below")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the chains, see what their first layers give, and move biases."""
        self.where.check(program)
        chains: list[Chain] = []
        refusals: list[Refusal] = []
        for node in program.operators:
            if not reads_weight(node) or not self.where.takes(node):
                continue
            found = find_chain(node, program)
            if isinstance(found, Chain):
                found = _problem(found) or found
            if isinstance(found, Chain):
                chains.append(found)
            elif found is not None:
                refusals.append(_refuse(node, found))
        constants = self._constants(program, chains, context) if chains else []
        rewriter = Rewriter(program, self.name, context.sites)
        for chain, c in zip(chains, constants, strict=True):
            if not bool(c.any()):
                reason = f"no channel stays {self.sigmas:g} deviations above zero"
                refusals.append(_refuse(chain.first, reason))
                continue
            with rewriter.site(_RULE, chain.first) as allowed:
                if allowed:
                    _write(rewriter, chain, c)
                    count = int((c > 0).sum())
                    rewriter.note(f"{count} of {len(c)} channels, by {float(c.max()):.3g} at most")
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))

    def _constants(
        self, program: Program, chains: list[Chain], context: PassContext
    ) -> list[Tensor]:
        """``c`` of every chain, [C] in float64. Moving one bias moves no other layer's values."""
        axes = [(c.first.name, c.first.meta["val"].dim() - 1 - c.spatial) for c in chains]
        seen = observe(
            program,
            [name for name, _ in axes],
            context.calibration,
            padding_mask=padding_name(program, self.padding_mask),
            per_channel=axes,
            tell=context.tell,
        )
        for sentence in seen.remarks:
            context.remark(sentence)
        found = []
        for name, axis in axes:
            stats = seen.channel(name, axis)
            mean = stats.mean.double()
            variance = (stats.mean_square.double() - mean.square()).clamp(min=0)
            c = absorbed(mean, variance.sqrt(), self.sigmas)
            found.append(torch.where(c < _LEAST * stats.absmax, torch.zeros_like(c), c))
        return found


def _problem(chain: Chain) -> str | None:
    """Why nothing can be absorbed in a chain."""
    if chain.activation is None:
        return "no relu follows it, so the next layer's scale has its mean already"
    if chain.clamped:
        return "the clamp behind it bounds all channels alike, and absorbing would move the bound"
    padding = argument(chain.second, "padding") if chain.spatial else 0
    zero = padding in (0, "valid") or (isinstance(padding, list | tuple) and not any(padding))
    if not zero or chain.second.args[0] is not chain.activation:
        return "zeros are padded before the layer behind it, which are no values less a constant"
    return None


def _refuse(node: Node, reason: str) -> Refusal:
    return Refusal(_RULE, node.name, reason, source_line(node))


def _write(rewriter: Rewriter, chain: Chain, c: Tensor) -> None:
    """Take a constant from the first bias, and give what it makes to the second."""
    weight = rewriter.program.constant(argument(chain.second, "weight"))
    assert weight is not None  # find_chain looked
    taps = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    _moved(rewriter, chain.first, -c)
    _moved(rewriter, chain.second, taps[:, 0] * c if chain.depthwise else taps @ c)


def _moved(rewriter: Rewriter, layer: Node, by: Tensor) -> None:
    """Add to the bias of a layer, which may have had none."""
    source, weight = argument(layer, "bias"), argument(layer, "weight")
    old = rewriter.program.constant(source)
    value = by if old is None else old.double() + by
    rewriter.insert_before(layer)
    bias = rewriter.constant(
        value.to((weight if old is None else source).meta["val"].dtype),
        f"{layer.name}.bias" if old is None else str(source.target),
        like=layer if old is None else source,
    )
    rewriter.set_args(layer, *with_operands(layer, {Slot("bias"): bias}))
