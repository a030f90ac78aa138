"""Attention as two products and a softmax, so that the products can compute on integers.

Rewrite:
    y = attention(q, k, v, mask)   ->   p = softmax(q k^T scale + mask),  y = p v
Shapes:       q: [..., T, D]; k: [..., S, D]; v: [..., S, E]; mask: broadcasts to [..., T, S].
Requires:     no dropout.
Contract:     exact, also where a query has no key left: its row of y is zero, as torch defines it.
Cost:         the scores, T x S for each head, which a fused kernel need not keep.
Failures:     none.
Source:       Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument, Target

from planish.ir.ops import argument, aten, is_op, is_pure_call, node_of
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.quantize.where import ATTENTION

_MOVES = (
    aten.expand.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.clone.default,
)


def is_attention(node: Node) -> bool:
    """Whether a node is attention that can be written as products."""
    return is_op(node, ATTENTION) and is_pure_call(node)


def decompose(node: Node, rewriter: Rewriter) -> Node:
    """Put products and a softmax in the place of an attention, within an open site.

    Args:
        node: the attention.
        rewriter: edits the program.

    Returns:
        The second product.
    """

    def call(target: Target, *args: Argument, **kwargs: Argument) -> Node:
        return rewriter.call(target, args, kwargs, like=node)

    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    if argument(node, "enable_gqa"):
        heads = int(query.meta["val"].shape[-3]) // int(key.meta["val"].shape[-3])
        if heads > 1:
            key, value = (call(aten.repeat_interleave.self_int, x, heads, -3) for x in (key, value))
    scale = argument(node, "scale")
    if scale is None:
        scale = 1 / math.sqrt(int(query.meta["val"].shape[-1]))
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scores = call(aten.mul.Tensor, scores, float(scale))
    mask, masked = _mask(node, query, key, call), True
    if mask is None:
        probabilities = call(aten.softmax.int, scores, -1)
    elif mask.meta["val"].dtype == torch.bool:
        lowest = torch.finfo(scores.meta["val"].dtype).min
        scores = call(aten.where.ScalarOther, mask, scores, lowest)
        probabilities = call(aten.softmax.int, scores, -1)
        alive = mask
    else:
        probabilities = call(aten.softmax.int, call(aten.add.Tensor, scores, mask), -1)
        masked = not _is_finite(mask, rewriter.program)
        alive = call(aten.gt.Scalar, mask, -math.inf) if masked else mask
    if mask is not None and masked and not argument(node, "is_causal"):
        # Where no key is left the softmax gives NaN or an average; torch says zero.
        probabilities = call(aten.where.ScalarOther, alive, probabilities, 0.0)
    result = call(aten.matmul.default, probabilities, value)
    rewriter.replace(node, result)
    return result


def _mask(node: Node, query: Node, key: Node, call: Callable[..., Node]) -> Node | None:
    """The mask as a value: the given one, or that of causal attention."""
    if not argument(node, "is_causal"):
        mask: Node | None = argument(node, "attn_mask")
        return mask
    rows, columns = (call(aten.arange.default, _size(x, call)) for x in (query, key))
    return call(
        aten.le.Tensor,
        call(aten.unsqueeze.default, columns, 0),
        call(aten.unsqueeze.default, rows, 1),
    )


def _size(value: Node, call: Callable[..., Node]) -> Argument:
    """The number of rows, as a number or as a node."""
    size = value.meta["val"].shape[-2]
    if isinstance(size, int):
        return size
    rank = value.meta["val"].dim()
    return call(aten.sym_size.int, value, rank - 2)


def _is_finite(mask: Node, program: Program) -> bool:
    """Whether a mask of numbers to add provably holds no minus infinity."""
    while is_op(mask, *_MOVES):
        mask = node_of(mask.args[0])
    known = program.constant(mask)
    if known is not None:
        return bool(known.isfinite().all())
    if is_op(mask, aten.where.Scalar):
        numbers: tuple[Any, ...] = mask.args[1:]
        return all(math.isfinite(number) for number in numbers)
    return False
