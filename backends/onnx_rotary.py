"""ONNX forms of ``planish::rotary_embedding``.

ONNX's RotaryEmbedding (opset 23) takes one cosine per pair of features, [B, S, D/2]; the operator
here takes one per feature. They agree where both halves of the table are the same, which is
proved on the graph or on the constant; otherwise the formula is written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

import planish.ir.operators  # noqa: F401 - registers torch.ops.planish
from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of
from planish.ir.ops import argument, is_op, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_HEADS_FIRST = (0, 2, 1, 3)

# One operand in, and equal halves stay equal.
_TRANSPARENT = (
    aten.cos.default, aten.sin.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten._to_copy.default, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default,
    aten.expand.default, aten.detach.default, aten.neg.default,
)  # fmt: skip


def _rotary(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    x, cos, sin = (node_of(a) for a in node.args[:3])
    interleaved = bool(argument(node, "interleaved"))
    dims = dims_of(x.meta["val"])
    wanted = e.style.rotary == "operator" and e.opset >= 23 and not interleaved
    if wanted and len(dims) == 4 and isinstance(dims[1], int):
        tables = [_half(e, t, x) for t in (cos, sin)]
        if all(t is not None for t in tables):
            return _as_operator(e, node, x, tables)
    return _as_formula(e, node, interleaved)


def _as_operator(e: Emitter, node: Node, x: Node, tables: list[Any]) -> View:
    """On packed heads [B, S, H * D] where they were split from that, else on [B, H, S, D]."""
    view, dims = e.view(x), dims_of(x.meta["val"])
    if view.perm != _HEADS_FIRST:
        result = e.op("RotaryEmbedding", e.value(x), *tables)
        return View(result, dims, dims)
    b, s, h, d = view.dims
    flat = (b, s, int(h) * int(d))
    packed = e.materialize(View(view.base, view.base_dims, flat), like=x.meta["val"])
    result = e.op("RotaryEmbedding", packed, *tables, num_heads=int(h))
    return View(result, flat, view.dims, _HEADS_FIRST)


def _half(e: Emitter, table: Node, x: Node) -> ir.Value | None:
    """The first half of a table as [B, S, D/2], if the second is the same and heads share it."""
    dims, goal = dims_of(table.meta["val"]), dims_of(x.meta["val"])
    if not (2 <= len(dims) <= 4) or dims[-1] != goal[-1] or dims[-2] != goal[-2]:
        return None
    if len(dims) >= 3 and dims[-3] != 1:
        return None  # one table per head
    if not _equal_halves(e, table):
        return None

    def make() -> ir.Value:
        width = int(goal[-1]) // 2
        batch = dims[0] if len(dims) == 4 else 1
        seen = View(e.value(table), dims, (batch, goal[2], goal[3]))
        full = e.materialize(seen, like=table.meta["val"])
        part = e.op("Slice", full, e.constant([0]), e.constant([width]), e.constant([-1]))
        if batch == goal[0]:
            return part
        return e.op("Expand", part, e.sizes((goal[0], goal[2], width)))

    return e.cached(("rotary", table, goal[0], goal[2]), make)


def _equal_halves(e: Emitter, table: Node) -> bool:
    """Whether ``table[..., :D/2] == table[..., D/2:]`` for certain."""
    known = e.known(table)
    if known is not None:
        first, second = known.chunk(2, dim=-1)
        return bool(torch.equal(first, second))
    if is_op(table, aten.cat.default):
        parts = table.args[0]
        last = int(argument(table, "dim")) in (-1, len(table.meta["val"].shape) - 1)
        return last and len(parts) == 2 and parts[0] is parts[1]  # type: ignore[arg-type, index]
    if is_op(table, aten.mul.Tensor, aten.mul.Scalar) and not isinstance(table.args[1], Node):
        return _equal_halves(e, node_of(table.args[0]))
    if is_op(table, *_TRANSPARENT):
        source = node_of(table.args[0])
        same_width = source.meta["val"].shape[-1:] == table.meta["val"].shape[-1:]
        return bool(same_width) and _equal_halves(e, source)
    return False


def _as_formula(e: Emitter, node: Node, interleaved: bool) -> Any:  # noqa: ANN401
    """``x * cos + rotate(x) * sin``."""
    x = node_of(node.args[0])
    dims, dtype = dims_of(node.meta["val"]), dtype_of(node.meta["val"])
    value, (cos, sin) = e.value(x), (e.operand(a, dtype) for a in node.args[1:3])
    width = int(dims[-1])
    halves = e.constant([1, 1] if interleaved else [width // 2, width // 2])
    if interleaved:
        pairs = (*dims[:-1], width // 2, 2)
        split = e.materialize(View(value, dims, pairs), like=x.meta["val"])
        first, second = e.ops(2, "Split", split, halves, axis=-1)
        turned = e.op("Concat", e.op("Neg", second), first, axis=-1)
        turned = e.materialize(View(turned, pairs, dims))
    else:
        first, second = e.ops(2, "Split", value, halves, axis=-1)
        turned = e.op("Concat", e.op("Neg", second), first, axis=-1)
    return e.op("Add", e.op("Mul", value, cos), e.op("Mul", turned, sin))


ROTARY: Table = {torch.ops.planish.rotary_embedding.default: _rotary}
