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
              every batch keeps its live values meanwhile. Nothing at run time.
Failures:     few inputs, or inputs unlike those to come, give means that are none.
Source:       Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
              Correction", ICCV 2019, section 4.2 (empirical).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError, source_line
from planish.ir.execute import evaluate, last_uses, run
from planish.ir.ops import argument
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._rows import padding_name
from planish.passes.observe.feeding import Padding
from planish.passes.observe.layout import rows_of
from planish.passes.quantize.operands import operands_of
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.restore import quantized_operators
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.biases import NewBias, new_bias, write_bias

_RULE = "correct-bias"
_Tell = Callable[..., None]  # takes (batches done, operators done)


@dataclass
class Mean:
    """Mean of the channels of a value over all samples, padding left out."""

    total: Tensor
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Take [n, C] in."""
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """[C], float64."""
        return self.total / max(self.count, 1)


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
            PassError: nothing is quantized, or what was before is not known.
        """
        self.where.check(program)
        targets, refusals = _targets(program, self.where)
        if not targets and not refusals:
            raise PassError(
                "nothing is quantized, so there is no error to correct",
                hint="run it behind quantize",
            )
        if context.float_program is None:
            raise PassError(
                "the program came to it quantized, so its means in floating point are not known",
                hint="run it in one recipe with quantize, behind it",
            )
        assert context.calibration is not None  # required
        spool: list[Any] = list(context.calibration)[: self.batches or None]
        padding = Padding.of(program, padding_name(program, self.padding_mask))
        floating = context.float_program()
        known = {n.name for n in floating.operators if n.target in {t.target for t in targets}}
        for node in [t for t in targets if t.name not in known]:
            refusals.append(_refuse(node, "the program before has no such operator"))
            del targets[node]
        both = len(spool), len(targets)

        def tell(batches: int, operators: int = 0) -> None:
            context.tell(batches + operators, sum(both))

        axes = {n.name: axis for n, axis in targets.items()}
        reference = _means(floating, axes, spool, padding, tell)
        found = _sequential(program, targets, reference, spool, padding, tell)
        rewriter = Rewriter(program, self.name, context.sites)
        for node, new in found.items():
            if new is None:
                refusals.append(_refuse(node, "its mean error is below what its bias resolves"))
                continue
            with rewriter.site(_RULE, node) as allowed:
                if allowed:
                    write_bias(rewriter, node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


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


def _means(
    program: Program, axes: Mapping[str, int], spool: list[Any], padding: Padding, tell: _Tell
) -> dict[str, Mean]:
    """Means of the channels of some operators, in one sweep."""
    found: dict[str, Mean] = {}
    for done, inputs in enumerate(spool):
        tell(done)
        fed = padding.read(inputs)

        def see(node: Node, value: Any, fed: tuple[int, Tensor | None] = fed) -> None:  # noqa: ANN401 - of any operator
            if node.name in axes:
                channels = value.shape[axes[node.name]]
                zeros = torch.zeros(channels, dtype=torch.float64)
                mean = found.setdefault(node.name, Mean(zeros))
                _add(mean, node, value, axes[node.name], padding, fed)

        run(program, inputs, observe=see)
    return found


def _add(
    mean: Mean,
    node: Node,
    value: Tensor,
    axis: int,
    padding: Padding,
    fed: tuple[int, Tensor | None],
) -> None:
    """Take a value of one batch in; ``fed`` are its number of samples and its mask."""
    samples, mask = fed
    for rows in rows_of(padding.layout(node), value, mask, samples, axis):
        mean.add(rows)


def _sequential(
    program: Program,
    targets: Mapping[Node, int],
    reference: Mapping[str, Mean],
    spool: list[Any],
    padding: Padding,
    tell: _Tell,
) -> dict[Node, NewBias | None]:
    """The new bias of each target, found with all those before it in force."""
    states = [dict(zip(program.placeholders, inputs, strict=True)) for inputs in spool]
    fed = [padding.read(inputs) for inputs in spool]
    frees, found = last_uses(program), dict[Node, NewBias | None]()
    varying = set(program.placeholders)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op not in ("get_attr", "call_function"):
                continue
            if varying.isdisjoint(node.all_input_nodes):  # the same for all batches
                value = (
                    program.constants[str(node.target)]
                    if node.op == "get_attr"
                    else evaluate(node, states[0])
                )
                for state in states:
                    state[node] = value
            else:
                varying.add(node)
                for state in states:
                    state[node] = evaluate(node, state)
            if node in targets:
                tell(len(spool), len(found))
                axis, mean = targets[node], reference[node.name]
                now = Mean(torch.zeros_like(mean.total))
                for state, one in zip(states, fed, strict=True):
                    _add(now, node, state[node], axis, padding, one)
                found[node] = new = new_bias(program, node, mean.mean - now.mean)
                for state in states if new is not None else ():
                    value, shape = state[node], [1] * state[node].dim()
                    shape[axis] = -1
                    state[node] = value + new.added.to(value.dtype).reshape(shape)  # type: ignore[union-attr]
            for dead in frees[node]:
                for state in states:
                    state.pop(dead, None)
    tell(len(spool), len(found))
    return found
