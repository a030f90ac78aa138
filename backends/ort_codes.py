"""Values that stay integers from one kernel of ONNX Runtime to the next.

A program writes ``quantize(op(dequantize(c)))``; the runtime has kernels from codes to codes. The
translation of ``quantize`` here looks back from itself for as long as there is such a kernel:
convolutions, sums, pools and concatenations have their own, a clamp is what the range of the
result does anyway (else a Clip of codes, because rounding keeps order), and what only moves values
around moves codes just as well. Where nothing fits, the standard QuantizeLinear is written. What
the real operators in between had emitted is then read by nobody, and left out.

Images lie with their channels last, as these kernels want them: the view of such a value has a
permutation, which is written out only where somebody needs the other layout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import DEQUANTIZE, QUANTIZE, stored
from planish.backends.onnx_view import Table, View
from planish.ir.ops import argument, is_op, node_of
from planish.ir.quantscheme import INTEGERS

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

MICROSOFT = "com.microsoft"
_EIGHT_BITS = ("uint8", "int8")


@dataclass(frozen=True)
class Grid:
    """The real numbers that codes stand for: one scale and zero point for the whole value.

    Attributes:
        scale: distance of neighbors.
        zero: the code of 0.
        dtype: "uint8" or "int8".
        nodes: where the program holds scale and zero point.
    """

    scale: float
    zero: int
    dtype: str
    nodes: tuple[Node, Node]

    def same(self, other: Grid) -> bool:
        """Whether equal codes mean equal numbers."""
        return (self.scale, self.zero, self.dtype) == (other.scale, other.zero, other.dtype)

    def code(self, number: float) -> int:
        """The code of a number; infinities are the ends."""
        low, high, _ = INTEGERS[self.dtype]
        if number in (float("-inf"), float("inf")):
            return low if number < 0 else high
        ratio = torch.tensor(number, dtype=torch.float32) / torch.tensor(self.scale)
        return int((ratio.round() + self.zero).clamp(low, high))

    def constants(self, e: Emitter) -> list[tuple[Node, Tensor]]:
        """Scale and zero point: where the program holds them, and as tensors."""
        known = [(node, e.known(node)) for node in self.nodes]
        return [(node, tensor) for node, tensor in known if tensor is not None]


def grid_of(e: Emitter, node: Node) -> Grid | None:
    """The grid of a ``quantize`` or ``dequantize``; None for several scales, or unknown ones."""
    dtype = str(argument(node, "dtype"))
    scale, zero = argument(node, "scale"), argument(node, "zero_point")
    known = (e.known(scale), e.known(zero))
    if argument(node, "axis") is not None or dtype not in _EIGHT_BITS:
        return None
    if known[0] is None or known[1] is None or known[0].dtype is not torch.float32:
        return None
    return Grid(float(known[0]), int(known[1]), dtype, (scale, zero))


@dataclass(frozen=True)
class Codes:
    """Codes and what they mean.

    Attributes:
        view: the integers.
        grid: what they stand for.
    """

    view: View
    grid: Grid


def codes_of(e: Emitter, value: object) -> Codes | None:
    """What stands behind a dequantized value; None for any other value."""
    if not isinstance(value, Node) or not is_op(value, DEQUANTIZE):
        return None
    grid, source = grid_of(e, value), value.args[0]
    assert isinstance(source, Node)
    return None if grid is None else Codes(e.view(source), grid)


def parameters(e: Emitter, grid: Grid) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point as scalars in the file."""
    values = [stored(e, node, known.reshape(())) for node, known in grid.constants(e)]
    return values[0], values[1]


# -- layout -----------------------------------------------------------------------------------


def to_last(rank: int) -> tuple[int, ...]:
    """The permutation that puts channels last."""
    return (0, *range(2, rank), 1)


def from_last(rank: int) -> tuple[int, ...]:
    """The permutation that puts them back."""
    return (0, rank - 1, *range(1, rank - 1))


def permuted(view: View, order: tuple[int, ...]) -> View:
    """A view through one more permutation."""
    perm = order if view.perm is None else tuple(view.perm[p] for p in order)
    if perm == tuple(range(len(perm))):
        return View(view.base, view.base_dims, view.dims)
    return View(view.base, view.base_dims, view.dims, perm)


def lies_last(view: View) -> bool:
    """Whether channels lie last in memory."""
    return view.perm is not None and view.perm == from_last(len(view.dims))


def channels_last(e: Emitter, view: View) -> ir.Value:
    """The value with its channels last."""
    return e.materialize(permuted(view, to_last(len(view.shape))))


def seen_first(value: ir.Value, dims: Dims) -> View:
    """A value with its channels last, seen with them first.

    Args:
        value: lies as [N, .., C].
        dims: its sizes as the program sees them, [N, C, ..].
    """
    rank = len(dims)
    last = tuple(dims[p] for p in to_last(rank))
    return View(value, last, last, from_last(rank))


# -- from quantize backward -------------------------------------------------------------------

# What makes codes on a grid of an operator's result: (emitter, operator, grid).
CodeMaker = Callable[[Emitter, Node, Grid], "View | None"]


def _quantize(e: Emitter, node: Node) -> View | None:
    grid, source = grid_of(e, node), node.args[0]
    assert isinstance(source, Node)
    return None if grid is None else make_codes(e, source, grid)


def make_codes(e: Emitter, value: Node, grid: Grid) -> View | None:
    """The codes of a value by an integer kernel; None where there is none."""
    given = codes_of(e, value)
    if given is not None:
        return _described(e, given.view, grid) if given.grid.same(grid) else None
    if value.op != "call_function":
        return None
    maker = _makers().get(value.target)
    view = None if maker is None else maker(e, value, grid)
    return None if view is None else _described(e, view, grid)


def _described(e: Emitter, view: View, grid: Grid) -> View:
    """Declare codes as integers: else what moves them declares the program's real numbers."""
    e.describe(view.base, torch.empty(0, dtype=INTEGERS[grid.dtype][2]), view.base_dims)
    return view


@cache
def _makers() -> dict[Any, CodeMaker]:
    from planish.backends.ort_conv import CONVOLUTIONS
    from planish.backends.ort_pointwise_int8 import BETWEEN

    return {**CONVOLUTIONS, **BETWEEN, **dict.fromkeys(_CLAMPS, _clamp), **_MOVERS}


def limits(node: Node) -> tuple[float, float] | None:
    """Between which numbers an operator clamps; None where it is no such operator."""
    if not is_op(node, *_CLAMPS):
        return None
    low, high = _CLAMPS[node.target]
    bounds = [argument(node, name) if isinstance(name, str) else name for name in (low, high)]
    if any(isinstance(b, Node) for b in bounds):
        return None
    infinite = (float("-inf"), float("inf"))
    first, last = (end if b is None else float(b) for b, end in zip(bounds, infinite, strict=True))
    return first, last


# clamping operator -> its lower and upper bound: a number, or the name of an argument
_CLAMPS: dict[Any, tuple[Any, Any]] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min", None),
    aten.clamp_max.default: (None, "max"),
}


def _clamp(e: Emitter, node: Node, grid: Grid) -> View | None:
    bounds, source = limits(node), node.args[0]
    assert isinstance(source, Node)
    view = None if bounds is None else make_codes(e, source, grid)
    return None if view is None or bounds is None else clip(e, view, grid, bounds)


def clip(e: Emitter, view: View, grid: Grid, bounds: tuple[float, float]) -> View:
    """Clamp codes, where their own ends do not already."""
    low, high, storage = INTEGERS[grid.dtype]
    if ends(grid, bounds) == (low, high):
        return view
    values = [e.constant(end, storage) for end in ends(grid, bounds)]
    return view.with_base(e.op("Clip", view.base, *values))


def ends(grid: Grid, bounds: tuple[float, float]) -> tuple[int, int]:
    """The codes of two numbers: the ends of the grid where it clamps no less than they do."""
    return grid.code(bounds[0]), grid.code(bounds[1])


# -- what moves values ------------------------------------------------------------------------


@contextmanager
def standing_in(e: Emitter, node: Node, view: View) -> Iterator[None]:
    """Translate for a while as if a node were its codes."""
    before = e.held(node)
    e.hold(node, view)
    try:
        yield
    finally:
        e.hold(node, before)


def _move(e: Emitter, node: Node, grid: Grid) -> View | None:
    """An operator with one tensor operand that moves its elements, on codes."""
    from planish.backends.onnx_translate import TABLE

    source, translate = node.args[0], TABLE.get(node.target)
    assert isinstance(source, Node)
    view = None if translate is None else make_codes(e, source, grid)
    if view is None or translate is None:
        return None  # without a translation of its own an operator is written with real numbers
    with standing_in(e, source, view):
        result = translate(e, node)
    return None if result is None else _seen(result, node)


def _seen(result: ir.Value | View, node: Node) -> View:
    dims = dims_of(node.meta["val"])
    return result if isinstance(result, View) else View(result, dims, dims)


def _item(e: Emitter, node: Node, grid: Grid) -> View | None:
    """One part of a split value."""
    from planish.backends.onnx_translate import TABLE

    split = node.args[0]
    if not is_op(split, *_SPLITS):
        return None
    source, index = node_of(split.args[0]), node.args[1]
    assert isinstance(index, int)
    view = make_codes(e, source, grid)
    if view is None:
        return None

    def parts() -> Any:  # noqa: ANN401 - what the translation returns
        with standing_in(e, source, view):
            return TABLE[split.target](e, split)

    result = e.cached(("parts", split, view.base), parts)
    return None if result is None else _seen(result[index], node)


_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)

_MOVERS: dict[Any, CodeMaker] = {
    operator.getitem: _item,
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
            aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
            aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
            aten.select.int, aten.expand.default, aten.contiguous.default, aten.clone.default,
            aten.pixel_shuffle.default, aten.channel_shuffle.default,
        ),
        _move,
    ),
}  # fmt: skip


def _dequantize(e: Emitter, node: Node) -> View | None:
    """Turn codes while they are bytes: real numbers are four times as much to move.

    With int8, ONNX Runtime 1.32 also refuses its own rewrite of the other order.
    """
    given = codes_of(e, node)
    if given is None or given.view.perm is None:
        return None
    dims = dims_of(node.meta["val"])
    codes = e.materialize(given.view)
    return View(e.op("DequantizeLinear", codes, *parameters(e, given.grid)), dims, dims)


ORT_CODES: Table = {QUANTIZE: _quantize, DEQUANTIZE: _dequantize}
