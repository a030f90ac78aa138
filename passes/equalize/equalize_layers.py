"""Give the channels between two convolutions equal ranges, by scales that cancel.

Rewrite:
    W2 * f(W1 * x + b1)   ->   (W2 S) * f'(S^-1 W1 * x + S^-1 b1)
    s_i = sqrt(r1_i / r2_i),  r1_i = max|W1_i|,  r2_i = max|W2_:,i|: both become sqrt(r1_i r2_i)
    f' = f where f is the identity or relu (f(x / s) = f(x) / s);
    f = clamp(x, 0, c): f' = clamp(x, 0, c / s), one bound per channel
Shapes:       W1: [C, ..]; W2: [O, C, ..], or [C, 1, ..] depthwise, by whose rows it reads; s: [C].
              Also linears, whose channels are their last axis.
Requires:     constant weights and bias that nothing else reads; between the layers one activation
              and zero padding, each read once.
Contract:     exact: s cancels in real numbers.
Cost:         none with relu; a clamp with bounds per channel costs a minimum of its own, so relu6
              is refused unless `clamp=per-channel` asks for it.
Failures:     weights per channel have a range of their own each, so for them this balances little:
              it is for weights per tensor, and for values with quiet channels.
Source:       Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
              Correction", ICCV 2019, sections 4.1.1 to 4.1.3 (bias absorption with beta = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import argument, aten
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.equalize._chains import Chain, find_chain, reads_weight
from planish.passes.quantize.where import EVERYWHERE, Where

_RULE = "equalize"
_NEAR = 1.05  # a chain is balanced when no scale differs from 1 by more
_LARGEST = 1e4


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """``sqrt(r1 / r2)``; 1 where a channel is dead on either side.

    Args:
        first: r1, [C], largest absolute weight of each output channel of the first layer.
        second: r2, [C], of each input channel of the second.
    """
    dead = (first == 0) | (second == 0)
    ratio = (first.double() / second.double().clamp(min=1e-30)).sqrt()
    return torch.where(dead, torch.ones_like(ratio), ratio.clamp(1 / _LARGEST, _LARGEST))


def equalized(w1: Tensor, w2: Tensor, sweeps: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Two matrices [C, I] and [O, C] with ranges of C made equal, and the scale [C]."""
    total = torch.ones(len(w1), dtype=torch.float64)
    for _ in range(sweeps):
        scale = equalizing_scale(w1.abs().amax(1), w2.abs().amax(0))
        w1, w2, total = (w1 / scale[:, None]).to(w1), (w2 * scale).to(w2), total * scale
    return w1, w2, total


@dataclass(frozen=True, kw_only=True)
class EqualizeLayers(Pass):
    """Equalize the ranges of channels across consecutive layers.

    Attributes:
        clamp: what happens at relu6 and other clamps from 0, which no scale passes: "refuse", or
            "per-channel", which makes a clamp with a bound for each channel.
        sweeps: chains are gone over until all are balanced, at most so often.
        where: which first layers.
    """

    name: ClassVar[str] = "equalize-layers"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, "
        "ICCV 2019, section 4.1",
    )

    clamp: Literal["refuse", "per-channel"] = "refuse"
    sweeps: int = 20
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"{self.sweeps} sweeps do nothing")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the chains, find scales for all of them together, then write each."""
        self.where.check(program)
        chains: list[Chain] = []
        refusals: list[Refusal] = []
        for node in program.operators:
            if not reads_weight(node) or not self.where.takes(node):
                continue
            found = find_chain(node, program)
            if isinstance(found, Chain) and found.clamped and self.clamp == "refuse":
                found = (
                    "the clamp behind it bounds all channels alike, and a scale would move the "
                    "bound; clamp=per-channel gives each its own"
                )
            if isinstance(found, Chain):
                chains.append(found)
            elif found is not None:
                refusals.append(Refusal(_RULE, node.name, found, source_line(node)))
        rewriter = Rewriter(program, self.name, context.sites)
        for chain, scale in self._scales(program, chains):
            spread = float(torch.maximum(scale, 1 / scale).max())
            if spread < _NEAR:
                reason = "its channels are balanced already"
                refusals.append(Refusal(_RULE, chain.first.name, reason, source_line(chain.first)))
                continue
            with rewriter.site(_RULE, chain.first) as allowed:
                if allowed:
                    _write(rewriter, chain, scale)
                    rewriter.note(f"{chain.second.name}: scales of {spread:.3g} at most")
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))

    def _scales(self, program: Program, chains: list[Chain]) -> list[tuple[Chain, Tensor]]:
        """The scale of every chain, with those of its neighbors in force."""
        weights = {}
        for chain in chains:
            for node in (chain.first, chain.second):
                weight = program.constant(argument(node, "weight"))
                assert weight is not None  # find_chain looked
                weights[node] = weight.double()
        scales = {c: torch.ones(len(weights[c.first]), dtype=torch.float64) for c in chains}
        for _ in range(self.sweeps):
            worst = 1.0
            for chain in chains:
                w1, w2 = weights[chain.first], weights[chain.second]
                inputs = w2 if chain.depthwise else w2.transpose(0, 1)
                scale = equalizing_scale(
                    w1.flatten(1).abs().amax(1), inputs.flatten(1).abs().amax(1)
                )
                weights[chain.first] = w1 / _rows(scale, w1)
                weights[chain.second] = w2 * chain.columns(scale, w2)
                scales[chain] = scales[chain] * scale
                worst = max(worst, float(torch.maximum(scale, 1 / scale).max()))
            if worst < 1.001:
                break
        return list(scales.items())


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def _write(rewriter: Rewriter, chain: Chain, scale: Tensor) -> None:
    """Divide the outputs of the first layer and multiply the inputs of the second."""
    first, second = chain.first, chain.second
    _scaled(rewriter, first, "weight", lambda w: w / _rows(scale, w))
    _scaled(rewriter, first, "bias", lambda b: b / scale)
    _scaled(rewriter, second, "weight", lambda w: w * chain.columns(scale, w))
    if chain.clamped and chain.activation is not None:
        clamp = chain.activation
        rewriter.insert_before(clamp)
        bound = torch.full_like(scale, chain.bound) / scale
        shape = [-1, *[1] * chain.spatial]
        high = rewriter.constant(bound.reshape(shape).float(), f"{clamp.name}.bound", like=clamp)
        positive = rewriter.call(aten.relu.default, [clamp.args[0]], like=clamp)
        rewriter.replace(clamp, rewriter.call(aten.minimum.default, [positive, high], like=clamp))


def _scaled(rewriter: Rewriter, node: Node, role: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a constant of a layer by what ``change`` makes of it in float64."""
    source = argument(node, role)
    value = rewriter.program.constant(source)
    if value is None:
        return
    rewriter.insert_before(node)
    name = str(source.target)
    new = rewriter.constant(
        change(value.double()).to(value.dtype),
        name,
        like=source,
        layout=rewriter.program.layouts.get(name),  # it only scales: zeros stay
    )
    args = [new if a is source else a for a in node.args]
    kwargs = {k: new if a is source else a for k, a in node.kwargs.items()}
    rewriter.set_args(node, args, kwargs)
