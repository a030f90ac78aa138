"""What a method of pruning one layer is given and gives back, and the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from planish.passes.sparsify.hessian import hessian
from planish.passes.sparsify.obc import obc
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.refit import refit_by_gradients
from planish.passes.sparsify.scores import magnitude, wanda
from planish.passes.sparsify.sparsegpt import sparsegpt

Score = Literal["magnitude", "wanda", "obc", "sparsegpt", "woodfisher", "fisher", "undecayed"]


@dataclass(frozen=True)
class Task:
    """One matrix to be made sparse.

    Attributes:
        rows: float32 ``[outputs, inputs]``.
        h: ``(2 / n) X X^T``, float64 ``[inputs, inputs]``; None for methods that read no inputs.
        pattern: what it is to have.
        zeros: how many weights go, exactly; a grouped pattern decides that by itself.
        damping: share of the mean of diag H that is added to it; None for the method's own.
        known: kept for all matrices on the same inputs (factors of H).
        refit: steps that refit the weights that stay, where the method does that.
    """

    rows: Tensor
    h: Tensor | None
    pattern: Pattern
    zeros: int
    damping: float | None = None
    known: dict[str, Any] = field(default_factory=dict)
    refit: int = 0


@dataclass(frozen=True)
class Pruned:
    """One matrix made sparse.

    Attributes:
        rows: ``[outputs, inputs]``; zero where not ``kept``.
        kept: bool, the mask.
        note: what was done beyond the method's formula ("damping raised to 0.1"), or "".
    """

    rows: Tensor
    kept: Tensor
    note: str = ""

    def loss(self, task: Task) -> float:
        """The error of the layer's output, ``tr(D H D^T) / 2``, D the change of the weights."""
        change = (self.rows - task.rows).double()
        if task.h is None:
            return float(change.square().sum()) / 2
        return float(((change @ task.h) * change).sum()) / 2


LayerMethod: TypeAlias = Callable[[Task], Pruned]


def _by_magnitude(task: Task) -> Pruned:
    kept = task.pattern.keep(magnitude(task.rows), task.zeros)
    return Pruned(torch.where(kept, task.rows, 0), kept)


def _by_wanda(task: Task) -> Pruned:
    assert task.h is not None
    scores = wanda(task.rows, task.h)
    if task.pattern.kind == "unstructured":
        scores = _within_rows(scores)
    kept = task.pattern.keep(scores, task.zeros)
    dead = int((task.h.diagonal() <= 0).sum())  # of these nothing but their places is compared
    note = f"{dead} of {len(task.h)} inputs are always zero" if dead else ""
    return Pruned(torch.where(kept, task.rows, 0), kept, note)


def _by_obc(task: Task) -> Pruned:
    assert task.h is not None
    return Pruned(
        *obc(
            task.rows,
            task.h,
            task.pattern,
            task.zeros,
            damping=_damping(task),
            known=task.known,
        )
    )


def _by_sparsegpt(task: Task) -> Pruned:
    """The sweep and its refit; where magnitude alone leaves less error, the best of its mask.

    A sweep judges a weight as if all columns behind it were free to make up for it. Where H is
    nearly singular (fewer samples than inputs, a damping of 0) all its first columns seem to cost
    nothing, and those at the end pay for it. That is of the method: in float64 it is the same.
    """
    found = _swept(task)
    plain = _by_magnitude(task)
    loss, least = found.loss(task), plain.loss(task)
    if loss <= least:
        return found
    note = f"magnitude's mask: that of the sweep left an error of {loss:.4g}, magnitude {least:.4g}"
    best = min((plain, _swept(task, plain.kept)), key=lambda p: p.loss(task))
    return replace(best, note="; ".join(n for n in (found.note, note) if n))


def _swept(task: Task, kept: Tensor | None = None) -> Pruned:
    assert task.h is not None
    damping = _damping(task)
    rows, kept, note = sparsegpt(
        task.rows,
        task.h,
        task.pattern,
        task.zeros,
        damping=damping,
        known=task.known,
        kept=kept,
    )
    if task.refit:
        made = hessian(task.h, damping, task.known)
        found = refit_by_gradients(
            task.rows, rows, kept, made.living, added=made.added, steps=task.refit
        )
        rows = found.to(rows.dtype)
    return Pruned(rows, kept, note)


def _damping(task: Task) -> float:
    return 0.01 if task.damping is None else task.damping


def _within_rows(scores: Tensor) -> Tensor:
    """Ranks in place of scores: each output gives up its lowest, all outputs equally many.

    Sun et al. found inputs of one output to be what should be compared (section 3, table 7).
    """
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True).double()
    return ranks + scores / (2 * scores.amax().clamp(min=torch.finfo(scores.dtype).tiny))


# Methods that prune layer after layer. The others (WoodFisher and its kin) read gradients of the
# loss and rank all layers together.
LAYER_METHODS: Mapping[Score, LayerMethod] = {
    "magnitude": _by_magnitude,
    "wanda": _by_wanda,
    "obc": _by_obc,
    "sparsegpt": _by_sparsegpt,
}
