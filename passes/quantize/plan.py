"""What ``quantize`` will do to a program, decided before anything is edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from planish.ir.errors import NothingToDoError, source_line
from planish.ir.ops import aten, is_op
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.passes.quantize.operands import Operands, is_dequantized, operands_of
from planish.passes.quantize.regions import Between, find_regions
from planish.passes.quantize.weights import weight_problem
from planish.passes.quantize.where import Where

RULE = "quantize"  # of refusals; sites are named quantize-linear, quantize-product, ...


@dataclass
class Plan:
    """The operators that will compute on integers.

    Attributes:
        operators: with their operands, in program order; also those that do already.
        agree: pairs of values whose scales must be the same.
        refusals: operators of the right kind that stay in float, and why.
        excluded: how many operators ``where`` left out.
    """

    operators: dict[Node, Operands] = field(default_factory=dict)
    agree: list[tuple[Node, Node]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    excluded: int = 0

    def refuse(self, node: Node, reason: str) -> None:
        """Leave an operator in float."""
        self.operators.pop(node, None)
        self.refusals.append(Refusal(RULE, node.name, reason, source_line(node)))

    def missing_values(self) -> list[Node]:
        """The values that have to be written in integers, in program order, each once."""
        found: dict[Node, None] = {}
        for node, operands in self.operators.items():
            for slot in operands.values:
                value = slot.read(node)
                if not is_dequantized(value):
                    found[value] = None
        return sorted(found)


Declines = Callable[[Node, Operands], str | None]


def make_plan(
    program: Program,
    where: Where,
    between: Between,
    declines: Declines,
    *,
    values: bool = True,
) -> Plan:
    """Decide which operators compute on integers.

    Args:
        program: is not edited.
        where: which operators may.
        between: where operators between the products do, see ``regions``.
        declines: why an operator that could must not, or None.
        values: whether values are quantized; else only operators with weights are looked at.
    """
    plan = Plan()
    for node in program.operators:
        operands = operands_of(node, program)
        if operands is None:
            continue
        if not values and isinstance(operands, Operands):
            operands = replace(operands, values=(), bias=None)
            if not operands.weights:
                continue
        if not where.takes(node):
            plan.excluded += 1
            continue
        if isinstance(operands, str):
            plan.refuse(node, operands)
            continue
        reason = declines(node, operands) or _bad_weight(node, operands, program)
        if reason:
            plan.refuse(node, reason)
        else:
            plan.operators[node] = operands
    region = find_regions(program, plan.operators, between, where.takes)
    for node, reason in region.refused.items():
        plan.refuse(node, reason)
    both = {**plan.operators, **region.operators}
    plan.operators = {node: both[node] for node in program.operators if node in both}
    plan.agree = region.agree
    return plan


def nothing(plan: Plan) -> NothingToDoError:
    """The error that nothing could be quantized, with what was looked at."""
    if not plan.refusals and not plan.excluded:
        return NothingToDoError(
            "nothing was quantized: the program has no operator that computes on integers",
            hint="linears, convolutions, matrix products, LSTMs and embeddings do; "
            "`planish optimize` takes any model",
        )
    reasons = list(dict.fromkeys(f"{r.node}: {r.reason}" for r in plan.refusals))
    what = f"nothing was quantized: {len(plan.refusals)} operators refused"
    if plan.excluded:
        what += f", {plan.excluded} left out by `where`"
    if reasons:
        what += " (" + "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "") + ")"
    return NothingToDoError(
        what, hint="look at the refusals; widen `where`, or choose another mode"
    )


def _bad_weight(node: Node, operands: Operands, program: Program) -> str | None:
    for weight in operands.weights:
        value = program.constant(weight.slot.read(node))
        problem = weight_problem(value) if value is not None else None
        if problem:
            return problem
    return None


def is_attention_product(node: Node, operands: Operands) -> bool:
    """Whether a product of two computed values is that of queries and keys, or probabilities."""
    if operands.kind != "product" or len(operands.values) != 2:
        return False
    return _leads(node, _ATTENTION_STEPS, forward=True) or any(
        _leads(slot.read(node), _ATTENTION_STEPS, forward=False) for slot in operands.values
    )


def _leads(node: Node, steps: frozenset[object], *, forward: bool) -> bool:
    """Whether a softmax stands behind (or before) a value, with nothing but ``steps`` between."""
    pending, seen = (list(node.users) if forward else [node]), set()
    while pending:
        current = pending.pop()
        if is_op(current, aten.softmax.int, aten._softmax.default):
            return True
        if current in seen or not is_op(current, *steps):
            continue
        seen.add(current)
        pending.extend(current.users if forward else current.all_input_nodes[:1])
    return False


_ATTENTION_STEPS: frozenset[object] = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.dropout.default,
        aten.expand.default,
        aten.to.dtype,
        torch.ops.planish.quantize.default,
        torch.ops.planish.dequantize.default,
    }
)
