"""Linear layers on quantized weights, in standard operators.

A linear layer on a quantized weight is MatMul and Add on codes stored as [in, out], so that a
runtime that looks for DequantizeLinear before MatMul finds its integer kernel: ONNX Runtime turns
a weight behind a Transpose, or a Gemm, into a float product of dequantized operands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import Dequantized, dequantized, layout, plain, stored
from planish.backends.onnx_view import View

if TYPE_CHECKING:
    import onnx_ir as ir


def weight_in_out(e: Emitter, weight: Node, out_axis: int) -> ir.Value | None:
    """A dequantized constant weight as [in, out], from codes stored so.

    Args:
        e: the emitter.
        weight: any node.
        out_axis: which axis of it counts outputs: 0 for ``linear``, 1 for ``addmm``.

    Returns:
        None where the weight is no dequantized constant matrix.
    """
    q = dequantized(weight)
    known = e.known(q.codes) if q is not None else None
    if q is None or known is None or known.dim() != 2:
        return None
    scale, zero = e.known(q.scale), e.known(q.zero)
    if scale is None or zero is None or q.dtype == "int32":
        return None

    def make() -> ir.Value:
        turn = out_axis == 0
        axis = None if q.axis is None else (1 - q.axis if turn else q.axis)
        blocks = bool(q.block)
        order = ".T" if turn else ""
        matrix = known.t() if turn else known
        rows = len(matrix)
        missing = _missing_rows(e, q, rows, out_axis)
        kind = q.dtype
        if e.style.integers == "standard" and (rows + missing) % 2:
            kind = ""  # OpenVINO 2026.4 reads an odd number of rows of half bytes as other numbers
        if missing:
            matrix = torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])])
            order += ".whole"
        codes = stored(e, q.codes, matrix, kind, order)
        if q.axis is None:
            parts = [scale.reshape(()), zero.reshape(())]
        else:
            parts = [p.t() if turn and blocks else p for p in (scale, zero)]
        parameters = [
            stored(e, n, p, packed, order if blocks else "")
            for n, p, packed in zip((q.scale, q.zero), parts, ("", kind), strict=True)
        ]
        return e.op("DequantizeLinear", codes, *parameters, **layout(axis, q.block))

    return e.cached(("in-out", weight, out_axis), make)


def _missing_rows(e: Emitter, q: Dequantized, rows: int, out_axis: int) -> int:
    """How many rows of zeros fill the last block of a weight ``[in, out]``.

    OpenVINO 2026.4 knows no last block that is smaller than the others.
    """
    along = q.block and q.axis == 1 - out_axis
    return -rows % q.block if along and e.style.integers == "standard" else 0


def _with_whole_blocks(e: Emitter, view: View, weight: Node, out_axis: int) -> ir.Value:
    """The left operand, with a zero for every row that fills the last block of the weight."""
    q, inputs = dequantized(weight), int(view.base_dims[-1])
    missing = 0 if q is None else _missing_rows(e, q, inputs, out_axis)
    if not missing:
        return view.base
    widths = [0] * (2 * len(view.base_dims) - 1) + [missing]
    return e.cached(
        ("whole blocks", view.base, missing), lambda: e.op("Pad", view.base, e.constant(widths))
    )


def linear_of_codes(
    e: Emitter, node: Node, x: Node, weight: Node, bias: Node | None, out_axis: int
) -> View | None:
    """``x @ weight + bias`` on a dequantized constant weight; None for other weights."""
    matrix = weight_in_out(e, weight, out_axis)
    if matrix is None:
        return None
    view = e.view(x)
    if not view.keeps_rows or not view.dims[:-1]:
        view = plain(e, x)
    columns = dims_of(node.meta["val"])[-1]
    result = e.op("MatMul", _with_whole_blocks(e, view, weight, out_axis), matrix)
    if bias is not None:
        # Of MatMul and Add on two axes ONNX Runtime makes a Gemm, which it runs on integers only
        # if the bias is quantized and no Relu follows; it leaves Sum alone, and MatMul then
        # becomes an integer product. Other runtimes read the same from either.
        result = e.op("Add" if dequantized(x) is None else "Sum", result, e.value(bias))
    return View(result, (*view.base_dims[:-1], columns), (*view.dims[:-1], columns))
