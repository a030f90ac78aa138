"""The order of pivots of a QR, from the Gram matrix: pivoted Cholesky in blocks.

A QR with column pivoting and a Cholesky factorization of the Gram matrix with diagonal pivoting
choose the same columns. The second spends most of its work in matrix products, on a third of the
numbers; but the Gram matrix squares the condition number, so that its pivots mean something only
while they are far above the rounding errors: it stops before, and what is left is for the QR.

Source: Higham, "Analysis of the Cholesky decomposition of a semi-definite matrix", 1990; Lucas,
"LAPACK-style codes for level 2 and 3 pivoted Cholesky factorizations", LAPACK Working Note 161.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Smallest pivot that is trusted, by the first one: rounding errors of the Gram matrix are some
# 1e-13 of it, so that its last has two digits or more, and R's diagonal is down to 3e-6.
_TRUSTED = 1e-11
_PANEL = 64


def leading_pivots(gram: Tensor) -> Tensor:
    """The first columns that a pivoted QR takes, as far as the Gram matrix can tell.

    Args:
        gram: float64 ``[m, m]``, symmetric, of finite columns.

    Returns:
        int64 ``[s]``, in their order; the others have too little left for a choice.
    """
    left = gram.clone()
    alive = torch.arange(len(gram))
    limit = _TRUSTED * float(gram.diagonal().max()) if len(gram) else 0.0
    order: list[int] = []
    while len(alive):
        taken, rows = _panel(left, limit)
        order += alive[taken].tolist()
        if len(taken) < min(_PANEL, len(alive)):
            break
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[taken] = False
        alive, rows = alive[stay], rows[:, stay]
        left = left[stay][:, stay].addmm_(rows.t(), rows, alpha=-1)
    return torch.tensor(order, dtype=torch.int64)


def _panel(left: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Up to ``_PANEL`` pivots of what is left, and their rows of the factor ``[taken, m]``."""
    m = len(left)
    diagonal = left.diagonal().clone()
    rows = torch.zeros(min(_PANEL, m), m, dtype=left.dtype)
    taken: list[int] = []
    for step in range(len(rows)):
        pivot = int(diagonal.argmax())
        value = float(diagonal[pivot])
        if value <= limit:
            break
        row = rows[step]
        torch.addmv(left[pivot], rows[:step].t(), rows[:step, pivot], alpha=-1, out=row)
        row.div_(value**0.5)
        diagonal.addcmul_(row, row, value=-1)
        taken.append(pivot)
        diagonal[taken] = -torch.inf
    return torch.tensor(taken, dtype=torch.int64), rows[: len(taken)]
