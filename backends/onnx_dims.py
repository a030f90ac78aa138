"""Sizes of dynamic dimensions: compared, named and computed from their symbolic expressions.

Every node of a program carries its type, so the emitter never asks a tensor for its shape where
the expression says enough: a reshape to ``[batch, sequence, 12, 32]`` copies or infers its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from torch import SymInt
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, ModularIndexing, PythonMod
from torch.utils._sympy.functions import Max as TorchMax
from torch.utils._sympy.functions import Min as TorchMin

Dim: TypeAlias = "int | sympy.Expr"
Dims: TypeAlias = tuple[Dim, ...]


class NoExpressionError(Exception):
    """A size depends on something that no formula of the inputs' sizes gives."""


def dim_of(size: int | SymInt) -> Dim:
    """A size as a number where it is one, else as its expression."""
    if isinstance(size, SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def dims_of(value: torch.Tensor) -> Dims:
    """The sizes of a (fake) tensor."""
    return tuple(dim_of(size) for size in value.shape)


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements."""
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return int(total) if isinstance(total, sympy.Expr) and total.is_number else total


def dim_text(dim: Dim, names: Mapping[str, str]) -> int | str:
    """A dimension as it stands in the file: a number, or the user's names in a formula."""
    if isinstance(dim, int):
        return dim
    swap = {s: sympy.Symbol(names.get(str(s), str(s))) for s in dim.free_symbols}
    return str(dim.xreplace(swap))


def reshape_plan(source: Dims, goal: Dims) -> list[int] | None:
    """The constant shape operand of a Reshape, or None where sizes must be computed.

    A size equal to the source's at the same place is 0 (copied) and one other may be -1.
    """
    symbolic = [i for i, dim in enumerate(goal) if not isinstance(dim, int)]
    if any(dim == 0 for dim in goal):
        return list(goal) if not symbolic else None
    if len(symbolic) <= 1:
        return [dim if isinstance(dim, int) else -1 for dim in goal]
    plan: list[int] = []
    for position, dim in enumerate(goal):
        if isinstance(dim, int):
            plan.append(dim)
        elif position < len(source) and source[position] == dim:
            plan.append(0)
        elif -1 in plan:
            return None
        else:
            plan.append(-1)
    return plan


def evaluate(dim: Dim, leaf: Callable[[Dim], Any], op: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Compute a size with ONNX integer operators.

    Args:
        dim: the size.
        leaf: gives the value of a number or of a symbol.
        op: emits an operator, ``op("Add", a, b)``.

    Raises:
        NoExpressionError: the expression has a function without an ONNX counterpart.
    """
    if isinstance(dim, int) or dim.is_Symbol or dim.is_Integer:
        return leaf(int(dim) if not isinstance(dim, int) and dim.is_Integer else dim)

    def of(part: Dim) -> Any:  # noqa: ANN401
        return evaluate(part, leaf, op)

    arguments = dim.args
    if isinstance(dim, sympy.Add):
        return _chain("Add", [of(a) for a in arguments], op)
    if isinstance(dim, sympy.Mul):
        return _chain("Mul", [of(a) for a in arguments], op)
    if isinstance(dim, sympy.Pow) and arguments[1].is_Integer and int(arguments[1]) > 1:
        return _chain("Mul", [of(arguments[0])] * int(arguments[1]), op)
    if isinstance(dim, (sympy.Max, TorchMax)):
        return op("Max", *[of(a) for a in arguments])
    if isinstance(dim, (sympy.Min, TorchMin)):
        return op("Min", *[of(a) for a in arguments])
    if isinstance(dim, (FloorDiv, CleanDiv)):
        return _floor_divide(of(arguments[0]), of(arguments[1]), op)
    if isinstance(dim, (Mod, PythonMod, sympy.Mod)):
        return op("Mod", of(arguments[0]), of(arguments[1]))
    if isinstance(dim, ModularIndexing):
        quotient = _floor_divide(of(arguments[0]), of(arguments[1]), op)
        return op("Mod", quotient, of(arguments[2]))
    raise NoExpressionError(str(dim))


def _chain(name: str, values: list[Any], op: Callable[..., Any]) -> Any:  # noqa: ANN401
    total = values[0]
    for value in values[1:]:
        total = op(name, total, value)
    return total


def _floor_divide(a: Any, b: Any, op: Callable[..., Any]) -> Any:  # noqa: ANN401
    """``a // b`` as Python means it: ONNX's integer Div rounds to zero, its Mod follows b."""
    return op("Div", op("Sub", a, op("Mod", a, b)), b)
