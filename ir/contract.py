"""What a program accepts: element types, sizes, and dimensions that agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import SymInt, Tensor

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.ir.tensortype import tensor_type, type_text


def check_inputs(program: Program, inputs: Sequence[Any]) -> None:
    """Refuse flat inputs that the program was not captured for.

    Raises:
        UsageError: names the first input that does not fit, and what it should be.
    """
    sizes: dict[Any, tuple[int, str]] = {}  # symbol -> its size, and the input that says so
    names = program.signature.tensor_names
    for name, node, value in zip(names, program.placeholders, inputs, strict=True):
        declared = node.meta.get("val")
        if not isinstance(declared, Tensor):
            continue
        wanted = type_text(declared, program.signature.symbols)
        if not isinstance(value, Tensor):
            raise UsageError(f"input {name!r} is a {type(value).__name__}, not a tensor {wanted}")
        dims: tuple[Any, ...] = tuple(declared.shape)  # declared as ints, but symbolic ones occur
        fits = value.dtype == declared.dtype and value.dim() == declared.dim()
        if not fits or any(
            isinstance(size, int) and size != actual
            for size, actual in zip(dims, value.shape, strict=True)
        ):
            raise UsageError(
                f"input {name!r} is {tensor_type(value, {})}; the program takes {wanted}",
                hint="sizes that are numbers were static at capture; make them dynamic there",
            )
        for size, actual in zip(dims, value.shape, strict=True):
            if isinstance(size, SymInt):
                _bind(program, name, size.node.expr, int(actual), sizes)


def _bind(
    program: Program,
    name: str,
    expr: sympy.Expr,
    actual: int,
    sizes: dict[Any, tuple[int, str]],
) -> None:
    """Take a dynamic dimension's size from an input, or compare it with what others said."""
    public = program.signature.symbols
    if expr.is_Symbol and expr not in sizes:
        sizes[expr] = (actual, name)
        low, high = program.signature.ranges.get(str(expr), (0, None))
        if actual < low or (high is not None and actual > high):
            raise UsageError(
                f"input {name!r} has size {actual} in dimension {public.get(str(expr), expr)}, "
                f"which may be from {low} to {high or 'any size'}"
            )
        return
    known = expr.xreplace({symbol: sympy.Integer(size) for symbol, (size, _) in sizes.items()})
    if known.is_Integer and int(known) != actual:
        others = sorted({n for symbol, (_, n) in sizes.items() if symbol in expr.free_symbols})
        text = str(expr.xreplace({s: sympy.Symbol(public.get(str(s), str(s))) for s in sizes}))
        raise UsageError(
            f"input {name!r} has size {actual} in dimension {text}, which is {known} by "
            f"input {', '.join(map(repr, others))}"
        )
