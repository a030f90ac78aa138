"""Column after column: the sweep of GPTQ and SparseGPT, and the factor of the inverse it needs.

Columns of a weight are kept as rows in memory, since every step works on whole columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BATCH = 128  # columns between two products with the rest of the matrix


def inverse_factor(h: Tensor, damping: float) -> Tensor:
    """``U`` of ``(H + d I)^-1 = U^T U``, upper triangular, float64; H has no dead inputs."""
    # With rows and columns reversed, H = L L^T; so U is the inverse of L, reversed again. Wide
    # layers are where memory is short: no copy of H lives longer than it must.
    damped = h.flip(0, 1)
    damped.diagonal().add_(damping * h.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    del damped
    eye = torch.eye(len(h), dtype=h.dtype)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    del lower, eye
    factor: Tensor = inverse.flip(0, 1)
    return factor


def sweep(
    rows: Tensor,
    factor: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
    *,
    batch: int = BATCH,
    before: Callable[[Tensor, int], Tensor | None] | None = None,
) -> tuple[Tensor, float]:
    """Round columns from left to right, and repair each error in the columns to come.

    Args:
        rows: ``[O, I]``.
        factor: ``U``, ``[I, I]``.
        round_column: column ``[O]`` and its index to the column as it is written.
        batch: columns between two products with the rest; the result does not depend on it.
        before: shown the weights as they have become, ahead of each column. It may give errors
            ``[columns, O]`` of this column and those after it, up to the end of the batch, which
            are repaired at once: ``w_j -= sum of e_i U_ij``, these columns themselves included.

    Returns:
        The rounded weights, ``[O, I]``, and the sum of ``e^2 / 2``, which is ``tr(D H D^T) / 2``
        of their change D.
    """
    w = rows.t().clone(memory_format=torch.contiguous_format)  # a column lies in one piece
    done = torch.empty_like(w)
    loss = 0.0
    for start in range(0, len(w), batch):
        stop = min(start + batch, len(w))
        errors = torch.zeros(stop - start, w.shape[1], dtype=w.dtype)
        for i in range(start, stop):
            ahead = None if before is None else before(w.t(), i)
            if ahead is not None:
                w[i:stop] -= factor[i : i + len(ahead), i:stop].t() @ ahead
                errors[i - start : i - start + len(ahead)] += ahead
            done[i] = round_column(w[i], i)
            e = (w[i] - done[i]) / factor[i, i]
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], e, alpha=-1)
            errors[i - start] += e
        w[stop:] -= factor[start:stop, stop:].t() @ errors
        loss += float(errors.double().square().sum()) / 2
    return done.t(), loss
