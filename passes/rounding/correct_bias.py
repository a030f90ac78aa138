"""Move the mean error that quantizing makes in each output channel into the bias.

Rewrite:
    op(dq(q(x)), dq(@Q), b)   ->   op(dq(q(x)), dq(@Q), b + E[y] - E[y'])
    y what the operator gives in the program before quantizing, y' what it gives now, where all
    operators before it are corrected already
Shapes:       y: [.., C] (linear) or [N, C, ..] (convolution); b, E[y]: [C].
Requires:     calibration; a run in which the program was quantized, for E[y].
Contract:     lossy: the error of the mean goes, that of each element around it stays. A bias that
              was int32 stays int32 by the same scale, one that was not there becomes int32 where
              the scales of the products are known, and float elsewhere.
Cost:         the calibration inputs once through the float program and once through this one;
              every batch keeps its live values meanwhile; then the last quarter of them three times
              or a few more. Nothing at run time.
Failures:     means of few inputs, or of inputs unlike those to come, are none: the error that is
              left behind many layers differs from input to input. So the means are taken of three
              quarters of the batches, and the last quarter judges: first each bias by the error of
              its operator, then all of them by the outputs of each batch. Where the mean gain is
              not above twice its standard error, only those of the first half of the operators are
              tried, and so on; if none helps nothing is written. With fewer than four batches
              nothing judges, which a remark says.
Source:       Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
              Correction", ICCV 2019, section 4.2 (empirical); that a part judges is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import MisusedPassError, source_line
from planish.ir.ops import argument
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._rows import padding_name
from planish.passes.observe.feeding import Padding
from planish.passes.quantize.operands import operands_of
from planish.passes.quantize.outputs import Judge
from planish.passes.quantize.outputs import Padding as Counted
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.restore import quantized_operators
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.biases import NewBias, write_bias
from planish.passes.rounding.mean_errors import Batches, corrections, means

_RULE = "correct-bias"


@dataclass(frozen=True, kw_only=True)
class CorrectBias(Pass):
    """Correct biases for the mean error of quantized products.

    Attributes:
        batches: calibration batches that are looked at, at most; 0 for all.
        padding_mask: the input that is 0 at padding, which means leave out; "auto" takes one
            called attention_mask, null none.
        where: which operators.
    """

    name: ClassVar[str] = "correct-bias"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, "
        "ICCV 2019, section 4.2",
    )

    batches: int = 0
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the mean errors in program order, then write the biases.

        Raises:
            MisusedPassError: nothing is quantized, or what was before is not known.
        """
        self.where.check(program)
        targets, refusals = _targets(program, self.where)
        if not targets and not refusals:
            raise MisusedPassError(
                "nothing is quantized, so there is no error to correct",
                hint="run it behind quantize",
            )
        if context.float_program is None:
            raise MisusedPassError(
                "the program came to it quantized, so its means in floating point are not known",
                hint="run it in one recipe with quantize, behind it",
            )
        assert context.calibration is not None  # required
        inputs: list[Any] = list(context.calibration)[: self.batches or None]
        mask = padding_name(program, self.padding_mask)
        batches = Batches.split(inputs, Padding.of(program, mask))
        floating = context.float_program()
        known = {n.name for n in floating.operators if n.target in {t.target for t in targets}}
        for node in [t for t in targets if t.name not in known]:
            refusals.append(_refuse(node, "the program before has no such operator"))
            del targets[node]
        halvings = len(targets).bit_length() if batches.held else 0
        total = len(inputs) + len(targets) + halvings

        def tell(batches: int, operators: int = 0) -> None:
            context.tell(batches + operators, total)

        axes = {n.name: axis for n, axis in targets.items()}
        reference = means(floating, axes, batches, tell)
        found = corrections(program, targets, reference, batches, tell)
        refusals += [_refuse(n, why) for n, why in found.items() if isinstance(why, str)]
        new = {n: bias for n, bias in found.items() if isinstance(bias, NewBias)}
        if batches.held:
            counted = Counted.named(program, mask)
            judges = [Judge(floating, [batch], counted) for batch in batches.held]
            count, why = _useful(program, new, judges, context)
            refusals += [_refuse(n, why) for n in list(new)[count:]]
            new = dict(list(new.items())[:count])
        else:
            context.remark(
                f"of {len(inputs)} calibration batches none can be held out, so nothing judges "
                "whether the biases help on other inputs: give four or more"
            )
        context.tell(total, total)
        rewriter = Rewriter(program, self.name, context.sites)
        for node, bias in new.items():
            with rewriter.site(_RULE, node) as allowed:
                if allowed:
                    write_bias(rewriter, node, bias)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _useful(
    program: Program, new: dict[Node, NewBias], judges: Sequence[Judge], context: PassContext
) -> tuple[int, str]:
    """How many of the biases, from the first on, do the outputs good, and why not the others.

    Each was found with all those before it in force, so only the first of them belong together.
    """
    before = _decibels(judges, program)
    count, told = len(new), []
    while count:
        gains = _decibels(judges, _corrected(program, list(new.items())[:count])) - before
        useful, figure = proven(gains)
        told.append(f"{figure} with those of the first {count} operators")
        if useful:
            break
        count //= 2
    if len(told) <= (count > 0):
        return count, ""
    why = f"on {len(before)} held-out batches the outputs gain {', '.join(told)}"
    context.remark(f"{why}: {'only these' if count else 'none'} are written")
    return count, why


def proven(gains: Tensor) -> tuple[bool, str]:
    """Whether a gain is more than chance: its mean is above twice its standard error.

    Some networks answer to any change of their values with large gains on some inputs and large
    losses on others; the mean of a few such inputs says nothing of the next ones.

    Args:
        gains: in decibels, [batches]; of one batch it has to be above 0, and no loss is a gain
            where nothing differs.

    Returns:
        That, and the gain as text.
    """
    mean = float(gains.mean())
    error = float(gains.std() / len(gains) ** 0.5) if len(gains) > 1 else 0.0
    return mean > 2 * error or not bool(gains.any()), f"{mean:+.2f} +- {error:.2f} dB"


def _decibels(judges: Sequence[Judge], program: Program) -> Tensor:
    """Signal to noise of the outputs on each batch; what is exact counts as 200 dB."""
    scores = [judge.score(program).fidelity.sqnr_db for judge in judges]
    return torch.tensor(scores, dtype=torch.float64).clamp(max=200.0)


def _corrected(program: Program, new: Sequence[tuple[Node, NewBias]]) -> Program:
    """A copy of the program with some new biases."""
    copy = program.clone()
    nodes = {node.name: node for node in copy.graph.nodes}
    rewriter = Rewriter(copy, _RULE)
    for node, bias in new:
        with rewriter.site(_RULE, nodes[node.name]):
            write_bias(rewriter, nodes[node.name], bias)
    return rewriter.finish()


def _targets(program: Program, where: Where) -> tuple[dict[Node, int], list[Refusal]]:
    """Quantized products that take a bias per output channel -> the axis of channels."""
    found: dict[Node, int] = {}
    refusals = []
    for node in quantized_operators(program):
        operands = operands_of(node, program)
        if isinstance(operands, str) or operands is None or not where.takes(node):
            continue
        if operands.kind == "linear" or (operands.kind == "product" and operands.bias is not None):
            found[node] = node.meta["val"].dim() - 1
        elif operands.kind == "convolution":
            spatial = argument(node, "weight").meta["val"].dim() - 2
            found[node] = node.meta["val"].dim() - 1 - spatial
        elif operands.weights:
            refusals.append(_refuse(node, f"a {operands.kind} has no bias per output channel"))
    return found, refusals


def _refuse(node: Node, reason: str) -> Refusal:
    return Refusal(_RULE, node.name, reason, source_line(node))
