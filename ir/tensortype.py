"""Types of values: element type, shape with named symbols, and the layout of a sparse constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
}


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of an element type: ``f32``, ``i64``; torch's own name for rare ones."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class SparseLayout:
    """Where a constant may be nonzero: ``sparse<2:4, axis=1>``, ``sparse<512 of 1024>``.

    Attributes:
        n: how many entries (or blocks) may be nonzero,
        m: of how many.
        axis: of every ``m`` consecutive entries along it; None for the whole tensor, so that ``m``
            is the number of its entries (or blocks).
        block: sizes along the first two axes of the blocks that are nonzero or zero as a whole;
            needs ``axis`` None.
    """

    n: int
    m: int
    axis: int | None
    block: tuple[int, int] = (1, 1)

    @property
    def sparsity(self) -> float:
        """The share of entries that are zero at the least."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        if self.axis is not None:
            return f"sparse<{self.n}:{self.m}, axis={self.axis}>"
        blocks = "" if self.block == (1, 1) else " blocks {}x{}".format(*self.block)
        return f"sparse<{self.n} of {self.m}{blocks}>"


def stacked_layout(
    layouts: Sequence[SparseLayout | None], shapes: Sequence[Sequence[int]]
) -> tuple[SparseLayout | None, str | None]:
    """The layout of weights laid one below the other (along axis 0), and why there is none.

    Args:
        layouts: what each claims.
        shapes: of each, in the same order.
    """
    first = layouts[0]
    differ = "the weights differ in sparse layout"
    if first is None or None in layouts:
        return None, None if all(claim is None for claim in layouts) else differ
    claims = [claim for claim in layouts if claim is not None]
    if any((c.axis is None) != (first.axis is None) or c.block != first.block for c in claims):
        return None, differ
    rows = [shape[0] for shape in shapes[:-1]]
    if first.axis is not None:
        if any(c != first for c in claims):
            return None, differ
        if first.axis % len(shapes[0]) == 0 and any(count % first.m for count in rows):
            return None, f"the groups of {first} would straddle two weights"
        return first, None
    if any(count % first.block[0] for count in rows):
        return None, f"the blocks of {first} would straddle two weights"
    n, m = sum(c.n for c in claims), sum(c.m for c in claims)
    return SparseLayout(n, m, None, first.block), None


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of one tensor.

    ``shape`` holds ints for static sizes and canonical strings for symbolic ones
    (``"batch"``, ``"2*length"``), so that two types compare and hash by value.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    layout: SparseLayout | None = None

    def __str__(self) -> str:
        text = f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"
        return f"{text} {self.layout}" if self.layout else text


def dim_text(dim: int | SymInt, symbols: Mapping[str, str]) -> int | str:
    """A size as an int, or as text with the user's dimension names in place of torch's symbols."""
    if isinstance(dim, int):
        return dim
    expr = dim.node.expr
    if expr.is_Symbol:  # nearly all are, and sympy's printer takes its time
        return symbols.get(expr.name, str(expr.name))
    if expr.is_Integer:
        return int(expr)
    names = {s: sympy.Symbol(symbols[str(s)]) for s in expr.free_symbols if str(s) in symbols}
    return str(expr.xreplace(names)) if names else str(expr)


def type_text(value: object, symbols: Mapping[str, str]) -> str:
    """Print the type of any value a node can hold."""
    if isinstance(value, Tensor):
        return str(tensor_type(value, symbols))
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_text(v, symbols) for v in value) + ")"
    if isinstance(value, (bool, SymBool)):
        return "bool"
    if isinstance(value, (int, SymInt)):
        return "int"
    if isinstance(value, (float, SymFloat)):
        return "float"
    return "none" if value is None else type(value).__name__


def tensor_type(
    value: Tensor, symbols: Mapping[str, str], layout: SparseLayout | None = None
) -> TensorType:
    """The type of a (fake or real) tensor."""
    return TensorType(value.dtype, tuple(dim_text(d, symbols) for d in value.shape), layout)
