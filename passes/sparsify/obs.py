"""Optimal brain surgeon: what taking weights away costs, and how the others make up for it.

Rewrite:
    min over d of  g d + d^T H d / 2   subject to  w_q + d_q = 0  for all q in Q
    single:   rho_q = w_q^2 / (2 [H^-1]_qq),             d = -(w_q / [H^-1]_qq) H^-1 e_q
    set:      rho_Q = w_Q^T ([H^-1]_QQ)^-1 w_Q / 2,      d = -H^-1[:, Q] ([H^-1]_QQ)^-1 w_Q
    next:     H^-1 - H^-1[:, Q] ([H^-1]_QQ)^-1 H^-1[Q, :]   is the inverse of H without Q
    gradient: the same with w - H^-1 g in the place of w
Shapes:       w: [.., n]; H^-1: [.., n, n], which may be one matrix for many w.
Requires:     H positive definite. All functions compute in the type of their operands: float64.
Failures:     the sum of single scores is no bound on the cost of a set, in either direction.
Source:       Hassibi, Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
              Surgeon", NeurIPS 1992; Singh, Alistarh, "WoodFisher", NeurIPS 2020 (gradients);
              Kurtic et al., "The Optimal BERT Surgeon", EMNLP 2022 (sets).
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

MOST_CANDIDATES = 128  # 2:4 has 6 sets to choose from, 4:8 has 70, 8:16 has 12870


def single_scores(w: Tensor, inverse: Tensor) -> Tensor:
    """``rho_q`` of every weight, as if it alone went: ``[.., n]``."""
    return w.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))


def downdate(inverse: Tensor, q: int) -> Tensor:
    """``H^-1`` once weight ``q`` is gone; its row and column are zero."""
    column = inverse[..., :, q]
    after = inverse - column[..., :, None] * column[..., None, :] / inverse[..., q, q, None, None]
    after[..., q, :] = 0  # which they are but for rounding
    after[..., :, q] = 0
    return after


def set_scores(w: Tensor, inverse: Tensor, sets: Tensor) -> Tensor:
    """``rho_Q`` of several sets, by taking the members of each away one after another.

    Args:
        w: ``[.., n]``.
        inverse: ``[.., n, n]``.
        sets: indices ``[sets, k]``.

    Returns:
        ``[.., sets]``.
    """
    left = w[..., sets]
    among = inverse[..., sets[:, :, None], sets[:, None, :]]
    loss = torch.zeros_like(left[..., 0])
    for _ in range(sets.shape[1]):
        lead, pivot = left[..., 0], among[..., 0, 0]
        loss = loss + lead.square() / (2 * pivot)
        share = among[..., 1:, 0] / pivot[..., None]
        left = left[..., 1:] - share * lead[..., None]
        among = among[..., 1:, 1:] - share[..., :, None] * among[..., :1, 1:]
    return loss


def multipliers(w: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """``([H^-1]_QQ)^-1 w_Q`` of the set update, zero outside of Q: ``[.., n]``.

    Args:
        w: ``[.., n]``.
        inverse: ``[.., n, n]``.
        gone: bool ``[.., n]``, which weights Q are.
    """
    both = gone[..., :, None] & gone[..., None, :]
    eye = torch.eye(w.shape[-1], dtype=inverse.dtype)
    # Outside of Q the identity, so that all sets, large or small, are one batch.
    among = torch.where(both, inverse, eye)
    solved: Tensor = torch.linalg.solve(among, torch.where(gone, w, 0).unsqueeze(-1))
    return solved.squeeze(-1)


def remove(w: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """The weights after the set update: exactly zero where ``gone``, best elsewhere.

    Args:
        w: ``[.., n]``.
        inverse: ``[.., n, n]``.
        gone: bool ``[.., n]``.
    """
    change = (inverse @ multipliers(w, inverse, gone).unsqueeze(-1)).squeeze(-1)
    return torch.where(gone, 0, w - change)


def removal_loss(w: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """``rho_Q`` of the set that is ``gone``: ``[..]``."""
    return (torch.where(gone, w, 0) * multipliers(w, inverse, gone)).sum(-1) / 2


def minimum(w: Tensor, inverse: Tensor, gradient: Tensor) -> Tensor:
    """``w - H^-1 g``, where the quadratic model is least.

    WoodTaylor is every other function of this module on these weights in the place of ``w``: its
    scores then lack the same constant, ``-g^T H^-1 g / 2``, for every set.
    """
    return w - (inverse @ gradient.unsqueeze(-1)).squeeze(-1)


@cache
def _sets(size: int, count: int) -> Tensor:
    """All choices of ``count`` of ``size``, in the order of their indices: ``[sets, count]``."""
    return torch.tensor([*combinations(range(size), count)])


def cheapest_sets(w: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which ``count`` weights of each group are cheapest to take away together.

    All sets are tried where there are at most ``MOST_CANDIDATES``; beyond, the members are taken
    one after another, each the cheapest after those before it.

    Args:
        w: ``[.., rows, m]``; the rows of a group lose the same weights.
        inverse: ``[.., m, m]``, of H over all weights, at the group.
        count: how many go.

    Returns:
        Their indices ``[.., count]`` and ``rho_Q``, summed over rows, ``[..]``.
    """
    size = w.shape[-1]
    if comb(size, count) > MOST_CANDIDATES:
        return _greedy_set(w, inverse, count)
    sets = _sets(size, count)
    scores = set_scores(w, inverse.unsqueeze(-3), sets).sum(-2)
    loss, best = scores.min(-1)
    return sets[best], loss


def _greedy_set(w: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    left, among = w.clone(), inverse.clone()
    taken = torch.zeros_like(w[..., 0, :], dtype=torch.bool)
    total = torch.zeros_like(w[..., 0, 0])
    members = []
    for _ in range(count):
        diagonal = among.diagonal(dim1=-2, dim2=-1).masked_fill(taken, 1)
        scores = left.square().sum(-2) / (2 * diagonal)
        loss, best = scores.masked_fill(taken, torch.inf).min(-1)
        at = best.unsqueeze(-1)
        column = among.take_along_dim(at.unsqueeze(-1), -1).squeeze(-1)
        share = column / diagonal.take_along_dim(at, -1)
        left = left - left.take_along_dim(at.unsqueeze(-2), -1) * share.unsqueeze(-2)
        among = among - share.unsqueeze(-1) * column.unsqueeze(-2)
        taken = taken.scatter(-1, at, True)
        members.append(at)
        total = total + loss
    return torch.cat(members, -1), total


def refit(rows: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """The best weights for a mask: the set update of each row, solved on the weights that stay.

    ``d_K = (H_KK)^-1 H_KQ w_Q``, which equals the update by ``H^-1`` and is as cheap as its
    smaller side where half or more go.

    Args:
        rows: ``[outputs, n]``.
        h: ``[n, n]``.
        kept: bool ``[outputs, n]``.

    Returns:
        ``[outputs, n]``, zero where not kept; rows that lose only zeros are returned as they are.
    """
    done = torch.where(kept, rows, 0)
    missing = (rows - done) @ h
    for row, mask in enumerate(kept):
        if not bool((rows[row] != done[row]).any()):
            continue
        living = mask.nonzero().flatten()
        factor = torch.linalg.cholesky(h[living][:, living])
        change = torch.cholesky_solve(missing[row, living, None], factor)
        done[row, living] += change[:, 0]
    return done
