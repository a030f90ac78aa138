"""Operators of planish's own that ATen has no single operator for.

Importing this module registers them as ``torch.ops.planish.*``. Each has a kernel in plain torch
that says what it means, and a shape function.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("planish", "DEF")  # kept alive: the operators die with it

LIBRARY.define(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor"
)


def rotate(x: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of features by a quarter: ``(a, b) -> (-b, a)``.

    Args:
        x: ``[..., D]``, D even.
        interleaved: pairs are neighbors ``(2i, 2i + 1)``; otherwise ``(i, i + D/2)``.
    """
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """``x * cos + rotate(x) * sin``: each pair of features turned by an angle of its position.

    Args:
        x: ``[..., D]``.
        cos: broadcasts to ``x``; the cosine of each feature's angle.
        sin: likewise, the sine.
        interleaved: how features pair up, see ``rotate``.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, 3.4.
    """
    return x * cos + rotate(x, interleaved) * sin


def _fake_rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


LIBRARY.impl("rotary_embedding", rotary_embedding, "CompositeExplicitAutograd")
torch.library.register_fake("planish::rotary_embedding", _fake_rotary_embedding, lib=LIBRARY)
