"""Attention on integer queries, keys and values as one kernel of ONNX Runtime: QAttention.

QAttention multiplies the codes by the weights of all three in one product of ``3 * features``
columns and attends in float. It is an alternative, taken where a measurement says so (the choice
``integer-attention``); the default is three products and the Attention operator. Milliseconds for
the three products and their attention on a processor with AVX-512 VNNI, one thread (tokens x
features, heads; P: with padding mask; C: causal):

                                        128x384   128x384   197x192   257x384    64x768
                                          12, P        12         3         6     12, C
    QAttention                             0.75      0.65      0.43      1.65      1.07
    one product, Split, Attention          0.68      0.62      0.42      1.58      0.98
    three products, Attention              0.63      0.57      0.39      1.53      0.96
    three products, MultiHeadAttention     0.78      0.65      0.44      1.64      1.02

The kernel knows masks of keys, ``[B, S]``, and of queries by keys, ``[B, S, S]``, that are either
open or closed. Programs with other masks, other scales, or grouped heads keep the default form.
Products of queries and keys in int8 gain nothing: quantizing the probabilities costs what the
smaller product saves.

The default form makes no keys and values for padding at the end: behind the last key that is open
in any sentence there is nothing to attend to. That saves more than its share, for the runtime's
softmax takes ten times as long over masked keys: their exponentials pass through denormal numbers
(attention over 128 tokens in 12 heads: 0.29 ms with all keys open, 0.86 with 64, 1.55 with 20).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_attention import bias_of_mask, packed, silence
from planish.backends.onnx_dims import Dim, Dims, dims_of
from planish.backends.onnx_file import onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View
from planish.backends.ort_matmul import DOMAIN, Product, product_behind
from planish.ir.ops import argument, aten

if TYPE_CHECKING:
    import onnx_ir as ir

_HEADS_FIRST = (0, 2, 1, 3)


def _attention(e: Emitter, node: Node) -> View | None:
    operands = [n for n in node.args[:3] if isinstance(n, Node)]
    products = _products(e, operands)
    if products is None or float(argument(node, "dropout_p")) != 0:
        return None
    if e.style.integer_attention == "packed":
        return _as_one(e, node, products)
    return _without_padding(e, node, operands[0], products)


# -- the default form, without keys of padding ------------------------------------------------


def _without_padding(e: Emitter, node: Node, query: Node, products: list[Product]) -> View | None:
    """Attention to the keys up to the last open one; None without a mask that is for keys alone."""
    mask = argument(node, "attn_mask")
    b, h, s, d = dims_of(node.meta["val"])
    if mask is None or e.style.attention != "operator" or e.opset < 23:
        return None
    if mask.meta["val"].dtype is not torch.bool or e.known(mask) is not None:
        return None
    if bool(argument(node, "is_causal")) or _mask_dims(mask, b, s) not in ((1, s), (b, s)):
        return None
    bias, alive = bias_of_mask(e, mask, torch.float32)
    end = e.cached(("open end", mask), lambda: _end(e, e.value(mask), s))

    def codes() -> ir.Value:
        x = products[1].left.view
        whole = e.materialize(View(x.base, x.base_dims, (b, s, x.base_dims[-1])))
        return e.op("Slice", whole, e.constant([0]), end, e.constant([1]))

    def spread() -> ir.Value:
        part = e.op("Slice", bias.base, e.constant([0]), end, e.constant([-1]))
        goal = e.op("Concat", e.constant([1, 1]), e.sizes((s,)), end, axis=0)
        return e.op("Expand", part, goal)

    short = e.cached(("open codes", products[1].left.codes, end), codes)
    made = [replace(p, left=replace(p.left, codes=short)).emit(e) for p in products[1:]]
    scale = argument(node, "scale")
    result = e.op(
        "Attention", packed(e, query), *made, e.cached(("open bias", bias.base), spread),
        q_num_heads=int(h), kv_num_heads=int(h),
        scale=1 / math.sqrt(int(d)) if scale is None else float(scale),
    )  # fmt: skip
    view = View(result, (b, s, int(h) * int(d)), (b, s, h, d), _HEADS_FIRST)
    return view if alive is None else silence(e, view, alive)


def _end(e: Emitter, mask: ir.Value, s: Dim) -> ir.Value:
    """How many keys there are up to the last that any sentence has open; 1 where there is none."""
    one = e.constant([1])
    last = e.op("Add", e.size(s), one)
    limits = [e.op("Squeeze", v) for v in (one, last, one)]
    numbers = e.op("Range", *limits)
    open_ = e.op("Mul", e.op("Cast", mask, to=onnx_dtype(torch.int64)), numbers)
    return e.op("Max", e.op("Reshape", e.op("ReduceMax", open_, keepdims=0), one), one)


# -- one kernel -------------------------------------------------------------------------------


def _as_one(e: Emitter, node: Node, products: list[Product]) -> View | None:
    """QAttention; None where it cannot say what the program does."""
    b, h, s, d = dims_of(node.meta["val"])
    scale = argument(node, "scale")
    if scale is not None and not math.isclose(float(scale), 1 / math.sqrt(int(d)), rel_tol=1e-6):
        return None
    mask = argument(node, "attn_mask")
    keys, alive = None, None
    if mask is not None:
        if mask.meta["val"].dtype is not torch.bool:
            return None
        keys = _mask(e, mask, b, s)
        if keys is None:
            return None
        alive = bias_of_mask(e, mask, torch.float32)[1]
    x = products[0].left.view
    codes = e.materialize(View(x.base, x.base_dims, (b, s, x.base_dims[-1])))
    result = e.op(
        "QAttention", codes, *_joined(e, products, keys), domain=DOMAIN,
        num_heads=int(h), unidirectional=int(bool(argument(node, "is_causal"))),
        mask_filter_value=torch.finfo(torch.float32).min,
    )  # fmt: skip
    view = View(result, (b, s, int(h) * int(d)), (b, s, h, d), _HEADS_FIRST)
    return view if alive is None else silence(e, view, alive)


def _products(e: Emitter, operands: list[Node]) -> list[Product] | None:
    """The three products of the same codes, or None."""
    shapes = {dims_of(n.meta["val"]) for n in operands}
    views = [e.view(n) for n in operands]
    if len(operands) != 3 or len(shapes) != 1:
        return None
    if any(v.perm != _HEADS_FIRST or len(v.dims) != 4 for v in views):
        return None
    products = [product_behind(e, v.base) for v in views]
    first = products[0]
    for product, view in zip(products, views, strict=True):
        if product is None or first is None or product.left.codes is not first.left.codes:
            return None
        if product.stop - product.start != int(view.dims[2]) * int(view.dims[3]):
            return None
        if product.bias is not None and not isinstance(product.bias, Tensor):
            return None
    return [p for p in products if p is not None]


def _joined(
    e: Emitter, products: list[Product], keys: ir.Value | None
) -> tuple[ir.Value | None, ...]:
    """The operator's inputs after the codes: constants made of three, and the mask."""
    parts = [(p, slice(p.start, p.stop), p.stop - p.start) for p in products]
    codes = [p.right.codes[:, span] for p, span, _ in parts]
    scales = [p.right.scale.expand(p.right.codes.shape[1])[span] for p, span, _ in parts]
    biases = [
        p.bias[span] if isinstance(p.bias, Tensor) else torch.zeros(width)
        for p, span, width in parts
    ]
    zeros = [
        torch.zeros(width, dtype=torch.int8)
        if p.right.zero is None
        else p.right.zero.expand(p.right.codes.shape[1])[span]
        for p, span, width in parts
    ]
    names = [f"{p.right.names[0]}.{p.start}-{p.stop}" for p, _, _ in parts]

    def held(tensors: list[Tensor], what: str) -> ir.Value:
        key = ("packed attention", what, *names, *[p.bias_name for p in products])
        return e.cached(key, lambda: e.tensor(torch.cat(tensors, -1), f"{names[0]}.qkv.{what}"))

    left = products[0].left
    return (
        held(codes, "codes"), held(biases, "bias"), left.scale, held(scales, "scale"), keys,
        left.zero, held(zeros, "zero"),
    )  # fmt: skip


def _mask(e: Emitter, mask: Node, b: Dim, s: Dim) -> ir.Value | None:
    """A mask as int32 ``[B, S]`` or ``[B, S, S]``; None where it has no such form."""
    flat = _mask_dims(mask, b, s)
    if flat is None:
        return None

    def make() -> ir.Value:
        value = e.materialize(View(e.value(mask), dims_of(mask.meta["val"]), flat))
        whole = e.op("Cast", value, to=onnx_dtype(torch.int32))
        return whole if flat[0] == b else e.op("Expand", whole, e.sizes((b, *flat[1:])))

    return e.cached(("open keys", mask, b), make)


def _mask_dims(mask: Node, b: Dim, s: Dim) -> Dims | None:
    """The sizes of a mask that all heads share: ``[B or 1, S]`` for keys, or ``[B or 1, S, S]``."""
    dims = dims_of(mask.meta["val"])
    full: Dims = (1,) * (4 - len(dims)) + tuple(dims)
    if len(full) != 4 or full[1] != 1 or full[3] != s:
        return None
    if full[0] not in (1, b) or full[2] not in (1, s):
        return None
    return (full[0], s) if full[2] == 1 else (full[0], s, s)


ORT_ATTENTION: Table = {aten.scaled_dot_product_attention.default: _attention}
