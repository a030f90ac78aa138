"""What a value of a quantized file may differ by from what the program says.

Codes may differ by one step, real numbers by the bound of their dtype. Where codes themselves were
fused away (a kernel that quantizes its own input), a code that rounds the other way moves the
result by what one step of one element is worth, and no more is allowed: ``State.slack`` follows it
to the next value of the file.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import Stepwise
from planish.ir.compare import BOUNDS, difference
from planish.ir.errors import ExportError
from planish.ir.ops import aten, is_op, node_of
from planish.ir.quantscheme import INTEGERS

QUANTIZE = torch.ops.planish.quantize.default
DEQUANTIZE = torch.ops.planish.dequantize.default
DYNAMIC = torch.ops.planish.dynamic_quantize.default

# Codes are what these hold; other integers are sizes and indices, which have no steps.
_CODES = frozenset(storage for _, _, storage in INTEGERS.values())
# operator -> positions of its two factors
_PRODUCTS: Mapping[Any, tuple[int, int]] = {
    **dict.fromkeys(
        (
            aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
            aten.convolution.default, aten.mul.Tensor,
        ),
        (0, 1),
    ),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}  # fmt: skip


@dataclass
class Tally:
    """What was compared so far."""

    names: set[str] = field(default_factory=set)
    unchecked: set[str] = field(default_factory=set)
    steps: int = 0
    relative: float = 0.0

    def result(self, probes: tuple[str, ...]) -> Stepwise:
        """What to report of all that was compared."""
        return Stepwise(
            probes=probes,
            values=len(self.names),
            unchecked=tuple(sorted(self.unchecked - self.names)),
            max_steps=self.steps,
            max_relative=self.relative,
        )


@dataclass
class State:
    """Values under way: the file's own where it has them.

    Attributes:
        env: node -> value.
        slack: node -> how far a recomputed value may lie from what a kernel used inside, because
            codes that the file does not show rounded the other way; in units of the value.
        inexact: recomputed real values, whose last bits are not the file's.
    """

    env: dict[Node, Any]
    slack: dict[Node, float] = field(default_factory=dict)
    inexact: set[Node] = field(default_factory=set)


def compare(
    state: State, node: Node, expected: Tensor, value: Tensor, found: Tally, label: str
) -> None:
    """Raise where a value of the file is not what the program says.

    Raises:
        ExportError: it names the node.
    """
    problem: str | None = None
    if value.dtype in _CODES and _makes_codes(node):
        away = (value.to(torch.int64) - expected.to(torch.int64)).abs()
        steps = int(away.max()) if away.numel() else 0
        allowed = 1 + math.ceil(_slack_of_arguments(state, node))
        if steps > allowed:
            count = int((away > allowed).sum())
            problem = f"differs by {steps} steps; {count} of {away.numel()} by more than {allowed}"
        found.steps = max(found.steps, steps)
    elif value.is_floating_point():
        problem = _real_problem(state, node, expected, value, found)
    elif any(n in state.inexact for n in node.all_input_nodes):
        found.unchecked.add(node.name)  # a comparison or an index of numbers the file hides
        return
    else:
        problem = difference([expected], [value], bounds=[0.0])
    if problem:
        raise ExportError(
            f"the file computes an operator unlike the program: {problem.removeprefix('output 0 ')}"
            f" ({label}, without the runtime's optimizations)",
            where=node,
            hint="this is a defect of planish or of the runtime: report it with the model; "
            "keep this operator in float meanwhile",
        )
    found.names.add(node.name)


def _real_problem(
    state: State, node: Node, expected: Tensor, value: Tensor, found: Tally
) -> str | None:
    values = [expected, *(state.env[n] for n in node.all_input_nodes)]
    bound = max(BOUNDS.get(v.dtype, 0.0) for v in values if isinstance(v, Tensor))
    finite = expected[expected.isfinite()]
    peak = max(1e-6, float(finite.abs().max())) if finite.numel() else 1e-6
    slack = state.slack.get(node, 0.0) / peak
    problem = difference([expected], [value], bounds=[bound + slack])
    if problem is None and finite.numel():
        both = expected.isfinite() & value.isfinite()
        error = (value[both].double() - expected[both].double()).abs()
        far = error.max().item() / peak if error.numel() else 0.0
        found.relative = max(found.relative, max(0.0, far - slack))
    return problem


def _makes_codes(node: Node) -> bool:
    """Whether integers of a node are codes: it quantizes, or only moves such around."""
    seen, queue = set(), [node]
    while queue:
        current = queue.pop()
        if is_op(current, QUANTIZE, DYNAMIC):
            return True
        value = current.meta.get("val")
        if current in seen or (isinstance(value, Tensor) and value.is_floating_point()):
            continue
        seen.add(current)
        queue += current.all_input_nodes
    return False


# -- codes that the file does not show --------------------------------------------------------


def note(state: State, node: Node) -> None:
    """What is known of a recomputed value, before the file's own takes its place."""
    value = state.env[node]
    real = isinstance(value, (tuple, list)) or (
        isinstance(value, Tensor) and value.is_floating_point()
    )
    if real or any(n in state.inexact for n in node.all_input_nodes):
        state.inexact.add(node)
    slack = _slack_of_arguments(state, node)
    if is_op(node, QUANTIZE, DYNAMIC):
        slack += 1.0
    elif node.target is operator.getitem and is_op(node.args[0], DYNAMIC) and node.args[1]:
        slack = 0.0  # scale and zero point are no codes
    if slack:
        state.slack[node] = slack


def _slack_of_arguments(state: State, node: Node) -> float:
    """How far the slack of the arguments can move a result, one element of each being off."""
    loose = [n for n in node.all_input_nodes if state.slack.get(n)]
    if not loose:
        return 0.0
    total = 0.0
    for argument in loose:
        slack = state.slack[argument]
        if is_op(node, DEQUANTIZE):
            slack *= _peak(state.env[node_of(node.args[1])])
        elif is_op(node, QUANTIZE):
            slack /= float(state.env[node_of(node.args[1])].abs().min())
        elif node.target in _PRODUCTS:
            factors = [node.args[position] for position in _PRODUCTS[node.target]]
            if argument in factors:
                other = factors[0] if argument is factors[1] else factors[1]
                slack *= _peak(state.env[other] if isinstance(other, Node) else other)
        total += slack
    return total


def _peak(value: object) -> float:
    if isinstance(value, Tensor):
        return float(value.abs().max()) if value.numel() else 0.0
    return abs(value) if isinstance(value, (int, float)) else 1.0
