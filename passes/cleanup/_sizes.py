"""What the cleanup passes ask about sizes and arguments; nothing here adds a guard.

Sizes are compared as formulas over the program's symbols: two sizes are the same only where they
are equal for every legal value of the symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node

from planish.ir.program import Program

aten = torch.ops.aten

Size = int | SymInt


def formula(size: Size) -> sympy.Expr:
    """A size as a formula over torch's symbols."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


@lru_cache(maxsize=4096)
def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(a == b or sympy.expand(a - b) == 0)


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _equal(formula(a), formula(b))


def same_sizes(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    """Whether two shapes (or strides) are equal whatever the symbols are."""
    return len(a) == len(b) and all(map(same_size, a, b))


def static(size: Size) -> int | None:
    """A size as a number, or None where it depends on a symbol."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else None


def bound(node: Node) -> list[Any]:
    """All arguments of an ATen call in the order of its schema, with defaults filled in."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    return [
        node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(declared)
    ]


def tensor_of(node: object) -> Tensor | None:
    """The fake tensor a node holds; None where it holds none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def shape_of(node: Node) -> tuple[Size, ...]:
    """The shape of a tensor-valued node."""
    return tuple(node.meta["val"].shape)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes hold tensors of one shape."""
    return same_sizes(shape_of(a), shape_of(b))


def same_dtype(a: Node, b: Node) -> bool:
    """Whether two nodes hold tensors of one element type and device."""
    x, y = tensor_of(a), tensor_of(b)
    return x is not None and y is not None and x.dtype == y.dtype and x.device == y.device


def same_type(a: Node, b: Node) -> bool:
    """Whether two nodes hold tensors of one element type, device and shape."""
    return same_dtype(a, b) and same_shape(a, b)


def size_arguments(shape: Sequence[Size], program: Program, before: Node) -> list[Any] | None:
    """A shape as arguments of an operator: numbers, and sizes the program has computed already.

    Args:
        shape: what to write down.
        program: where to look for sizes.
        before: the sizes must be known there.

    Returns:
        None where a size was not computed before that node.
    """
    known: dict[sympy.Expr, Node] = {}
    for node in program.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        value = node.meta.get("val")
        if isinstance(value, SymInt) and node < before:
            known.setdefault(value.node.expr, node)
    arguments: list[Any] = []
    for size in shape:
        number = static(size)
        arguments.append(number if number is not None else known.get(formula(size)))
    return None if None in arguments else arguments
