"""Adaptive average pooling whose bins are of different lengths, or overlap.

    y[j] = mean(x[floor(j * s / g) : ceil((j + 1) * s / g)])        s elements into g bins

is linear along each axis, so it is one matrix product per axis with a constant matrix [s, g]. Such
pools come from models that are fed smaller pictures than they were made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_graph import Emitter

if TYPE_CHECKING:
    import onnx_ir as ir


def bin_weights(size: int, bins: int) -> Tensor:
    """f64 [size, bins]: column j averages the elements of bin j; each column adds up to 1."""
    weights = torch.zeros(size, bins, dtype=torch.float64)
    for j in range(bins):
        start, stop = j * size // bins, -(-(j + 1) * size // bins)
        weights[start:stop, j] = 1.0 / (stop - start)
    return weights


def average_bins(
    e: Emitter, node: Node, x: ir.Value, pairs: Sequence[tuple[Any, Any]], dtype: torch.dtype
) -> ir.Value | None:
    """Average over the last one or two axes; None where their sizes are not known.

    Args:
        e: where to emit.
        node: the pool.
        x: what is pooled, [..., s] or [..., s, t].
        pairs: size and number of bins of each pooled axis.
        dtype: of ``x``.
    """
    if len(pairs) > 2 or not all(isinstance(n, int) for pair in pairs for n in pair):
        return None
    size, bins = pairs[-1]
    if size != bins:
        weights = bin_weights(size, bins).to(dtype)
        x = e.op("MatMul", x, e.tensor(weights, f"{node.name}.bins"))
    if len(pairs) == 2 and pairs[0][0] != pairs[0][1]:
        weights = bin_weights(*pairs[0]).T.contiguous().to(dtype)
        x = e.op("MatMul", e.tensor(weights, f"{node.name}.bins"), x)
    return x
