"""Dynamic sizes in the types of a program, and which of them its inputs tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from planish.ir.program import Program


def untold(program: Program) -> set[Any]:
    """Dynamic sizes (symbols of sympy) that no input has as a size of its own."""
    return untold_by(program.placeholders, program.operators)


def untold_by(inputs: Iterable[Node], operators: Iterable[Node]) -> set[Any]:
    """The same, of some inputs and of some operators."""
    inputs = list(inputs)
    needed = {
        s
        for node in [*inputs, *operators]
        for s in symbols_of(node.meta.get("val"))
        if not symbol_is_type(s, SymT.UNBACKED_INT)
    }
    for node in inputs:
        needed -= set(plain_symbols(node.meta.get("val")))
    return needed


def _sizes(value: object) -> Iterator[SymInt | SymFloat | SymBool]:
    """The symbolic numbers in a type."""
    if isinstance(value, Tensor):
        sizes: tuple[object, ...] = tuple(value.shape)  # declared as ints, but symbolic ones occur
        yield from (size for size in sizes if isinstance(size, SymInt))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _sizes(item)
    elif isinstance(value, (SymInt, SymFloat, SymBool)):
        yield value


def symbols_of(value: object) -> Iterator[Any]:
    """The symbols (of sympy) in a type."""
    for size in _sizes(value):
        yield from size.node.expr.free_symbols


def plain_symbols(value: object) -> Iterator[Any]:
    """The symbols that are a size of their own in a type."""
    return (size.node.expr for size in _sizes(value) if size.node.expr.is_Symbol)
