"""Interpolative decomposition: which columns of activations stay, and how they give the others.

``Z`` of n rows (positions) and m columns (units) becomes ``Z[:, kept] T`` with ``T`` of k rows. A
QR with column pivoting chooses the kept columns, and its error ``||Z - Z[:, kept] T||`` is exactly
that of the block of R that is left out. Only R is needed: the rows are read block by block, each
folded into the triangle of those before it (TSQR), and the pivoted QR is that of this triangle.
The order of pivots is that of a Cholesky of the triangle's Gram matrix where that can tell (see
pivots), which is several times faster; R itself never comes from a Gram matrix, which would square
the condition number. All in float64.

Source: Chee, Flynn, Damle, De Sa, "Model Preserving Compression for Neural Networks", NeurIPS 2022,
section 3; Cheng, Gimbutas, Martinsson, Rokhlin, "On the compression of low rank matrices", SIAM J.
Sci. Comput. 2005; Drmac, Bujanovic, "On the failure of rank revealing QR factorization software",
ACM TOMS 2008 (when a downdated norm must be computed anew).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.passes.prune.pivots import leading_pivots

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Interpolation:
    """Kept columns, and how they give all.

    Attributes:
        kept: int64 ``[k]``, ascending.
        matrix: T, float64 ``[k, m]``; ``matrix[:, kept]`` is the identity. ``[parts, k, m]`` where
            parts are told apart.
        constant: float64 ``[m]``, added to ``Z[:, kept] T``; zero at the kept ones, and None where
            no constant was asked for. ``[parts, m]`` where parts are told apart.
        error: ``||Z - Z[:, kept] T - constant||`` in Frobenius' norm.
        relative: that, divided by the norm of Z (of Z less its means, with a constant).
        score: first discarded diagonal entry of R over the first of all; 0 where all are kept.
    """

    kept: Tensor
    matrix: Tensor
    constant: Tensor | None
    error: float
    relative: float
    score: float

    def __str__(self) -> str:
        kept = f"{len(self.kept)} kept, error {100 * self.relative:.2f} %"
        return f"{kept}, max |T| {self.largest:.3g}"

    @property
    def largest(self) -> float:
        """The greatest |T|: by how much weights may grow, which a later rounding feels."""
        return float(self.matrix.abs().max())


@dataclass(frozen=True)
class Pivoted:
    """``Z[:, order] = Q R`` with a diagonal that falls.

    Attributes:
        order: int64 ``[m]``, best first.
        r: float64 ``[p, m]``, upper trapezoidal, p = min(rows, m).
        head: R of a column of ones against the units in their order, ``[m]``, and
        ones: the norm of that column; None where no constant was asked for.
        parts: R of each part by itself, ``[p, m]``, with ones first as in ``pivoted_qr``.
    """

    order: Tensor
    r: Tensor
    head: Tensor | None = None
    ones: float = 0.0
    parts: tuple[Tensor, ...] = ()

    @property
    def diagonal(self) -> Tensor:
        """|R_kk| ``[m]``, with zeros where there were fewer rows than columns."""
        found = torch.zeros(len(self.order), dtype=torch.float64)
        found[: len(self.r)] = self.r.diagonal().abs()
        return found

    def score(self, k: int) -> float:
        """``|R_kk| / |R_00|``: how bad it is to keep the first k only; 0 if nothing is lost."""
        diagonal = self.diagonal
        if k >= len(diagonal) or not float(diagonal[0]):
            return 0.0
        return float(diagonal[k] / diagonal[0])

    def within(self, tolerance: float) -> int:
        """The fewest columns, at least one, whose score is at most ``tolerance``."""
        diagonal = self.diagonal
        kept = int((diagonal > tolerance * diagonal[0]).sum())
        return max(1, kept)

    def keep(self, k: int) -> Interpolation:
        """Keep the best k columns, 1 <= k <= m."""
        m = len(self.order)
        if not 1 <= k <= m:
            raise ValueError(f"{k} of {m} columns cannot be kept")
        # Behind the numerical rank R holds rounding errors, which a solve would blow up: columns
        # kept there are copied only, and none is made from them.
        floor = _EPS * m * float(self.diagonal[0])
        solid = min(k, int((self.diagonal > floor).sum()))
        t = torch.zeros(k, m, dtype=torch.float64)
        t[:, :k] = torch.eye(k, dtype=torch.float64)
        if solid:
            block = self.r[:solid]
            t[:solid, k:] = torch.linalg.solve_triangular(
                block[:, :solid], block[:, k:], upper=True
            )
        constant = None
        if self.head is not None:
            rest = (self.head - self.head[:k] @ t) / self.ones
            rest[:k] = 0
            constant = torch.empty_like(rest)
            constant[self.order] = rest
        error = float(self.r[k:, k:].square().sum().sqrt()) if k < len(self.r) else 0.0
        size = float(self.r.square().sum().sqrt())
        kept, rank = self.order[:k].sort()
        matrix = torch.empty_like(t)
        matrix[:, self.order] = t[rank]
        if self.parts:
            matrix, constant, error = _apart(self.parts, kept, self.head is not None)
        return Interpolation(
            kept, matrix, constant, error, error / size if size else 0.0, self.score(k)
        )


def _apart(
    parts: tuple[Tensor, ...], kept: Tensor, constant: bool
) -> tuple[Tensor, Tensor | None, float]:
    """The least-squares T of each part by itself, its constants, and the error of all together."""
    matrices, constants, error = [], [], 0.0
    first = int(constant)
    for part in parts:
        given = torch.cat([torch.arange(first), kept + first])
        read, made = part[:, given], part[:, first:]
        found = torch.linalg.lstsq(read, made, driver="gelsd").solution  # may be short of rank
        found[:, kept] = 0
        found[first:, kept] = torch.eye(len(kept), dtype=torch.float64)
        error += float((made - read @ found).square().sum())
        matrices.append(found[first:])
        constants.append(found[0])
    return torch.stack(matrices), torch.stack(constants) if constant else None, math.sqrt(error)


def pivoted_qr(z: Tensor, *, constant: bool = False, parts: tuple[Tensor, ...] = ()) -> Pivoted:
    """QR with column pivoting; torch has none.

    Args:
        z: ``[n, m]``, or the triangle of a TSQR; with ``constant`` its first column is of ones (or
            what a TSQR made of it), which comes first whatever its norm.
        constant: whether it has.
        parts: what ``z`` is put together of, where each part is to have its own T.

    Raises:
        ValueError: z is not finite.
    """
    if not bool(torch.isfinite(z).all()):
        raise ValueError("the activations are not all finite")
    a = z.double().clone()
    head, ones = None, 0.0
    if constant:
        ones = _reflect(a, 0)
        head, a = a[0, 1:].clone(), a[1:, 1:].clone()
    order = leading_pivots(a.t() @ a)
    s, m = len(order), a.shape[1]
    if s < m:
        rest = torch.ones(m, dtype=torch.bool)
        rest[order] = False
        order = torch.cat([order, rest.nonzero().flatten()])
    r = torch.linalg.qr(a[:, order], mode="r").R
    if s < m:
        later, tail = _householder(r[s:, s:])
        order[s:] = order[s:][later]
        r[:s, s:] = r[:s, s:][:, later]
        r[s:, s:] = tail
    return Pivoted(order, r, head[order] if head is not None else None, ones, parts)


def _householder(a: Tensor) -> tuple[Tensor, Tensor]:
    """The order and R ``[min(n, m), m]`` of ``a [n, m]``, reflection by reflection."""
    # A column is a row in memory: pivoting swaps rows, and norms run along them.
    a = a.t().clone(memory_format=torch.contiguous_format)
    m, n = a.shape
    order = torch.arange(m)
    norms = a.square().sum(1).sqrt()
    exact = norms.clone()
    for k in range(min(n, m)):
        pivot = k + int(norms[k:].argmax())
        if not float(norms[pivot]):
            break  # nothing is left: dead units, or all rows are spent
        if pivot != k:
            swap = torch.tensor([k, pivot])
            for x in (a, order, norms, exact):
                x[swap] = x[swap.flip(0)]
        _reflect(a.t(), k)
        _downdate(a, norms, exact, k)
    return order, a.t()[: min(n, m)].triu().contiguous()


def _reflect(a: Tensor, k: int) -> float:
    """Make column k of ``a [n, m]`` zero below its diagonal, whose new value is returned."""
    v = a[k:, k].clone()
    norm = float(v.square().sum().sqrt())
    if not norm:
        return 0.0
    alpha = -math.copysign(norm, float(v[0]))
    v[0] -= alpha
    scale = float(v.square().sum())
    if scale:
        rest = a[k:, k + 1 :]
        rest.sub_(torch.outer(v, (v @ rest) * (2 / scale)))
    a[k:, k] = 0
    a[k, k] = alpha
    return alpha


def _downdate(a: Tensor, norms: Tensor, exact: Tensor, k: int) -> None:
    """Norms of what is left of each column below row k: less work than summing them anew.

    Cancellation makes a downdated norm worthless once it has fallen far below the last one that was
    summed: these are summed again.
    """
    later = slice(k + 1, None)
    old = norms[later]
    left = (1 - (a[later, k].abs() / old.clamp_min(torch.finfo(torch.float64).tiny)) ** 2).clamp_(0)
    stale = left * (old / exact[later].clamp_min(torch.finfo(torch.float64).tiny)) ** 2 < _EPS**0.5
    norms[later] = old * left.sqrt()
    again = k + 1 + stale.nonzero().flatten()
    if len(again):
        fresh = a[again, k + 1 :].square().sum(1).sqrt()
        norms[again] = fresh
        exact[again] = fresh


def decompose(z: Tensor, k: int, *, constant: bool = False) -> Interpolation:
    """Keep k columns of ``z [n, m]``, all rows at once.

    Raises:
        ValueError: z is not finite, or k is not from 1 to m.
    """
    if constant:
        z = torch.cat([torch.ones(len(z), 1, dtype=z.dtype), z], 1)
    return pivoted_qr(z, constant=constant).keep(k)
