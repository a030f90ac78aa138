"""SparseGPT: one sweep over the columns, in which weights are chosen, set to zero and repaired.

Rewrite:
    at column c, H' = H[c:, c:] (all columns before are as they will be), H'^-1 = U'^T U':
        N:M:           Q = argmin of rho_Q over the sets of the group, w += d(Q)
        blocks:        the cheapest by rho of the whole block, among 128 columns and all rows
        unstructured:  the cheapest w_i^2 / U_ii^2 among 128 columns and all rows
    for each column i:  q = 0 or Q(w_i) or w_i,  e = (w_i - q) / U_ii,  w_j -= e U_ij for j > i
Shapes:       W: [O, I], H: [I, I].
Requires:     H positive definite, see hessian.
Cost:         O(I^3 + O I^2), memory I^2.
Numbers:      float32 weights and float64 factor of H, as in GPTQ; a zero is written, not computed.
Failures:     a weight is judged before the columns right of it are, hence OBC finds better masks.
              Of N:M the paper takes the M - N lowest w_i^2 / U_ii^2 and leaves those columns of the
              group that have passed as they are: ``together=False``. The set score and the set
              update let all of the group adapt. Where H is nearly singular the mask may be worse
              than magnitude's, in float64 as well; the pass compares the two, see methods.
Source:       Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
              One-Shot", ICML 2023, sections 3.2 to 3.5 (the last: rounding in the same sweep).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from planish.ir.quantscheme import QuantScheme
from planish.passes.quantize.weights import Codes
from planish.passes.rounding.clipping import clipped_ranges, spread_rows
from planish.passes.rounding.columns import BATCH, sweep
from planish.passes.sparsify.hessian import Hessian, checked_rows, hessian
from planish.passes.sparsify.obs import cheapest_sets, multipliers
from planish.passes.sparsify.patterns import Pattern


def sparsegpt(
    rows: Tensor,
    h: Tensor,
    pattern: Pattern,
    zeros: int,
    *,
    damping: float = 0.01,
    known: dict[str, Any] | None = None,
    together: bool = True,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, str]:
    """Prune one matrix.

    Args:
        rows: ``[outputs, inputs]``.
        h: ``(2 / n) X X^T``, ``[inputs, inputs]``.
        pattern: what it is to have.
        zeros: how many weights go, where the pattern does not decide that.
        damping: share of the mean of diag H that is added to it.
        known: keeps what is derived from H for other matrices on the same inputs.
        together: of N:M, choose and repair the members of a group as a set.
        kept: a mask to be used in place of a search, bool ``[outputs, inputs]``.

    Returns:
        The weights ``[outputs, inputs]``, the mask, and a note or "".

    Raises:
        PassError: weights or H are not finite.
    """
    made = hessian(h, damping, {} if known is None else known)
    w = _without_dead(rows, made)
    mask = _Mask(made, pattern, zeros, w.shape, together, kept)
    done, _ = sweep(w, mask.factor, mask.write, batch=mask.batch, before=mask.before)
    return done.to(rows.dtype), mask.kept, made.note


def prune_and_round(
    rows: Tensor,
    h: Tensor,
    pattern: Pattern,
    zeros: int,
    scheme: QuantScheme,
    *,
    damping: float = 0.01,
    known: dict[str, Any] | None = None,
    kept: Tensor | None = None,
) -> tuple[Codes, Tensor, str]:
    """Prune and round one matrix in one sweep, in which either's errors are repaired by the rest.

    The grid is that of the pruned weights: a first sweep without rounding gives them, and the mask
    where none is given, since the weights that stay grow by what they take over.

    Args:
        rows: ``[outputs, inputs]``.
        h: ``(2 / n) X X^T``, ``[inputs, inputs]``.
        pattern: what it is to have.
        zeros: how many weights go, where the pattern does not decide that.
        scheme: of the rows: blocks along axis 1, or channels along axis 0. Zero is on its grid
            (every scheme's zero point is an integer in its range).
        damping: share of the mean of diag H that is added to it.
        known: keeps what is derived from H for other matrices on the same inputs.
        kept: a mask to be used in place of a search.

    Returns:
        The integers, which stand for exactly zero where not kept; the mask; and a note or "".

    Raises:
        PassError: weights or H are not finite.
    """
    known = {} if known is None else known
    pruned, kept, note = sparsegpt(rows, h, pattern, zeros, damping=damping, known=known, kept=kept)
    made = hessian(h, damping, known)
    scale, zero = clipped_ranges(pruned.float(), scheme, torch.eye(len(h)))
    s, z = (spread_rows(p, rows, scheme).float().t().contiguous() for p in (scale, zero))
    low, high = scheme.range

    def rounded(column: Tensor, i: int) -> Tensor:
        return (((column / s[i]).round() + z[i]).clamp(low, high) - z[i]) * s[i]

    mask = _Mask(made, pattern, zeros, rows.shape, True, kept, rounded)
    done, _ = sweep(
        _without_dead(rows, made), mask.factor, mask.write, batch=mask.batch, before=mask.before
    )
    return Codes(scheme.quantize(done, scale, zero), scale, zero, scheme), kept, note


def _without_dead(rows: Tensor, made: Hessian) -> Tensor:
    w = checked_rows(rows).float()
    w[:, made.dead] = 0
    return w


class _Mask:
    """The mask as it is found from left to right, and what a sweep asks of it."""

    def __init__(
        self,
        made: Hessian,
        pattern: Pattern,
        zeros: int,
        shape: torch.Size,
        together: bool,
        given: Tensor | None,
        rounded: Callable[[Tensor, int], Tensor] | None = None,
    ):
        self.factor = made.factor.float()
        self._pattern = pattern
        self._grouped = pattern.kind == "grouped"
        self._together = together and self._grouped
        self._given = given
        self._rounded = rounded
        # A group must not straddle two batches: its later columns would be repaired too late.
        self.batch = max(BATCH // pattern.m, 1) * pattern.m if pattern.m > 1 else BATCH
        self.kept = torch.ones(shape, dtype=torch.bool) if given is None else given
        self._quota = _quotas(pattern, zeros, ~made.dead, self.batch, shape[0])

    def write(self, column: Tensor, i: int) -> Tensor:
        """A column as it is written."""
        real = column if self._rounded is None else self._rounded(column, i)
        return torch.where(self.kept[:, i], real, 0)

    def before(self, w: Tensor, i: int) -> Tensor | None:
        """Choose, where a group or batch of columns starts; errors of a whole group or None."""
        if not self._grouped:
            if i % self.batch == 0 and self._given is None:
                self._choose_among(w, i)
            return None
        if i % self._pattern.m:
            return None
        stop = i + self._pattern.m
        own = self.factor[i:stop, i:stop].double()
        inverse, group = own.t() @ own, w[:, i:stop].double()
        if self._given is None:
            self.kept[:, i:stop] = self._chosen(group, inverse, own)
        if not self._together:
            return None
        gone = ~self.kept[:, i:stop]
        errors = own @ multipliers(group, inverse, gone).t()
        return errors.to(w.dtype)

    def _chosen(self, group: Tensor, inverse: Tensor, own: Tensor) -> Tensor:
        """The mask of one group, ``[outputs, m]``."""
        if not self._together:
            return self._pattern.keep(group.square() / own.diagonal().square(), 0)
        count = self._pattern.m - self._pattern.n
        members, _ = cheapest_sets(group.unsqueeze(1), inverse.expand(len(group), -1, -1), count)
        return torch.ones_like(group, dtype=torch.bool).scatter(1, members, False)

    def _choose_among(self, w: Tensor, start: int) -> None:
        """The mask of a batch of columns, of blocks or of weights."""
        part = w[:, start : start + self.batch].double()
        stop = start + part.shape[1]
        m = self._pattern.m
        own = self.factor[start:stop, start:stop].double().unflatten(0, (-1, m))
        own = own.unflatten(2, (-1, m)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        groups = part.unflatten(1, (-1, m)).transpose(0, 1)  # [units, outputs, m]
        # rho of all of a unit at once: |U^-T w|^2 / 2
        solved = torch.linalg.solve_triangular(own.transpose(1, 2), groups.mT, upper=False)
        scores = solved.square().sum(1).t()  # [outputs, units]
        each = scores.repeat_interleave(m, 1) / m
        zeros = self._quota[start // self.batch]
        self.kept[:, start:stop] = self._pattern.keep(each, zeros)


def _quotas(pattern: Pattern, zeros: int, living: Tensor, batch: int, outputs: int) -> list[int]:
    """How many weights of each batch of columns go: all of dead inputs first, the rest evenly.

    The numbers are whole blocks and add up to ``zeros``.
    """
    if pattern.kind == "grouped":
        return []
    unit = pattern.n * pattern.m
    units = [
        (outputs // pattern.n) * torch.stack([~part.any(1), part.any(1)]).sum(1)
        for part in living.unflatten(0, (-1, pattern.m)).split(batch // pattern.m)
    ]
    quotas, left = [], zeros // unit
    for dead, _ in units:
        quotas.append(min(int(dead), left))
        left -= quotas[-1]
    total = sum(int(alive) for _, alive in units)
    passed = given = 0
    for number, (_, alive) in enumerate(units):
        passed += int(alive)
        share = left * passed // total if total else 0
        quotas[number] += share - given
        given = share
    return [q * unit for q in quotas]
