"""WoodFisher: optimal brain surgeon on blocks of the empirical Fisher matrix.

Rewrite:
    scores:   w^2 / (2 [F^-1]_ii) of single weights; rho_Q of every set of a group (N:M) or of the
              whole segment (blocks)
    weights:  w - F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q,   Q all that is gone of a block of F
    taylor:   the same with w - F^-1 g in the place of w, where training has not ended
Shapes:       W: [O, I] as a row of O I entries, cut into blocks as in fisher.
Requires:     blocks of F hold whole groups: their size is a multiple of M.
Cost:         the update is B^3 for each block of B entries, B^2 D in all.
Failures:     single scores do not see that two weights may stand in for each other. The update
              does: it is exact for the set, where the authors' code sums the updates of single
              weights and then cuts off what is not zero (``exact=False`` does so, to compare: on
              two digit classifiers, 90 % unstructured, 87.0 and 85.0 % right, exact 87.9 and 87.7).
              Damping too small for a model that fits its data leads far away: a quadratic model
              is local. Steps help, and so does a larger damping.
Source:       Singh, Alistarh, "WoodFisher", NeurIPS 2020; Kurtic et al., "The Optimal BERT
              Surgeon", EMNLP 2022 (sets inside of groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.passes.sparsify.fisher import to_blocks
from planish.passes.sparsify.obs import (
    cheapest_sets,
    minimum,
    multipliers,
    set_scores,
    single_scores,
)
from planish.passes.sparsify.patterns import Pattern

_AT_A_TIME = 32 * 2**20  # bytes of F^-1 whose sets are solved for together


@dataclass(frozen=True)
class WoodFisher:
    """What one weight's entries are worth, and how those that stay make up for the others.

    Attributes:
        rows: the weight, float64 ``[outputs, inputs]``.
        inverse: ``F^-1``, float64 ``[blocks, size, size]``.
        gradient: ``g``, ``[outputs * inputs]``, for WoodTaylor; None where it is taken to be zero.
        exact: see above.
    """

    rows: Tensor
    inverse: Tensor
    gradient: Tensor | None = None
    exact: bool = True

    def _w(self) -> Tensor:
        """``[blocks, size]``: the weights, or where the quadratic model is least."""
        size = self.inverse.shape[-1]
        w = to_blocks(self.rows.flatten(), size)
        if self.gradient is None:
            return w
        return minimum(w, self.inverse, to_blocks(self.gradient, size))

    def _shaped(self, blocks: Tensor) -> Tensor:
        """Anything with one number for each entry, as ``[outputs, inputs]``."""
        return blocks.flatten()[: self.rows.numel()].reshape(self.rows.shape)

    def _segments(self, size: int) -> tuple[Tensor, Tensor]:
        """``w [blocks, segments, 1, size]`` and ``F^-1 [blocks, segments, size, size]`` at it."""
        places = torch.arange(self.inverse.shape[-1]).unflatten(0, (-1, size))
        among = self.inverse[:, places[:, :, None], places[:, None, :]]
        return self._w().unflatten(1, (-1, 1, size)), among

    def scores(self) -> Tensor:
        """Of single entries: ``[outputs, inputs]``."""
        return self._shaped(single_scores(self._w(), self.inverse))

    def unit_scores(self, pattern: Pattern) -> Tensor:
        """Of what stays or goes as a whole: ``[outputs / n, inputs / m]``."""
        if pattern.m == 1:
            single = self.scores()
        else:
            w, among = self._segments(pattern.m)
            whole = torch.arange(pattern.m).unsqueeze(0)
            losses = set_scores(w.squeeze(2), among, whole).flatten()
            single = losses[: self.rows.numel() // pattern.m].unflatten(0, (len(self.rows), -1))
        return single.reshape(-1, pattern.n, single.shape[1]).sum(1)

    def keep_groups(self, pattern: Pattern) -> Tensor:
        """The mask without the cheapest set of each group: bool ``[outputs, inputs]``."""
        w, among = self._segments(pattern.m)
        members, _ = cheapest_sets(w, among, pattern.m - pattern.n)
        kept = torch.ones(w.squeeze(2).shape, dtype=torch.bool).scatter_(2, members, False)
        return self._shaped(kept)

    def repair(self, kept: Tensor) -> tuple[Tensor, float]:
        """The weights for a mask, and what the quadratic model says the loss rises by.

        Of WoodTaylor that is the rise above the least of the model.

        Args:
            kept: bool ``[outputs, inputs]``.
        """
        size = self.inverse.shape[-1]
        gone = to_blocks((~kept).flatten(), size).bool()
        w = self._w()
        batch = max(1, _AT_A_TIME // (size * size * 8))
        made, loss = [], 0.0
        for part, inverse, out in zip(
            w.split(batch), self.inverse.split(batch), gone.split(batch), strict=True
        ):
            if self.exact:
                by = multipliers(part, inverse, out)
            else:
                by = torch.where(out, part / inverse.diagonal(dim1=1, dim2=2), 0)
            loss += float((torch.where(out, part, 0) * by).sum()) / 2
            change = torch.bmm(inverse, by.unsqueeze(2)).squeeze(2)
            made.append(torch.where(out, 0, part - change))
        return self._shaped(torch.cat(made)), loss


@dataclass(frozen=True)
class Diagonal:
    """Weights that are taken each for itself: those that stay are not changed.

    Attributes:
        rows: the weight, ``[outputs, inputs]``.
        single: a score for each entry, the lowest go.
        is_loss: whether scores are what the loss rises by.
    """

    rows: Tensor
    single: Tensor
    is_loss: bool

    def scores(self) -> Tensor:
        """Of single entries: ``[outputs, inputs]``."""
        return self.single

    def unit_scores(self, pattern: Pattern) -> Tensor:
        """Of what stays or goes as a whole: ``[outputs / n, inputs / m]``."""
        rows, columns = self.single.shape
        blocks = self.single.reshape(rows // pattern.n, pattern.n, columns // pattern.m, pattern.m)
        return blocks.sum((1, 3))

    def keep_groups(self, pattern: Pattern) -> Tensor:
        """The mask without the lowest of each group: bool ``[outputs, inputs]``."""
        return pattern.keep(self.single, 0)

    def repair(self, kept: Tensor) -> tuple[Tensor, float | None]:
        """The weights for a mask, and what the loss is said to rise by."""
        loss = float(self.single[~kept].sum()) if self.is_loss else None
        return torch.where(kept, self.rows, 0), loss
