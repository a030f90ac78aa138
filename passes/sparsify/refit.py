"""Choose the weights that stay once more, for the mask that a sweep has found.

A column sweep repairs each error by the columns behind it only. For the mask it ends with, the best
weights of each output minimize ``(w' - w) H (w' - w)^T / 2`` over the weights that stay. Solving
that for each output has the cost of exact surgery, O(O I^3); conjugate gradients from the sweep's
result get nearly there in a few products of all outputs with H, O(O I^2) each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refit_by_gradients(
    rows: Tensor, start: Tensor, kept: Tensor, h: Tensor, *, steps: int
) -> Tensor:
    """Lower the output error of every row with its mask fixed.

    Preconditioned by the diagonal of H; all rows step together, each by its own lengths.

    Args:
        rows: the weights to be stood in for, ``[outputs, n]``.
        start: what to begin with, zero where not kept.
        kept: bool ``[outputs, n]``.
        h: positive definite ``[n, n]``.
        steps: products with H.

    Returns:
        Float64 ``[outputs, n]``, zero where not kept; a row that did not gain is as in ``start``.
    """
    start = start.double()
    h, single = h.double(), h.float()
    first = (start - rows.double()) @ h
    scale = torch.where(kept, h.diagonal().reciprocal().float(), 0)
    residual = -first.float()
    moved = torch.zeros_like(residual)
    ahead = scale * residual
    power = (residual * ahead).sum(1, keepdim=True)
    for _ in range(steps):
        bent = ahead @ single
        curve = (ahead * bent).sum(1, keepdim=True)
        length = torch.where(curve > 0, power / curve, 0)
        moved += length * ahead
        residual -= length * bent
        fresh = scale * residual
        before, power = power, (residual * fresh).sum(1, keepdim=True)
        ahead = fresh + torch.where(before > 0, power / before, 0) * ahead
    change = moved.double()
    gain = (change * (first + change @ h / 2)).sum(1, keepdim=True)
    return torch.where(gain < 0, start + change, start)
