"""Polynomials read from a graph: what makes the order of operands not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.passes.fuse.matching import origin, power_of, scalar_of, skip

Polynomial = dict[tuple[int, ...], float]  # powers of the variables -> coefficient, if not zero

_ADD = (aten.add.Tensor, aten.add.Scalar)
_SUB = (aten.sub.Tensor, aten.sub.Scalar)
_RSUB = (aten.rsub.Scalar, aten.rsub.Tensor)
_MUL = (aten.mul.Tensor, aten.mul.Scalar)
_DIV = (aten.div.Tensor, aten.div.Scalar)

# Enough for the longest form anyone writes; a bound keeps matching linear in the graph.
MAX_NODES = 12


def is_polynomial(p: Polynomial, wanted: Polynomial, dtype: torch.dtype) -> bool:
    """Whether a polynomial has these coefficients, as exactly as a value of ``dtype`` can tell.

    In float32 and narrower six digits will do, since people write 0.79788456 for sqrt(2 / pi).
    """
    tolerance = 1e-6 if torch.finfo(dtype).eps > 1e-10 else 1e-12
    return p.keys() == wanted.keys() and all(
        math.isclose(p[powers], wanted[powers], rel_tol=tolerance) for powers in wanted
    )


def polynomial(
    node: Any,  # noqa: ANN401
    variables: Sequence[Node],
    program: Program,
    seen: list[Node],
) -> Polynomial | None:
    """Read a value as a polynomial in ``variables``.

    Args:
        node: a node or a number.
        variables: all of the shape that ``node`` has.
        program: gives the constants.
        seen: collects the nodes between ``node`` and the variables, ``node`` included.

    Returns:
        The coefficients; None where the value is something else or too long.
    """
    start, one = len(seen), (0,) * len(variables)
    units = {
        origin(v): {tuple(int(i == j) for j in range(len(variables))): 1.0}
        for i, v in enumerate(variables)
    }

    def read(node: Any) -> Polynomial | None:  # noqa: ANN401
        if isinstance(node, Node) and origin(node) in units:
            return units[origin(node)]
        number = scalar_of(node, program)
        if number is not None:
            return {one: number} if number else {}
        node = skip(node, seen)
        if not isinstance(node, Node) or len(seen) - start >= MAX_NODES:
            return None
        result = combine(node)
        if result is not None:
            seen.append(node)
        return result

    def combine(node: Node) -> Polynomial | None:
        if is_op(node, aten.neg.default):
            return _times(read(node.args[0]), {one: -1.0})
        if is_op(node, *_ADD, *_SUB, *_RSUB):
            left, right = read(node.args[0]), read(argument(node, "other"))
            alpha = float(argument(node, "alpha"))
            if is_op(node, *_RSUB):
                left, right = right, left
            return _plus(left, _times(right, {one: alpha if is_op(node, *_ADD) else -alpha}))
        if is_op(node, *_MUL) and power_of(node) is None:
            return _times(read(node.args[0]), read(argument(node, "other")))
        if is_op(node, *_DIV):
            divisor = scalar_of(argument(node, "other"), program)
            return _times(read(node.args[0]), {one: 1.0 / divisor}) if divisor else None
        exponent = power_of(node)
        if exponent not in (2.0, 3.0):
            return None
        base = read(node.args[0])
        square = _times(base, base)
        return square if exponent == 2.0 else _times(square, base)

    return read(node)


def _plus(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    total = {k: a.get(k, 0.0) + b.get(k, 0.0) for k in a.keys() | b.keys()}
    return {k: v for k, v in total.items() if v}


def _times(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    product: Polynomial = {}
    for i, v in a.items():
        for j, w in b.items():
            powers = tuple(m + n for m, n in zip(i, j, strict=True))
            product[powers] = product.get(powers, 0.0) + v * w
    return {k: v for k, v in product.items() if v}
