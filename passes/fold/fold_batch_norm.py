"""Fold a batch norm in evaluation mode into the layer before it, or the layers after it.

Rewrite:
    bn(layer(x; W, b))  ->  layer(x; W', b')      W' = s W (rows),    b' = s b + t
    layer(bn(x); W, b)  ->  layer(x; W', b')      W' = W s (columns), b' = b + W t
    s = gamma / sqrt(var + eps),   t = beta - s mean
Shapes:       x: [B, C, ...]; gamma, beta, mean, var, s, t: [C]. The layer is a linear or a
              convolution, 1d to 3d, transposed or not, in G groups: W is [O, I/G, *kernel].
Requires:     evaluation mode; all numbers constant; nothing else reads what lies between, which
              may move the channel axis but not split it; W not shared. A batch norm before a
              convolution with padding needs t = 0, for the padded zeros come after it.
Contract:     exact: computed in float64, one rounding per number.
Cost:         one operator and 4 C numbers less; at most one new bias.
Fails:        ``PassError`` that names the channel where var + eps is not positive.
Source:       Jacob et al., Quantization and Training of Neural Networks for Efficient
              Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError
from planish.ir.ops import argument
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fold._axes import value
from planish.passes.fold._find import layer_before, layers_after
from planish.passes.fold._layers import CONVOLUTION, LINEAR, Fold

BATCH_NORM = torch.ops.aten.batch_norm.default

# Before a layer, t = beta - s mean is no longer taken from x itself but from sums of products of
# x, so a mean of many deviations cancels there. What that may cost: 6 of 24 bits, 1 of 11 or of 8.
_MAX_MEAN_IN_DEVIATIONS = {torch.float16: 2.0, torch.bfloat16: 2.0}
_MAX_MEAN_IN_DEVIATIONS_ELSE = 64.0


def scale_and_shift(
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    where: Node | None = None,
) -> tuple[Tensor, Tensor]:
    """``s`` and ``t`` such that ``bn(x) = s x + t``, in float64.

    Args:
        gamma: ``[C]``; None stands for ones.
        beta: ``[C]``; None stands for zeros.
        mean: ``[C]``.
        var: ``[C]``.
        eps: added to the variance.
        where: the batch norm, for the error.

    Raises:
        PassError: ``var + eps`` is not positive in some channel.
    """
    power = var.double() + eps
    bad = (~(power > 0)).nonzero().flatten().tolist()
    if bad:
        raise PassError(
            f"the variance of a batch norm plus its eps {eps} is {float(power[bad[0]])} in "
            f"channel {bad[0]}" + (f" and {len(bad) - 1} others" if bad[1:] else ""),
            where=where,
            hint="the model gives NaN or infinity there; repair its running_var",
        )
    scale = power.rsqrt() if gamma is None else gamma.double() / power.sqrt()
    shift = -scale * mean.double()
    return scale, shift if beta is None else shift + beta.double()


class _Statistics(Rule):
    """What both directions ask of the batch norm itself."""

    roots = frozenset({BATCH_NORM})

    def statistics(self, node: Node, program: Program) -> dict[str, Any] | Refusal:
        """The arguments of ``scale_and_shift``, or why they are not known."""
        if argument(node, "training"):
            return self.refuse(node, "it normalizes with the statistics of the batch")
        found: dict[str, Any] = {"eps": argument(node, "eps"), "where": node}
        roles = (("gamma", "weight"), ("beta", "bias"))
        for name, role in (*roles, ("mean", "running_mean"), ("var", "running_var")):
            source = argument(node, role)
            found[name] = program.constant(source)
            if found[name] is None and source is not None:
                return self.refuse(node, f"its {role} is computed, not constant")
        return found


class BatchNormIntoProducer(_Statistics):
    """``bn(layer(x)) -> layer'(x)``."""

    name: ClassVar[str] = "batch-norm-into-producer"

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A batch norm whose channels are those of a layer that only it reads."""
        statistics = self.statistics(node, program)
        if isinstance(statistics, Refusal):
            return statistics
        operand = node.args[0]
        assert isinstance(operand, Node)
        layer = layer_before(node, operand, 1, program, kinds=(LINEAR, CONVOLUTION))
        if isinstance(layer, str):
            return self.refuse(node, layer)
        fold = layer.scale_outputs(*scale_and_shift(**statistics))
        if isinstance(fold, str):
            return self.refuse(node, fold)
        return Match(node, {"fold": fold})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Write the layer anew and bypass the batch norm."""
        match["fold"].write(rewriter, match.root)
        rewriter.replace(match.root, match.root.args[0])


class BatchNormIntoConsumers(_Statistics):
    """``layer(bn(x)) -> layer'(x)``, for each layer that reads the batch norm."""

    name: ClassVar[str] = "batch-norm-into-consumers"

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A batch norm that only layers read, on the axis of their input channels."""
        statistics = self.statistics(node, program)
        if isinstance(statistics, Refusal):
            return statistics
        layers = layers_after(node, 1, program)
        if isinstance(layers, str):
            return self.refuse(node, layers)
        scale, shift = scale_and_shift(**statistics)
        deviations = _mean_in_deviations(statistics)
        limit = _MAX_MEAN_IN_DEVIATIONS.get(value(node).dtype, _MAX_MEAN_IN_DEVIATIONS_ELSE)
        if deviations > limit:
            reason = f"a mean is {deviations:.0f} deviations, which would cancel in the layer after"
            return self.refuse(node, reason)
        moves = shift if bool(shift.any()) else None
        folds = [layer.scale_inputs(scale, moves) for layer in layers]
        for fold in folds:
            if isinstance(fold, str):
                return self.refuse(node, fold)
        return Match(node, {"folds": folds})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Write the layers anew and bypass the batch norm."""
        folds: list[Fold] = match["folds"]
        for fold in folds:
            fold.write(rewriter, match.root)
        rewriter.replace(match.root, match.root.args[0])


def _mean_in_deviations(statistics: dict[str, Any]) -> float:
    """The largest ``|mean| / sqrt(var + eps)`` of the channels."""
    deviation = (statistics["var"].double() + statistics["eps"]).sqrt()
    return float((statistics["mean"].double().abs() / deviation).max())


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Fold batch norms into the linears and convolutions around them."""

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Jacob et al., Quantization and Training of Neural Networks for Efficient "
        "Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Producers first: that direction is exact at the border, too."""
        rules = (BatchNormIntoProducer(), BatchNormIntoConsumers())
        return self.apply_rules(program, context, rules)
