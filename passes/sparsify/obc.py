"""Exact optimal brain surgeon, row by row: the cheapest weights go first, all others adapt.

Rewrite:
    for each row w, until enough is gone:
        Q = argmin rho_Q over the units that are left,   w += d(Q),   H^-1 -= (its part by Q)
    min ||w X - w' X||^2 over w' that are zero outside of the mask found
Shapes:       W: [O, I], H: [I, I]. A unit is what goes at once: one weight (unstructured), the
              cheapest M - N of a group by their set score (N:M), or a block of several rows.
Requires:     H positive definite, see hessian. Columns are scaled so that diag H is one.
Cost:         O(O I^3) at most (N:M: a third of that), O(rows I^2) memory for the rows of a batch.
Numbers:      the search for the mask runs in float32 after a float64 inverse: in the units used a
              diagonal entry of H^-1 is at least 1, so that drift is seen, and bounded. The
              weights themselves are solved for the mask found, in float64.
Failures:     greedy, hence not the best mask; of a layer with a few inputs even magnitude's may
              be better. Of unstructured rows and of blocks a row's losses may fall, so that they
              are made monotone before rows are compared.
Source:       Frantar, Singh, Alistarh, "Optimal Brain Compression", NeurIPS 2022, sections 4, 5;
              the set score inside of groups: Kurtic et al., "The Optimal BERT Surgeon", 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planish.passes.sparsify.hessian import Hessian, checked_rows, hessian
from planish.passes.sparsify.obs import cheapest_sets, refit
from planish.passes.sparsify.patterns import Pattern

_LAZY = 32  # columns between two updates of all of H^-1
_MEMORY = 192 * 2**20  # bytes of H^-1 of the rows of a batch
_SINGLE = 1e6  # a diagonal entry of H^-1, in these units, up to which float32 finds good masks
_SHRINK = 0.875  # H^-1 is copied without what is gone when this share of it is left


def obc(
    rows: Tensor,
    h: Tensor,
    pattern: Pattern,
    zeros: int,
    *,
    damping: float = 0.01,
    known: dict[str, Any] | None = None,
    batch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, str]:
    """Prune one matrix.

    Args:
        rows: ``[outputs, inputs]``.
        h: ``(2 / n) X X^T``, ``[inputs, inputs]``.
        pattern: what it is to have.
        zeros: how many weights go, where the pattern does not decide that.
        damping: share of the mean of diag H that is added to it.
        known: keeps what is derived from H for other matrices on the same inputs.
        batch: rows (or rows of blocks) at a time; 0 for what fits into 192 MiB. The result does
            not depend on it.
        dtype: of the search for the mask; float64 where H is nearly singular (damping 0).

    Returns:
        The weights ``[outputs, inputs]``, the mask, and a note or "".

    Raises:
        PassError: weights or H are not finite.
    """
    made = hessian(h, damping, {} if known is None else known)
    w = checked_rows(rows).clone()
    w[:, made.dead] = 0
    kept = _mask(w, made, pattern, zeros, batch, dtype)
    return refit(w, made.damped, kept).to(rows.dtype), kept, made.note


def _mask(
    w: Tensor, made: Hessian, pattern: Pattern, zeros: int, batch: int, dtype: torch.dtype
) -> Tensor:
    grouped = pattern.kind == "grouped"
    shared = 1 if grouped else pattern.n  # rows that lose the same weights
    count = pattern.m - pattern.n if grouped else pattern.m
    scale = (made.living.diagonal() + made.added).sqrt()
    inverse = made.inverse * scale[:, None] * scale
    if float(inverse.diagonal().max()) > _SINGLE:
        dtype = torch.float64
    inverse = inverse.to(dtype)
    stacked = (w * scale).to(dtype).unflatten(0, (-1, shared))
    if not batch:
        batch = max(1, _MEMORY // (inverse.numel() * inverse.element_size()))
    parts = [eliminate(part, inverse, pattern.m, count) for part in stacked.split(batch)]
    units, members, losses = (torch.cat(p) for p in zip(*parts, strict=True))
    if not grouped:
        # What goes of a row is always the start of its order, as its losses never fall.
        rising = losses.cummax(1).values.flatten()
        keep = torch.ones_like(rising, dtype=torch.bool)
        keep[rising.argsort(stable=True)[: zeros // (shared * count)]] = False
        keep = keep.reshape(losses.shape)
    else:
        keep = torch.zeros_like(losses, dtype=torch.bool)
    columns = units.unsqueeze(-1) * pattern.m + members
    kept = torch.ones(len(stacked), w.shape[1], dtype=torch.bool)
    kept.scatter_(1, columns.flatten(1), keep.repeat_interleave(count, 1))
    return kept.repeat_interleave(shared, 0)


def eliminate(w: Tensor, inverse: Tensor, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take one unit after another away, each the cheapest left of its row.

    Args:
        w: ``[batch, shared, inputs]``; shared rows lose the same weights.
        inverse: ``H^-1``, ``[inputs, inputs]``, of a H whose diagonal is one.
        size: consecutive inputs of a unit.
        count: how many of them go.

    Returns:
        The order of units, the members that go (both from 0), and what each unit added to the
        loss: ``[batch, units]``, ``[batch, units, count]``, ``[batch, units]``.
    """
    state = _Rows(w, inverse, size)
    batch = torch.arange(len(w))
    order, gone, losses = [], [], []
    for _ in range(inverse.shape[0] // size):
        members, scores = cheapest_sets(state.groups(), state.diagonal, count)
        # A loss that overflows is as bad as any, but not worse than what has gone already.
        scores = scores.nan_to_num(torch.inf).clamp(max=torch.finfo(w.dtype).max)
        loss, unit = scores.masked_fill(state.finished, torch.inf).min(1)
        chosen = members[batch, unit]
        order.append(state.names[batch, unit])
        gone.append(chosen)
        losses.append(loss)
        for member in chosen.unbind(1):
            state.remove(unit * size + member)
        state.finish(unit)
    return torch.stack(order, 1), torch.stack(gone, 1), torch.stack(losses, 1)


class _Rows:
    """Rows on their way: what is left of their weights, and of their ``H^-1``.

    ``H^-1`` is that of the last time it was written, less the outer products of the columns
    pending since then. Units that are finished are left out when it is copied: what stays of them
    is free to adapt, which ``H^-1`` of the others accounts for.

    Attributes:
        diagonal: the current ``H^-1`` at each unit, ``[batch, units, size, size]``.
        names: of the units, ``[batch, units]``.
        finished: bool ``[batch, units]``.
    """

    def __init__(self, w: Tensor, inverse: Tensor, size: int):
        self._size = size
        self._w = w.clone()
        self._inverse = inverse.expand(len(w), -1, -1)  # shared until it is first written
        self._owned = False
        units = inverse.shape[0] // size
        grid = inverse.unflatten(0, (units, size)).unflatten(2, (units, size))
        own = grid.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        self.diagonal = own.expand(len(w), -1, -1, -1).clone()
        self.names = torch.arange(units).expand(len(w), -1)
        self.finished = torch.zeros(len(w), units, dtype=torch.bool)
        self._left = units
        self._rows = torch.arange(len(w))
        self._pending = w.new_empty(len(w), _LAZY, w.shape[2])
        self._count = 0

    def groups(self) -> Tensor:
        """The weights, ``[batch, units, shared, size]``."""
        grouped: Tensor = self._w.unflatten(2, (-1, self._size))
        return grouped.transpose(1, 2)

    def remove(self, column: Tensor) -> None:
        """Take one weight of each row away, ``[batch]``."""
        if self._count == _LAZY:
            self._write()
        earlier = self._pending[:, : self._count]
        found = self._inverse[self._rows, column]
        share = earlier[self._rows, :, column]
        found = torch.baddbmm(found.unsqueeze(1), share.unsqueeze(1), earlier, alpha=-1).squeeze(1)
        # Exactly, no entry is below 1: H has ones on its diagonal.
        pivot = found[self._rows, column].clamp(min=1)
        lead = found / pivot.sqrt().unsqueeze(1)
        self._pending[:, self._count] = lead
        self._count += 1
        amount = self._w[self._rows, :, column] / pivot.sqrt().unsqueeze(1)
        self._w -= amount.unsqueeze(2) * lead.unsqueeze(1)
        parts = lead.unflatten(1, (-1, self._size))
        self.diagonal -= parts.unsqueeze(3) * parts.unsqueeze(2)
        self.diagonal.diagonal(dim1=2, dim2=3).clamp_(min=1)

    def finish(self, unit: Tensor) -> None:
        """Leave a unit of each row out from here on, ``[batch]``."""
        self.finished[self._rows, unit] = True
        self._left -= 1
        if 0 < self._left <= _SHRINK * self.finished.shape[1]:
            self._write()
            self._shrink()

    def _write(self) -> None:
        used = self._pending[:, : self._count]
        if not self._owned:
            self._inverse, self._owned = self._inverse.clone(), True
        self._inverse.baddbmm_(used.transpose(1, 2), used, alpha=-1)
        self._count = 0

    def _shrink(self) -> None:
        unit = (~self.finished).nonzero()[:, 1].reshape(len(self._w), -1)
        within = torch.arange(self._size)
        column = (unit.unsqueeze(2) * self._size + within).flatten(1)
        rows = self._rows.unsqueeze(1)
        self._w = self._w.take_along_dim(column.unsqueeze(1), 2)
        self._inverse = self._inverse[rows.unsqueeze(2), column.unsqueeze(2), column.unsqueeze(1)]
        self.diagonal, self.names = self.diagonal[rows, unit], self.names[rows, unit]
        self.finished = torch.zeros_like(self.names, dtype=torch.bool)
        self._pending = self._w.new_empty(len(self._w), _LAZY, column.shape[1])
