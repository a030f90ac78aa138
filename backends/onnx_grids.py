"""What a grid makes superfluous in a file of standard operators.

    q(clamp(x))      ->  q(x)   where the ends of the grid clamp no less
    dq(q(view(dq)))  ->  view(dq)   on one grid: what lies on it is not rounded again

A clamp between a convolution and its rounding costs runtimes that make one kernel of the three a
step more per element; a second rounding is a kernel of its own in some.
"""

from __future__ import annotations

from torch.fx import Node
from torch.fx.node import Argument

from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import DEQUANTIZE, QUANTIZE, stored
from planish.backends.onnx_view import Table, View
from planish.backends.ort_codes import ends, grid_of, limits
from planish.ir.ops import is_op, is_view, node_of
from planish.ir.quantscheme import INTEGERS


def _quantize(e: Emitter, node: Node) -> View | None:
    grid, source = grid_of(e, node), node.args[0]
    if grid is None or not isinstance(source, Node):
        return None
    inner = source
    while (bounds := limits(inner)) is not None:
        if ends(grid, bounds) != INTEGERS[grid.dtype][:2]:
            return None
        inner = node_of(inner.args[0])
    if inner is source:
        return None
    view = e.view(inner)
    parameters = [stored(e, n, known.reshape(())) for n, known in grid.constants(e)]
    return view.with_base(e.op("QuantizeLinear", view.base, *parameters))


def _dequantize(e: Emitter, node: Node) -> View | None:
    codes, grid = node.args[0], grid_of(e, node)
    if grid is None or not is_op(codes, QUANTIZE):
        return None
    source = node_of(codes.args[0])
    inner: Argument = source
    while isinstance(inner, Node) and inner.op == "call_function" and is_view(inner.target):
        inner = inner.args[0]
    if not isinstance(inner, Node) or not is_op(inner, DEQUANTIZE):
        return None
    before, between = grid_of(e, inner), grid_of(e, codes)
    if before is None or between is None or not (grid.same(before) and grid.same(between)):
        return None
    return e.view(source)


ONNX_GRIDS: Table = {QUANTIZE: _quantize, DEQUANTIZE: _dequantize}
