"""Scaled dot-product attention, as ONNX's Attention operator or as matrix products.

torch's rules kept here: a query whose keys are all masked attends to nothing (its row is zero),
where a plain softmax would give NaN or an average.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_dims import Dims, dims_of
from planish.backends.onnx_file import onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of
from planish.ir.ops import argument, is_op, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_HEADS_FIRST = (0, 2, 1, 3)
# Of the lowest number, as what closes keys: ONNX Runtime's Attention gives zeros to a query whose
# keys are all at the lowest number itself, where torch weighs them alike.
_CLOSED = 0.99
_RESHAPES = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default,
)  # fmt: skip


def _attention(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    query, key, value = (node_of(x) for x in node.args[:3])
    if float(argument(node, "dropout_p")) != 0 or len(query.meta["val"].shape) != 4:
        return None
    dtype = dtype_of(node.meta["val"])
    key, value = _unrepeated(key, value)
    q, k = dims_of(query.meta["val"]), dims_of(key.meta["val"])
    scale = argument(node, "scale")
    scale = 1 / math.sqrt(int(q[-1])) if scale is None else float(scale)
    causal = bool(argument(node, "is_causal"))
    mask = argument(node, "attn_mask")
    bias, alive = (None, None) if mask is None else bias_of_mask(e, mask, dtype)
    if causal and (q[2] != k[2] or e.style.attention != "operator"):
        bias, causal = _causal_bias(e, q, k, dtype), False
    if q[1] != k[1] and not (isinstance(q[1], int) and isinstance(k[1], int)):
        return None
    if e.style.attention == "operator" and e.opset >= 23:
        result = _as_operator(e, node, (query, key, value), bias, scale, causal)
    else:
        result = _as_products(e, node, (query, key, value), bias, scale)
    return result if alive is None else silence(e, result, alive)


def _unrepeated(key: Node, value: Node) -> tuple[Node, Node]:
    """Keys and values before their heads were repeated for grouped queries.

    [B, h, S, D] -> [B, h, 1, S, D] -> [B, h, n, S, D] -> [B, h * n, S, D]: the attention operator
    repeats them itself, without moving any data.
    """
    sources = [_before_repeat(x) for x in (key, value)]
    if sources[0] is None or sources[1] is None:
        return key, value
    if sources[0].meta["val"].shape[1] != sources[1].meta["val"].shape[1]:
        return key, value
    return sources[0], sources[1]


def _before_repeat(node: Node) -> Node | None:
    merged = dims_of(node.meta["val"])
    node = _through_copies(node)
    if not is_op(node, *_RESHAPES):
        return None
    wide = _through_copies(node_of(node.args[0]))
    if not is_op(wide, aten.expand.default):
        return None
    thin = node_of(wide.args[0])
    if not is_op(thin, aten.unsqueeze.default) or int(thin.args[1]) % 5 != 2:  # type: ignore[arg-type]
        return None
    source = node_of(thin.args[0])
    dims, spread = dims_of(source.meta["val"]), dims_of(wide.meta["val"])
    if len(dims) != 4 or not isinstance(dims[1], int) or not isinstance(spread[2], int):
        return None
    regular = spread == (dims[0], dims[1], spread[2], *dims[2:])
    return source if regular and merged == (dims[0], dims[1] * spread[2], *dims[2:]) else None


def _through_copies(node: Node) -> Node:
    while is_op(node, aten.contiguous.default, aten.clone.default):
        node = node_of(node.args[0])
    return node


# -- masks ------------------------------------------------------------------------------------


def bias_of_mask(e: Emitter, mask: Node, dtype: torch.dtype) -> tuple[View, View | None]:
    """The mask as numbers to add, and which queries have any key at all (1 or 0).

    Both are computed once however many layers share the mask. A row that is minus infinity
    throughout is made finite, because it gives NaN. Elsewhere minus infinity stays what it is:
    among keys at the lowest finite number, which torch weighs alike, one at minus infinity
    weighs nothing.
    """
    return e.cached(("mask", mask, dtype), lambda: _make_bias(e, mask, dtype))


def _make_bias(e: Emitter, mask: Node, dtype: torch.dtype) -> tuple[View, View | None]:
    dims = dims_of(mask.meta["val"])
    smallest = torch.finfo(dtype).min
    known = e.known(mask)
    if known is not None and not _has_dead_rows(known):
        fixed = e.tensor(_float_mask(known, dtype), f"{mask.target}.bias")
        return View(fixed, dims, dims), None
    lowest, value = e.constant(smallest, dtype), e.value(mask)
    if mask.meta["val"].dtype is torch.bool:
        bias = e.op("Where", value, e.constant(0.0, dtype), lowest)
        alive = _reduce_max(e, e.cast(value, torch.bool, dtype))
    else:
        open_ = e.op("Greater", _reduce_max(e, value), e.constant(float("-inf"), dtype))
        value = e.op(
            "Where", e.op("Equal", value, lowest), e.constant(_CLOSED * smallest, dtype), value
        )
        bias = e.op("Where", open_, value, lowest)
        alive = e.op("Cast", open_, to=onnx_dtype(dtype))
    rows = (*dims[:-1], 1)
    return View(bias, dims, dims), View(alive, rows, rows)


def _reduce_max(e: Emitter, value: ir.Value) -> ir.Value:
    return e.op("ReduceMax", value, e.constant([-1]), keepdims=1)


def _has_dead_rows(mask: torch.Tensor) -> bool:
    open_ = mask if mask.dtype is torch.bool else mask > float("-inf")
    return not bool(open_.any(dim=-1).all())


def _float_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype is not torch.bool:
        lowest = torch.finfo(dtype).min
        return mask.to(dtype).masked_fill(mask == lowest, _CLOSED * lowest)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _causal_bias(e: Emitter, q: Dims, k: Dims, dtype: torch.dtype) -> View:
    """[queries, keys] with 0 where the key is not later than the query."""
    dims = (q[2], k[2])

    def make() -> View:
        lowest = e.constant(torch.finfo(dtype).min, dtype)
        full = e.op("Expand", lowest, e.sizes(dims))
        return View(e.op("Trilu", full, e.constant(1), upper=1), dims, dims)

    return e.cached(("causal", dims, dtype), make)


def silence(e: Emitter, result: View, alive: View) -> View:
    """Zero the rows of queries without keys. ``alive`` is [B or 1, H or 1, S or 1, 1]."""
    if result.perm == _HEADS_FIRST and (len(alive.dims) < 3 or alive.dims[-3] == 1):
        # The base is [B, S, H * D]: the mask is the same for all heads, so it has no such axis.
        rows = (*alive.dims[:-3], *alive.dims[-2:])
        flat = e.materialize(View(alive.base, alive.dims, rows))
        return result.with_base(e.op("Mul", result.base, flat))
    shape = result.shape
    return View(e.op("Mul", e.materialize(result), alive.base), shape, shape)


# -- forms ------------------------------------------------------------------------------------


def _as_operator(
    e: Emitter,
    node: Node,
    operands: tuple[Node, Node, Node],
    bias: View | None,
    scale: float,
    causal: bool,
) -> View:
    query, key, _ = operands
    q, k = dims_of(query.meta["val"]), dims_of(key.meta["val"])
    out = dims_of(node.meta["val"])
    spread = None if bias is None else _spread(e, bias, q, k)
    given = [packed(e, x) for x in operands]
    attributes: dict[str, Any] = {"scale": scale, "is_causal": int(causal)}
    if all(p is not None for p in given):
        result = e.op(
            "Attention",
            *given,
            spread,
            q_num_heads=int(q[1]),
            kv_num_heads=int(k[1]),
            **attributes,
        )
        heads_last: Dims = (out[0], out[2], out[1], out[3])
        base_dims: Dims = (out[0], out[2], int(out[1]) * out[3])
        return View(result, base_dims, heads_last, _HEADS_FIRST)
    result = e.op("Attention", *[e.value(x) for x in operands], spread, **attributes)
    return View(result, out, out)


def packed(e: Emitter, node: Node) -> ir.Value | None:
    """[B, H, S, D] as [B, S, H * D], where it was split and permuted from that."""
    view = e.view(node)
    if view.perm != _HEADS_FIRST:
        return None
    b, s, h, d = view.dims
    if not isinstance(h, int) or not isinstance(d, int):
        return None
    return e.materialize(View(view.base, view.base_dims, (b, s, h * d)), like=node.meta["val"])


def _spread(e: Emitter, bias: View, q: Dims, k: Dims) -> ir.Value:
    """ONNX Runtime broadcasts a mask over batch and heads, but not over queries and keys."""
    if bias.dims[-2:] == (q[2], k[2]):
        return bias.base

    def make() -> ir.Value:
        head = e.constant([1, 1])
        goal = e.op("Concat", head, e.sizes((q[2], k[2])), axis=0)
        return e.op("Expand", bias.base, goal)

    return e.cached(("spread", bias.base, q[2], k[2]), make)


def _as_products(
    e: Emitter,
    node: Node,
    operands: tuple[Node, Node, Node],
    bias: View | None,
    scale: float,
) -> View:
    query, key, value = operands
    out, dtype = dims_of(node.meta["val"]), dtype_of(node.meta["val"])
    q, k = dims_of(query.meta["val"]), dims_of(key.meta["val"])
    key_view, value_view = e.view(key), e.view(value)
    if q[1] != k[1]:
        key_view = _repeat_heads(e, key_view, int(q[1]) // int(k[1]))
        value_view = _repeat_heads(e, value_view, int(q[1]) // int(k[1]))
    order = (0, 1, 3, 2)
    perm = order if key_view.perm is None else tuple(key_view.perm[p] for p in order)
    across = e.materialize(View(key_view.base, key_view.base_dims, key_view.dims, perm))
    scores = e.op("MatMul", e.value(query), across)
    scores = e.op("Mul", scores, e.constant(scale, dtype))
    if bias is not None:
        scores = e.op("Add", scores, bias.base)
    weights = e.op("Softmax", scores, axis=-1)
    result = e.op("MatMul", weights, e.materialize(value_view))
    return View(result, out, out)


def _repeat_heads(e: Emitter, view: View, times: int) -> View:
    """[B, h, S, D] -> [B, h * times, S, D], each head repeated."""
    b, h, s, d = view.shape
    base = e.materialize(view)
    wide = e.materialize(View(base, view.shape, (b, h, 1, s, d)))
    goal = e.op("Expand", wide, e.constant([1, 1, times, 1, 1]))
    return View(goal, (b, h, times, s, d), (b, int(h) * times, s, d))


ATTENTION: Table = {aten.scaled_dot_product_attention.default: _attention}
