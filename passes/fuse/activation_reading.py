"""Tables and readers for activations: which formula around which function is which operator."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.passes.fuse.algebra import Polynomial
from planish.passes.fuse.matching import plain_sum, scalar_of, scaled, sides, skip


class Form(NamedTuple):
    """One activation: ``formula`` in x and f, where f is a function of ``inner`` in x."""

    formula: Polynomial
    inner: Polynomial
    target: Any
    approximate: str | None = None


HALF_GATE: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}  # x / 2 + x f / 2
GATE: Polynomial = {(1, 1): 1.0}  # x f
X: Polynomial = {(1,): 1.0}
_CUBIC: Polynomial = {
    (1,): math.sqrt(2 / math.pi),
    (3,): math.sqrt(2 / math.pi) * 0.044715,
}
_FORMS: dict[Any, Form] = {
    aten.erf.default: Form(HALF_GATE, {(1,): math.sqrt(0.5)}, aten.gelu.default),
    aten.tanh.default: Form(HALF_GATE, _CUBIC, aten.gelu.default, "tanh"),
    aten.sigmoid.default: Form(GATE, X, aten.silu.default),
    aten.hardsigmoid.default: Form(GATE, X, aten.hardswish.default),
}
_CLAMPS = (aten.clamp.default, aten.hardtanh.default, aten.relu6.default, aten.clamp_max.default)
FUNCTIONS = frozenset({*_FORMS, *_CLAMPS})


def forms_of(node: Node, program: Program, seen: list[Node]) -> tuple[Any, tuple[Form, ...]]:
    """The argument of the function at ``node``, and the activations it can be part of.

    Args:
        node: calls one of ``FUNCTIONS``.
        program: gives the constants.
        seen: collects the nodes between ``node`` and the argument.
    """
    if node.target in _CLAMPS:
        value, upper = _clamp_from_zero(node, program, seen)
        if not upper:
            return value, ()
        inner: Polynomial = {(1,): upper / 6, (0,): upper / 2}
        return value, (
            Form({(0, 1): 1 / upper}, inner, aten.hardsigmoid.default),
            Form({(1, 1): 1 / upper}, inner, aten.hardswish.default),
        )
    value = skip(node.args[0], seen)
    if is_op(node, aten.tanh.default):
        x = softplus_argument(value, program, seen)
        if x is not None:
            return x, (Form(GATE, X, aten.mish.default),)
    return value, (_FORMS[node.target],)


def _clamp_from_zero(node: Node, program: Program, seen: list[Node]) -> tuple[Any, float | None]:
    """``(value, upper)`` where a node computes ``clamp(value, 0, upper)``; upper None if not."""
    value = skip(node.args[0], seen)
    if is_op(node, aten.relu6.default):
        return value, 6.0
    if is_op(node, aten.hardtanh.default):
        low, high = argument(node, "min_val"), argument(node, "max_val")
        return value, float(high) if low == 0 and high > 0 else None
    low = argument(node, "min") if is_op(node, aten.clamp.default) else None
    high = scalar_of(argument(node, "max"), program)
    if low is None:
        at_zero = is_op(value, aten.clamp_min.default) and argument(value, "min") == 0
        if at_zero or is_op(value, aten.relu.default):
            seen.append(value)
            value, low = skip(value.args[0], seen), 0
    return value, high if low == 0 and high is not None and high > 0 else None


def softplus_argument(value: Any, program: Program, seen: list[Node]) -> Any:  # noqa: ANN401
    """``x`` in ``softplus(x)``, ``log(1 + exp(x))`` or ``log1p(exp(x))``; None for others."""
    if is_op(value, aten.softplus.default):
        plain = argument(value, "beta") == 1 and argument(value, "threshold") == 20
        seen.append(value)
        return value.args[0] if plain else None
    if not is_op(value, aten.log.default, aten.log1p.default):
        return None
    seen.append(value)
    inner = skip(value.args[0], seen)
    if is_op(value, aten.log.default):
        inner = one_plus(inner, program, seen)
    if not is_op(inner, aten.exp.default):
        return None
    seen.append(inner)
    return skip(inner.args[0], seen)


def one_plus(value: Any, program: Program, seen: list[Node]) -> Any:  # noqa: ANN401
    """``y`` in ``1 + y`` or ``y + 1``; None for others."""
    if not plain_sum(value):
        return None
    for other, number in sides(value):
        if scalar_of(number, program) == 1.0 and isinstance(other, Node):
            seen.append(value)
            return skip(other, seen)
    return None


def logistic_argument(value: Any, program: Program, seen: list[Node]) -> Any:  # noqa: ANN401
    """``x`` in ``1 + exp(-x)``; None for others."""
    inner = one_plus(value, program, seen)
    if not is_op(inner, aten.exp.default):
        return None
    seen.append(inner)
    negative = skip(inner.args[0], seen)
    found = scaled(negative, program)
    if found is None or found.factor != -1.0:
        return None
    seen.append(negative)
    return found.value


def candidates(value: Any) -> list[Node]:  # noqa: ANN401
    """What ``x`` may be in an expression: its nodes, breadth first, a few."""
    found: list[Node] = []
    queue = deque([value])
    while queue and len(found) < 6:
        node = skip(queue.popleft())
        if isinstance(node, Node) and node not in found:
            found.append(node)
            queue.extend(node.all_input_nodes if node.op == "call_function" else ())
    return found
