"""``H`` of one layer as the second-order methods need it: without dead inputs, and invertible."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import PassError
from planish.passes.rounding.columns import inverse_factor

# Of its own diagonal entry, what a pivot of H keeps after all columns before it: less than this is
# the rounding of inputs summed in float32, and not information.
_PIVOT = 1e-9
_FIRST_RAISE = 1e-6  # then ten times as much until H is positive


@dataclass(frozen=True)
class Hessian:
    """A positive definite ``H``.

    Attributes:
        living: float64 ``[inputs, inputs]``, not to be written to: H itself, but dead inputs have a
            diagonal entry like the others' mean, and touch no other input.
        added: to its diagonal, the damping.
        factor: ``U``, upper triangular, of ``damped^-1 = U^T U``.
        dead: bool ``[inputs]``, inputs that are always zero.
        note: what was done beyond the asked, or "".
    """

    living: Tensor
    added: float
    factor: Tensor
    dead: Tensor
    note: str

    @property
    def damped(self) -> Tensor:
        """The positive definite matrix, in new memory."""
        damped = self.living.clone()
        damped.diagonal().add_(self.added)
        return damped

    @cached_property
    def inverse(self) -> Tensor:
        """``damped^-1``."""
        return self.factor.t() @ self.factor


def hessian(h: Tensor, damping: float, known: dict[str, Any]) -> Hessian:
    """Make ``H`` positive definite.

    Args:
        h: ``(2 / n) X X^T``, ``[inputs, inputs]``.
        damping: share of the mean of diag H that is added to it. Where H stays singular, as with
            fewer samples than inputs and a damping of 0, it is raised, and the note says so.
        known: keeps the result for other matrices on the same inputs.

    Raises:
        PassError: H is not finite.
    """
    key = f"hessian, damping {damping}"
    if key not in known:
        known[key] = _hessian(h.double(), damping)
    found: Hessian = known[key]
    return found


def _hessian(h: Tensor, damping: float) -> Hessian:
    if not bool(h.isfinite().all()):
        raise PassError("the inputs of this layer are not all finite")
    dead = h.diagonal() <= 0
    mean = h.diagonal()[~dead].mean() if not bool(dead.all()) else torch.ones((), dtype=h.dtype)
    living = h
    if bool(dead.any()):
        living = h.clone()
        living.diagonal().add_(dead * mean)
    used = damping
    while True:
        factor = _factor(living, used)
        if factor is not None:
            break
        used = max(used * 10, _FIRST_RAISE)
    notes = []
    if bool(dead.any()):
        notes.append(f"{int(dead.sum())} of {len(h)} inputs are always zero")
    if used != damping:
        notes.append(f"damping raised from {damping:g} to {used:g}: H is singular")
    return Hessian(living, float(used * mean), factor, dead, "; ".join(notes))


def _factor(h: Tensor, damping: float) -> Tensor | None:
    """``inverse_factor``, or None where H is singular but for rounding."""
    try:
        factor = inverse_factor(h, damping)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in __all__
        return None
    # U_ii^-2 is what is left of H_ii behind the columns after it.
    pivots = factor.diagonal().square().reciprocal() / h.diagonal()
    return factor if bool((pivots > _PIVOT).all()) else None


def checked_rows(rows: Tensor) -> Tensor:
    """The rows in float64.

    Raises:
        PassError: they are not finite.
    """
    if not bool(rows.isfinite().all()):
        raise PassError("the weight is not finite", hint="its NaN or inf come from the checkpoint")
    return rows.double()
