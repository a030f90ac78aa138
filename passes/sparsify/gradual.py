"""Prune by gradients of the loss: all layers ranked together or each by itself, in steps.

Every step reads the gradients again at the weights it finds, as a quadratic model is good only
near where it was made. Of a ratio r, the step t of T goes to ``r (1 - (1 - t / T)^3)``; of groups
the steps go to M-1:M, M-2:M and so on to N:M.

Source: Singh, Alistarh, "WoodFisher", NeurIPS 2020, section 5 (steps, joint ranking); Zhu, Gupta,
"To prune, or not to prune", 2017 (the cubic schedule).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.sparsify.judging import How, Judge, Judging, Layer
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import Site, write_rows

_FLAT = Pattern("unstructured")


def schedule(pattern: Pattern, steps: int) -> list[tuple[Pattern, float]]:
    """The pattern of every step, and the share of the ratio that it goes to.

    Args:
        pattern: of the last step.
        steps: how many; groups have at most M - N.
    """
    if pattern.kind != "grouped":
        return [(pattern, 1 - (1 - t / steps) ** 3) for t in range(1, steps + 1)]
    gone = pattern.m - pattern.n
    steps = min(steps, gone)
    counts = [round(gone * t / steps) for t in range(1, steps + 1)]
    return [(Pattern("grouped", pattern.m - c, pattern.m), 1.0) for c in counts]


def prune_by_loss(
    rewriter: Rewriter,
    sites: Sequence[Site],
    context: PassContext,
    pattern: Pattern,
    ratios: Mapping[str, float],
    how: How,
    *,
    together: bool,
    steps: int = 1,
) -> None:
    """Prune weights by what the loss says of them.

    Args:
        rewriter: of the program.
        sites: the weights.
        context: holds labeled batches and a loss, but for magnitude; told of every batch.
        pattern: what the weights are to have.
        ratios: by name of weight, the share that goes; a weight of ratio 0 stays as it is. Of
            weights ranked together they say how many go of all.
        how: what they are judged by.
        together: rank the entries (or blocks) of all weights in one order.
        steps: how often the gradients are read anew.

    Raises:
        RequirementError: labeled batches or the loss are missing.
        UsageError: see ``gradients``.
        PassError: a weight is not finite, or F^-1 is not positive.
    """
    layers = [Layer.of(site) for site in sites if ratios[site.name]]
    together = together and pattern.kind != "grouped"
    stages = schedule(pattern, steps)
    if len(stages) < steps:
        context.remark(
            f"{len(stages)} steps in place of {steps}: {pattern} takes "
            f"{pattern.m - pattern.n} of each group"
        )
    judging = Judging(rewriter.program, layers, context, how, len(stages), twice=together)
    for step_pattern, share in stages:
        zeros = [
            step_pattern.zeros(layer.rows.numel(), ratios[layer.site.name] * share)
            for layer in layers
        ]
        if together:
            _together(judging, layers, step_pattern, sum(zeros))
        else:
            for number, judge in judging.all():
                layer = layers[number]
                _repair(layer, judge, _mask(layer, judge, step_pattern, zeros[number]))
    judging.finish()
    _write(rewriter, layers, context, pattern)


def _mask(layer: Layer, judge: Judge, pattern: Pattern, zeros: int) -> Tensor:
    """The mask of a layer that is ranked by itself."""
    if pattern.kind == "grouped":
        return judge.keep_groups(pattern)
    kept = _FLAT.keep(_living(layer, judge, pattern), zeros // (pattern.n * pattern.m))
    return _spread(kept, pattern)


def _together(judging: Judging, layers: Sequence[Layer], pattern: Pattern, zeros: int) -> None:
    """One step on layers that are ranked in one order."""
    scores: list[Tensor] = []
    held: list[tuple[int, Judge]] = []
    for number, judge in judging.all():
        scores.append(_living(layers[number], judge, pattern))
        if judging.held:
            held.append((number, judge))
    kept = _FLAT.keep(torch.cat([s.flatten() for s in scores]), zeros // (pattern.n * pattern.m))
    masks = [
        _spread(part.reshape(like.shape), pattern)
        for part, like in zip(kept.split([s.numel() for s in scores]), scores, strict=True)
    ]
    again: Iterable[tuple[int, Judge]] = held or judging.all()
    for number, judge in again:
        _repair(layers[number], judge, masks[number])


def _living(layer: Layer, judge: Judge, pattern: Pattern) -> Tensor:
    """Scores of units; what has gone already is the lowest of all."""
    gone = ~layer.kept.unflatten(0, (-1, pattern.n)).unflatten(2, (-1, pattern.m)).any(3).any(1)
    return judge.unit_scores(pattern).masked_fill(gone, -torch.inf)


def _spread(units: Tensor, pattern: Pattern) -> Tensor:
    """A mask of units as one of entries."""
    return units.repeat_interleave(pattern.n, 0).repeat_interleave(pattern.m, 1)


def _repair(layer: Layer, judge: Judge, kept: Tensor) -> None:
    rows, loss = judge.repair(kept)
    layer.rows, layer.kept = rows.to(layer.rows.dtype), kept
    if loss is not None:
        layer.loss = (layer.loss or 0.0) + loss


def _write(
    rewriter: Rewriter, layers: Sequence[Layer], context: PassContext, pattern: Pattern
) -> None:
    for layer in layers:
        site = layer.site
        notes = [] if layer.loss is None else [f"loss +{layer.loss:.4g} by the quadratic model"]
        if not bool(layer.kept.any()):
            context.remark(f"nothing is left of {site.name}: exclude it, or rank by layer")
        write_rows(rewriter, site, layer.rows, layer.kept, pattern, "; ".join(notes))
