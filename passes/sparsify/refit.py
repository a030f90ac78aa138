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
    rows: Tensor, start: Tensor, kept: Tensor, h: Tensor, *, steps: int, added: float = 0.0
) -> Tensor:
    """Lower the output error of every row with its mask fixed.

    Preconditioned by the diagonal of H; all rows step together, each by its own lengths.

    Args:
        rows: the weights to be stood in for, ``[outputs, n]``.
        start: what to begin with, zero where not kept.
        kept: bool ``[outputs, n]``.
        h: ``[n, n]``, positive definite with what is ``added``.
        steps: products with H.
        added: to the diagonal of ``h``, of which no copy is made for that.

    Returns:
        Float64 ``[outputs, n]``, zero where not kept; a row that did not gain is as in ``start``.
    """
    h = h.double()
    first = _times(start.double() - rows.double(), h, added)
    change = _steps(first, kept, h, added, steps)
    # Copies of a wide layer are what memory goes to: the rest is done in place.
    gain = _times(change, h, added).div_(2).add_(first).mul_(change).sum(1, keepdim=True)
    return change.masked_fill_(~(gain < 0), 0).add_(start)


def _times(rows: Tensor, h: Tensor, added: float) -> Tensor:
    """``rows (H + added I)``."""
    return (rows @ h).add_(rows, alpha=added)


def _steps(first: Tensor, kept: Tensor, h: Tensor, added: float, steps: int) -> Tensor:
    """The change after some steps, float64; computed in float32.

    Args:
        first: gradient of the rows to begin with, ``[outputs, n]``.
        kept: bool ``[outputs, n]``.
        h: ``[n, n]``.
        added: to its diagonal.
        steps: how many.
    """
    diagonal = h.diagonal() + added
    single = h.float()
    single.diagonal().copy_(diagonal)
    scale = torch.where(kept, diagonal.reciprocal().float(), 0)
    residual = -first.float()
    moved = torch.zeros_like(residual)
    ahead = scale * residual
    power = (residual * ahead).sum(1, keepdim=True)
    for _ in range(steps):
        bent = ahead @ single
        curve = (ahead * bent).sum(1, keepdim=True)
        length = torch.where(curve > 0, power / curve, 0)
        moved += length * ahead
        residual -= bent.mul_(length)
        del bent
        fresh = scale * residual
        before, power = power, (residual * fresh).sum(1, keepdim=True)
        ahead.mul_(torch.where(before > 0, power / before, 0)).add_(fresh)
        del fresh
    return moved.double()
