"""What every weight of a program is worth by a score of ``Sparsify``, and nothing pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.sparsify.hessian import checked_rows, hessian
from planish.passes.sparsify.judging import How, Judging, Layer
from planish.passes.sparsify.methods import LAYER_METHODS
from planish.passes.sparsify.scores import wanda
from planish.passes.sparsify.sequence import Inputs
from planish.passes.sparsify.sites import Site

_AT_A_TIME = 64 * 2**20  # bytes of H^-1 of the rows that are judged together
_DAMPING = 0.01


def weight_scores(
    program: Program,
    sites: Sequence[Site],
    context: PassContext,
    how: How,
    *,
    alive: Mapping[str, Tensor] | None = None,
    padding_mask: str = "",
) -> dict[str, Tensor]:
    """Scores of single weights, higher is kept.

    Of magnitude, wanda, fisher and undecayed these are the formulas of their methods; of
    woodfisher, obc and sparsegpt what the error rises by where one weight goes and all others
    adapt, ``w^2 / (2 [H^-1]_qq)``, H of the loss or of the layer's outputs. Scores of wanda, obc
    and sparsegpt say nothing about one layer against another.

    Args:
        program: is not changed.
        sites: the weights, in the order of their first readers.
        context: holds what the score reads: calibration, or labeled batches and a loss.
        how: the score and its options.
        alive: by name, masks of the weights' shapes; those that have gone are held at zero, so
            that the others cannot make up for a loss by them. What they score has no meaning.
        padding_mask: input that is 0 for padding, or "".

    Returns:
        For each name of a site a tensor of the weight's shape, float64.

    Raises:
        RequirementError: the context lacks what the score reads.
        PassError: a weight or H is not finite.
        UsageError: see ``gradients``.
    """
    layers = [Layer.of(site) for site in sites]
    for layer in layers:
        if alive is not None and layer.site.name in alive:
            layer.kept = layer.site.rows(alive[layer.site.name])
            layer.rows = torch.where(layer.kept, layer.rows, 0)
    if how.score in LAYER_METHODS and how.score != "magnitude":
        rows = _by_layer(program, layers, context, how, padding_mask)
    else:
        judging = Judging(program, layers, context, how)
        rows = {layers[n].site.name: judge.scores() for n, judge in judging.all()}
        judging.finish()
    return {site.name: site.from_rows(rows[site.name].double()) for site in sites}


def _by_layer(
    program: Program, layers: Sequence[Layer], context: PassContext, how: How, padding_mask: str
) -> dict[str, Tensor]:
    rewriter = Rewriter(program, "scores")  # writes nothing: its program is what inputs are of
    inputs = Inputs(rewriter, [layer.site for layer in layers], context, padding_mask)
    found = {}
    for done, layer in enumerate(layers):
        context.tell(done, len(layers))
        groups, known = inputs.of(layer.site)
        parts = []
        pairs = zip(layer.rows.chunk(layer.site.groups), layer.kept.chunk(layer.site.groups),
                    strict=True)  # fmt: skip
        for number, (rows, kept) in enumerate(pairs):
            if how.score == "wanda":
                parts.append(wanda(rows.double(), groups[number]))
                continue
            damping = _DAMPING if how.damping is None else how.damping
            made = hessian(groups[number], damping, known[number])
            w = checked_rows(rows).masked_fill(made.dead, 0)
            parts.append(w.square() / (2 * inverse_diagonals(made.damped, made.inverse, kept)))
        found[layer.site.name] = torch.cat(parts)
    context.tell(len(layers), len(layers))
    return found


def inverse_diagonals(h: Tensor, inverse: Tensor, kept: Tensor) -> Tensor:
    """``diag((H_KK)^-1)`` for each row's K, one where not in K: ``[rows, n]``.

    Args:
        h: ``[n, n]``, positive definite.
        inverse: ``h^-1``.
        kept: bool ``[rows, n]``.
    """
    found = inverse.diagonal().expand(kept.shape).clone()
    some = (~kept.all(1)).nonzero().flatten()
    eye = torch.eye(len(h), dtype=h.dtype)
    for rows in some.split(max(1, _AT_A_TIME // (h.numel() * h.element_size()))):
        both = kept[rows, :, None] & kept[rows, None, :]
        # Outside of K the identity, so that all rows are one batch.
        factor = torch.linalg.cholesky(torch.where(both, h, eye))
        found[rows] = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
    return found
