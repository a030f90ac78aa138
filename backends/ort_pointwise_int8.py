"""What lies between convolutions, in the integer kernels of ONNX Runtime.

Sums and products of two values, pools, concatenations, sigmoids: each kernel reads codes and
writes codes, in whatever layout they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_layers import pool_facts
from planish.backends.onnx_padding import zero_padding
from planish.backends.onnx_view import View
from planish.backends.ort_codes import (
    MICROSOFT,
    CodeMaker,
    Codes,
    Grid,
    channels_last,
    codes_of,
    lies_last,
    make_codes,
    parameters,
    seen_first,
    to_last,
)
from planish.ir.ops import argument, is_op
from planish.ir.quantscheme import INTEGERS

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten


# -- two values -------------------------------------------------------------------------------


def _two(name: str) -> CodeMaker:
    def make(e: Emitter, node: Node, grid: Grid) -> View | None:
        operands = [codes_of(e, x) for x in node.args[:2]]
        a, b = operands if len(operands) == 2 else (None, None)
        if a is None or b is None or {a.grid.dtype, b.grid.dtype} != {grid.dtype}:
            return None
        if is_op(node, aten.add.Tensor) and argument(node, "alpha") != 1:
            return None
        values, result = _same_layout(e, a.view, b.view, dims_of(node.meta["val"]))
        codes = e.op(
            name, values[0], *parameters(e, a.grid), values[1], *parameters(e, b.grid),
            *parameters(e, grid), domain=MICROSOFT,
        )  # fmt: skip
        return result.with_base(codes)

    return make


def _same_layout(e: Emitter, a: View, b: View, dims: Dims) -> tuple[list[ir.Value], View]:
    """Two operands in one layout, and a view of what has it; its base is to be exchanged."""
    rank = len(dims)
    if len(a.shape) == len(b.shape) == rank > 2 and (lies_last(a) or lies_last(b)):
        values = [channels_last(e, v) for v in (a, b)]
        return values, seen_first(values[0], dims)
    values = [e.materialize(v) for v in (a, b)]
    return values, View(values[0], dims, dims)


# -- pools ------------------------------------------------------------------------------------


def _max_pool(e: Emitter, node: Node, grid: Grid) -> View | None:
    """Rounding keeps order: the code of the largest is the largest code."""
    source = node.args[0]
    assert isinstance(source, Node)
    spatial = 2
    view = make_codes(e, source, grid)
    if view is None or len(view.shape) != spatial + 2:
        return None
    facts = pool_facts(node, spatial)
    dilation = argument(node, "dilation")
    dilations = [dilation] * spatial if isinstance(dilation, int) else list(dilation)
    dilations = dilations * spatial if len(dilations) == 1 else dilations
    result = e.op(
        "NhwcMaxPool", channels_last(e, view), domain=MICROSOFT, dilations=dilations, **facts
    )
    return seen_first(result, dims_of(node.meta["val"]))


def _average_pool(e: Emitter, node: Node, grid: Grid) -> View | None:
    given = _pooled(e, node, grid)
    if given is None or argument(node, "divisor_override") is not None:
        return None
    facts = pool_facts(node, 2)
    if facts["ceil_mode"]:
        return None  # the kernel counts what hangs over the edge
    include = bool(argument(node, "count_include_pad")) and any(facts["pads"])
    result = e.op(
        "QLinearAveragePool", channels_last(e, given.view), *parameters(e, given.grid),
        *parameters(e, grid), domain=MICROSOFT, channels_last=1,
        count_include_pad=int(include), **facts,
    )  # fmt: skip
    return seen_first(result, dims_of(node.meta["val"]))


def _global_pool(e: Emitter, node: Node, grid: Grid) -> View | None:
    given = _pooled(e, node, grid)
    if given is None or any(g != 1 for g in argument(node, "output_size")):
        return None
    return seen_first(_mean_codes(e, given, grid), dims_of(node.meta["val"]))


def _mean(e: Emitter, node: Node, grid: Grid) -> View | None:
    given, axes = _pooled(e, node, grid), argument(node, "dim")
    if given is None or axes is None or argument(node, "dtype") is not None:
        return None
    rank, dims = len(given.view.shape), dims_of(node.meta["val"])
    if sorted(int(a) % rank for a in axes) != list(range(2, rank)):
        return None
    result = _mean_codes(e, given, grid)
    if argument(node, "keepdim"):
        return seen_first(result, dims)
    return View(result, (dims[0], *[1] * (rank - 2), dims[1]), dims)


def _pooled(e: Emitter, node: Node, grid: Grid) -> Codes | None:
    given = codes_of(e, node.args[0])
    if given is None or given.grid.dtype != grid.dtype or len(given.view.shape) != 4:
        return None
    return given


def _mean_codes(e: Emitter, given: Codes, grid: Grid) -> ir.Value:
    return e.op(
        "QLinearGlobalAveragePool", channels_last(e, given.view), *parameters(e, given.grid),
        *parameters(e, grid), domain=MICROSOFT, channels_last=1,
    )  # fmt: skip


# -- several values ---------------------------------------------------------------------------


def _concatenate(e: Emitter, node: Node, grid: Grid) -> View | None:
    sources: Any = node.args[0]
    parts = [codes_of(e, source) for source in sources]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or {part.grid.dtype for part in known} != {grid.dtype}:
        return None
    dims = dims_of(node.meta["val"])
    rank = len(dims)
    axis = int(argument(node, "dim")) % rank
    last = rank > 2 and any(lies_last(part.view) for part in known)
    if last:
        values = [channels_last(e, part.view) for part in known]
        axis = to_last(rank).index(axis)
    else:
        values = [e.materialize(part.view) for part in known]
    if all(part.grid.same(grid) for part in known):
        joined = e.op("Concat", *values, axis=axis)
    else:
        operands: list[ir.Value] = []
        for value, part in zip(values, known, strict=True):
            operands += [value, *parameters(e, part.grid)]
        joined = e.op("QLinearConcat", *parameters(e, grid), *operands, domain=MICROSOFT, axis=axis)
    return seen_first(joined, dims) if last else View(joined, dims, dims)


# -- padding ----------------------------------------------------------------------------------


def _pad(e: Emitter, node: Node, grid: Grid) -> View | None:
    """Padding with zeros, on codes; a convolution behind it pads itself."""
    source, pairs = node.args[0], zero_padding(node)
    assert isinstance(source, Node)
    view = None if pairs is None else make_codes(e, source, grid)
    if view is None or pairs is None:
        return None
    dims, rank = dims_of(node.meta["val"]), len(pairs)
    last = lies_last(view)
    value = channels_last(e, view) if last else e.materialize(view)
    placed = [pairs[p] for p in to_last(rank)] if last else pairs
    sizes = e.constant([p[0] for p in placed] + [p[1] for p in placed])
    codes = e.op("Pad", value, sizes, e.constant(grid.zero, INTEGERS[grid.dtype][2]))
    return seen_first(codes, dims) if last else View(codes, dims, dims)


# -- one value --------------------------------------------------------------------------------


def _table(name: str, *attributes: tuple[str, str]) -> CodeMaker:
    """A kernel that looks each of the 256 codes up."""

    def make(e: Emitter, node: Node, grid: Grid) -> View | None:
        given = codes_of(e, node.args[0])
        if given is None or given.grid.dtype != grid.dtype:
            return None
        options = {theirs: float(argument(node, ours)) for ours, theirs in attributes}
        codes = e.op(
            name, given.view.base, *parameters(e, given.grid), *parameters(e, grid),
            domain=MICROSOFT, **options,
        )  # fmt: skip
        return given.view.with_base(codes)

    return make


BETWEEN: dict[Any, CodeMaker] = {
    aten.add.Tensor: _two("QLinearAdd"),
    aten.mul.Tensor: _two("QLinearMul"),
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.mean.dim: _mean,
    aten.cat.default: _concatenate,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.sigmoid.default: _table("QLinearSigmoid"),
    aten.leaky_relu.default: _table("QLinearLeakyRelu", ("negative_slope", "alpha")),
}
