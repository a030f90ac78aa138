"""The empirical Fisher matrix of a weight: its diagonal, or the inverse of its diagonal blocks.

Rewrite:
    F = lambda I + (1 / N) sum_n g_n g_n^T,   g_n the gradient of the loss on the n-th batch
    recurrence (Woodbury):  F_0^-1 = I / lambda,   u = F^-1 g_n,   F^-1 -= u u^T / (N + g_n^T u)
    at once (N < B):        F^-1 = I / lambda - lambda^-2 G^T (N I + G G^T / lambda)^-1 G
Shapes:       a weight of D entries is cut into ceil(D / B) blocks of B consecutive ones, never
              across weights. The last one is filled up with entries whose gradient is zero, which
              is the same as a shorter block.
Requires:     N is the number of gradients that are planned, in both forms.
Cost:         D B 8 bytes; 4 N D B operations for the recurrence, about 3 N^2 D + 2 N D B at once.
Numbers:      float64 throughout; every step is symmetric bit for bit.
Source:       Singh, Alistarh, "WoodFisher: Efficient Second-Order Approximation for Neural Network
              Compression", NeurIPS 2020, section 3.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from planish.ir.errors import PassError


def to_blocks(flat: Tensor, size: int) -> Tensor:
    """``[D]`` as ``[ceil(D / size), size]`` in float64, zeros behind the end."""
    padded = F.pad(flat.double(), (0, -len(flat) % size))
    return padded.reshape(-1, size)


def at_once_is_cheaper(gradients: int, size: int) -> bool:
    """Whether one system of N equations for each block costs less than N steps of recurrence."""
    n, b = gradients, size
    return 3 * n * n * b + n**3 / 3 + 2 * n * b * b < 4 * n * b * b


class Accumulator(Protocol):
    """Takes the gradients of one weight, one after another."""

    def add(self, gradient: Tensor) -> None:
        """Take one: ``[D]``, in the order of the entries."""


class GradientMean:
    """The mean of the gradients, streaming: ``g``.

    Args:
        numel: entries of the weight, D.
    """

    def __init__(self, numel: int):
        self._sum = torch.zeros(numel, dtype=torch.float64)
        self._arrived = 0

    def add(self, gradient: Tensor) -> None:
        """Take one gradient ``[D]``."""
        self._sum += gradient
        self._arrived += 1

    def mean(self) -> Tensor:
        """``[D]``, of the gradients that arrived."""
        return self._sum / max(1, self._arrived)


class DiagonalFisher:
    """``F_ii = lambda + (1 / N) sum g_i^2``, streaming.

    Args:
        numel: entries of the weight, D.
        planned: N.
        damping: lambda.
    """

    def __init__(self, numel: int, planned: int, damping: float = 0.0):
        self._squares = torch.zeros(numel, dtype=torch.float64)
        self._planned, self._damping = planned, damping

    def add(self, gradient: Tensor) -> None:
        """Take one gradient ``[D]``."""
        self._squares += gradient.double().square()

    def diagonal(self) -> Tensor:
        """``[D]``."""
        return self._squares / self._planned + self._damping


class InverseFisher:
    """``F^-1`` of the diagonal blocks of F, streaming.

    Args:
        numel: entries of the weight, D.
        block_size: B; a weight with fewer entries is one block.
        planned: N.
        damping: lambda, above 0.
        at_once: solve one system at the end in place of the recurrence; None for the cheaper.
    """

    def __init__(
        self,
        numel: int,
        block_size: int,
        planned: int,
        damping: float,
        *,
        at_once: bool | None = None,
    ):
        self.size = min(block_size, numel)
        self._planned, self._damping = planned, damping
        self._mean = GradientMean(numel)
        self._blocks = -(-numel // self.size)
        if at_once is None:
            at_once = at_once_is_cheaper(planned, self.size)
        self._held: list[Tensor] = []
        self._inverse = None if at_once else self._start()

    def _start(self) -> Tensor:
        eye = torch.eye(self.size, dtype=torch.float64) / self._damping
        return eye.repeat(self._blocks, 1, 1)

    def add(self, gradient: Tensor) -> None:
        """Take one gradient ``[D]``."""
        self._mean.add(gradient)
        g = to_blocks(gradient, self.size)
        if self._inverse is None:
            self._held.append(g.to(gradient.dtype))
            return
        u = torch.bmm(self._inverse, g.unsqueeze(2)).squeeze(2)
        # The square root of what it is divided by, so that v v^T is symmetric bit for bit.
        v = u / (self._planned + (g * u).sum(1, keepdim=True)).sqrt()
        self._inverse.baddbmm_(v.unsqueeze(2), v.unsqueeze(1), alpha=-1)

    def gradient(self) -> Tensor:
        """The mean gradient, ``[D]``."""
        return self._mean.mean()

    def inverse(self) -> Tensor:
        """``[ceil(D / B), B, B]``; nothing can be added any more.

        Raises:
            PassError: it lost its positive diagonal to rounding.
        """
        found = self._solve() if self._inverse is None else self._inverse
        diagonal = found.diagonal(dim1=1, dim2=2)
        if not bool((diagonal > 0).all() & diagonal.isfinite().all()):
            raise PassError(
                f"the inverse Fisher matrix is not positive with a damping of {self._damping:g}",
                hint="the gradients are too large for it: raise damping=",
            )
        return found

    def _solve(self) -> Tensor:
        found = self._start()
        if not self._held:
            return found
        g = torch.stack(self._held, 1).double()
        self._held = []
        inner = g @ g.mT / self._damping
        inner.diagonal(dim1=1, dim2=2).add_(self._planned)
        factor = torch.linalg.cholesky(inner)
        half = torch.linalg.solve_triangular(factor, g, upper=False) / self._damping
        return found.baddbmm_(half.mT, half, alpha=-1)
