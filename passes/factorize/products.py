"""The products inside one attention head, at a lower rank.

A head's scores are ``(A x)^T (B y)`` and its share of the output is ``O (V y)``: only the products
``A^T B`` and ``O V`` count, so the h dimensions of a head may be turned in any way, and those that
count least be left out. With ``R_a R_a^T`` the second moment of ``A x`` and ``R_b R_b^T`` that of
``B y``, the SVD ``R_a^T R_b = U S V^T`` says what each of r dimensions is worth, and
``C = R_b V_r S_r^-1/2`` and ``D = S_r^-1/2 U_r^T R_a^T`` are what A and B are multiplied by: no
matrix is inverted. Query heads that share a key head have their ``R_a^T`` stacked, since they share
C and D as well.

Biases: softmax forgets what is equal for all keys, so the key's bias is left out exactly, and the
query's is a column of A (of an input that is always 1). Probabilities sum to one, so the value's
bias goes through O into the output's bias exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values below this share of the largest are rounding errors of zero.
_ZERO = 1e-12


@dataclass(frozen=True)
class Turn:
    """What the two sides of a product are multiplied by; float64.

    Attributes:
        left: ``C^T``, [rank, h]: of the queries, or (transposed) of the output's columns.
        right: D, [rank, h]: of the keys, or of the values.
        spectrum: all singular values; those behind rank are the error.
    """

    left: Tensor
    right: Tensor
    spectrum: Tensor

    @property
    def error(self) -> float:
        """Relative error of the product under the moments that it was made for, 0 to 1."""
        energy = self.spectrum.square()
        total = float(energy.sum())
        return (float(energy[len(self.left) :].sum()) / total) ** 0.5 if total else 0.0


def turned(lefts: Sequence[Tensor], right: Tensor, rank: int) -> Turn:
    """The best dimensions of a head.

    Args:
        lefts: ``R_a`` of every head that shares the right side, [h, any].
        right: ``R_b``, [h, any].
        rank: dimensions that stay.

    Raises:
        ValueError: the rank is not between 1 and h, or a number is not finite.
    """
    h = len(right)
    if not 1 <= rank <= h:
        raise ValueError(f"rank is {rank}, not between 1 and {h}")
    stacked = torch.cat([_square(root).t() for root in lefts])
    b = _square(right)
    if not (bool(stacked.isfinite().all()) and bool(b.isfinite().all())):
        raise ValueError("the weights of a head are not finite")
    u, s, v = torch.linalg.svd(stacked @ b, full_matrices=False)
    top = float(s[0])
    inverse = torch.where(s > _ZERO * top, s, torch.inf).rsqrt()[:rank]  # dead dimensions: zero
    left = (b @ v[:rank].t() * inverse).t()
    return Turn(left, inverse[:, None] * (u[:, :rank].t() @ stacked), s)


def _square(root: Tensor) -> Tensor:
    """A root of the same moment with as many columns as rows, without squaring it."""
    root = root.double()
    if root.shape[1] <= len(root):
        return root
    upper: Tensor = torch.linalg.qr(root.t(), mode="r").R
    return upper.t()


def root_of(moment: Tensor, damping: float = 0.0) -> Tensor:
    """``L`` with ``L L^T`` the moment and a share of its mean diagonal on the diagonal.

    A moment of few rows knows nothing of the other directions, which must not be lost for that.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0) + damping * float(moment.diagonal().mean())
    root: Tensor = vectors * values.sqrt()
    return root


def with_one(second: Tensor, mean: Tensor) -> Tensor:
    """The second moment of ``[x; 1]``."""
    top = torch.cat([second, mean[:, None]], 1)
    return torch.cat([top, torch.cat([mean, mean.new_ones(1)])[None]])


@dataclass(frozen=True)
class Projections:
    """The query's and key's weights of one key head and the query heads that share it.

    Attributes:
        queries: [query heads, h, inputs].
        query_bias: [query heads, h].
        key: [h, inputs].
    """

    queries: Tensor
    query_bias: Tensor
    key: Tensor


@dataclass(frozen=True)
class Seen:
    """What the projections read.

    Attributes:
        second: ``E[x x^T]``, [inputs, inputs].
        mean: ``E[x]``, [inputs].
    """

    second: Tensor
    mean: Tensor


def turn_scores(
    given: Projections, rank: int, query: Seen | None, key: Seen | None, damping: float = 1e-6
) -> tuple[Projections, Turn]:
    """Queries and keys in r dimensions, with the least error of their scores.

    Softmax forgets what all keys of a query have in common, so with calibration it is keys less
    their mean whose products count.

    Args:
        given: the weights; the key has no bias, see the module.
        rank: dimensions that stay.
        query: what the queries read; None counts all inputs alike.
        key: what the keys read, likewise.
        damping: see root_of.

    Returns:
        The weights in r dimensions, and how they were turned.
    """
    wide = torch.cat([given.queries.double(), given.query_bias.double()[..., None]], 2)
    lefts = list(wide)
    if query is not None:
        lq = root_of(with_one(query.second, query.mean), damping)
        lefts = [a @ lq for a in lefts]
    right = given.key.double()
    if key is not None:
        right = right @ root_of(key.second - torch.outer(key.mean, key.mean), damping)
    turn = turned(lefts, right, rank)
    queries = turn.left @ wide
    return Projections(queries[..., :-1], queries[..., -1], turn.right @ given.key.double()), turn


def turn_values(
    value: Tensor, outputs: Sequence[Tensor], rank: int, read: Tensor | None, damping: float = 1e-6
) -> tuple[Tensor, Turn]:
    """Values of one head in r dimensions, with the least error of what is made of them.

    Args:
        value: V, [h, inputs].
        outputs: O of every query head that reads this value head, [outputs, h].
        rank: dimensions that stay.
        read: covariance of what O reads (the head's context), [h, h]; None: of V's rows.
        damping: see root_of.

    Returns:
        ``D V``, [rank, inputs], and the turn; O is to be multiplied by ``left.T``, or fitted anew.
    """
    right = value.double() if read is None else root_of(read, damping)
    turn = turned([o.double().t() for o in outputs], right, rank)
    return turn.right @ value.double(), turn


def refitted(output: Tensor, turn: Tensor, covariance: Tensor, damping: float = 1e-6) -> Tensor:
    """The output weight that comes nearest to ``O z`` from ``D z``, all heads together.

    ``min_P ||(O - P D) z||^2`` is ``P = O S D^T (D S D^T)^-1`` with S the covariance of z.

    Args:
        output: O, [outputs, heads * h].
        turn: D of all heads on its diagonal, [heads * rank, heads * h].
        covariance: S, [heads * h, heads * h].
        damping: share of the mean diagonal of S that is added to it.

    Returns:
        P, [outputs, heads * rank].
    """
    s = covariance.double()
    s = s + torch.eye(len(s), dtype=s.dtype) * (damping * float(s.diagonal().mean()))
    half = turn @ s
    inner = half @ turn.t()
    solved: Tensor = torch.linalg.lstsq(inner, half @ output.double().t(), driver="gelsd").solution
    return solved.t()


def bias_of_mean(output: Tensor, product: Tensor, mean: Tensor, value_bias: Tensor) -> Tensor:
    """What the output's bias gains: ``O m - P D (m - b)``, so that the mean of the output stays.

    Args:
        output: O, [outputs, heads * h].
        product: ``P D``, of the same shape.
        mean: m of what O reads; the value's bias itself where nothing was calibrated.
        value_bias: b of the values as every query head reads them, [heads * h].
    """
    return output.double() @ mean.double() - product @ (mean.double() - value_bias.double())
