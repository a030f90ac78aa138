"""Scales of the units that stay, so that a layer gives what it gave before others left.

With ``A_i`` what unit i adds to the output, the scales ``r = 1 + d`` minimize
``||sum_i d_i A_i - D||^2 + ridge ||d||^2``, where D is what the output lacks. For a unit with the
columns c of a weight W and inputs X, ``A^T A = (W^T W) o (X^T X)`` summed over blocks of columns,
and ``A^T D = W o (D^T X)`` likewise: the tall matrix A is never built.

Source: Kwon et al., NeurIPS 2022, section 4.3; but solved by Cholesky in float64, since their
solver on the normal equations squares the condition number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 10.0  # |r| beyond it is the mark of near duplicates blown up against each other


@dataclass
class Moments:
    """What a layer's scales depend on, summed over tokens.

    Attributes:
        inputs: ``X^T X``, float64 ``[columns, columns]``.
        cross: ``D^T X``, float64 ``[outputs, columns]``.
    """

    inputs: Tensor
    cross: Tensor

    @classmethod
    def of(cls, x: Tensor, lacking: Tensor) -> Moments:
        """Of tokens ``x [tokens, columns]`` and what their outputs lack ``[tokens, outputs]``."""
        return cls((x.T @ x).double(), (lacking.T @ x).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.inputs + other.inputs, self.cross + other.cross)


def normal_equations(moments: Moments, weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """``A^T A [units, units]`` and ``A^T D [units]``.

    Args:
        moments: of all columns.
        weight: ``[outputs, columns of X]``.
        columns: int64 ``[units, c]``: those of each unit that stays.
    """
    w = weight.double()[:, columns.flatten()]
    chosen = columns.flatten()
    full = (w.T @ w) * moments.inputs[chosen][:, chosen]
    each = columns.shape[1]
    square = full.unflatten(0, (-1, each)).unflatten(2, (-1, each)).sum((1, 3))
    right = (w * moments.cross[:, chosen]).sum(0).unflatten(0, (-1, each)).sum(1)
    return square, right


def scales(square: Tensor, right: Tensor, ridge: float = 0.0) -> Tensor | None:
    """``r = 1 + d`` with ``(A^T A + ridge I) d = A^T D``; None where it is not to be trusted.

    Args:
        square: ``A^T A``.
        right: ``A^T D``; all zero gives ones exactly.
        ridge: added to the diagonal.

    Returns:
        float64 ``[units]``; None where the matrix is singular, or a scale is beyond ``LARGEST``.
    """
    damped = square.double() + ridge * torch.eye(len(square), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(right.isfinite().all()):
        return None
    r = 1 + torch.cholesky_solve(right.double().unsqueeze(1), factor).squeeze(1)
    trusted = bool(r.isfinite().all()) and float(r.abs().max()) <= LARGEST
    return r if trusted else None
