"""Learn for every weight whether it is rounded up or down: AdaRound's relaxation, on Gram matrices.

For one layer with rows W [O, I] on inputs of Gram matrix H [I, I] the squared error of the outputs
is ``tr(D H D^T)`` with ``D = s (Q - W / s)``, so nothing else of the inputs is needed, and groups
of a convolution are solved side by side. ``Q = floor(W / s) + h(V)`` with the rectified sigmoid
``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` and the regularizer ``1 - |2 h - 1|^beta``, whose beta
falls from 20 to 2, so that h ends at 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRETCH, _SHIFT = 1.2, -0.1
_BETAS = (20.0, 2.0)
_WARM = 0.2  # of the iterations, without regularizer


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clip(1.2 sigmoid(v) - 0.1, 0, 1)``."""
    return (v.sigmoid() * _STRETCH + _SHIFT).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """``v`` with ``rectified_sigmoid(v) = h``, for h within 0 and 1."""
    return ((h - _SHIFT) / _STRETCH).logit()


def regularizer_slope(h: Tensor, beta: float) -> Tensor:
    """The derivative of ``1 - |2 h - 1|^beta`` with respect to h."""
    centered = 2 * h - 1
    return -2 * beta * centered.abs() ** (beta - 1) * centered.sign()


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """``d H d^T`` of every row.

    Args:
        difference: [G, O, I].
        gram: [G, I, I].

    Returns:
        [G, O].
    """
    return ((difference @ gram) * difference).sum(-1)


@dataclass(frozen=True)
class Learning:
    """How rounding is learned.

    Attributes:
        iterations: steps of Adam.
        rate: its step size.
        weight: of the regularizer.
        sweeps: how often afterwards every weight is tried one integer up and down.
    """

    iterations: int = 100
    rate: float = 0.1
    weight: float = 0.05
    sweeps: int = 2


def learn_rounding(
    steps: Tensor,
    gram: Tensor,
    scale: Tensor,
    bounds: tuple[int, int],
    learning: Learning = Learning(),
    free: Tensor | None = None,
) -> Tensor:
    """Integers whose outputs are nearest to those of the weights; never worse than the nearest.

    Args:
        steps: [G, O, I], the weights in steps: ``W / s`` (and the zero point added).
        gram: [G, I, I], symmetric.
        scale: [G, O, I], the size of a step.
        bounds: smallest and largest integer.
        learning: how.
        free: [G, O, I], which may be moved; the others are rounded to the nearest. None: all.

    Returns:
        [G, O, I], whole numbers in float.
    """
    h = gram.to(torch.float32)
    h = h / h.diagonal(dim1=-2, dim2=-1).mean().clamp(min=1e-30)
    # Rows do not interact: each may be measured in its own unit.
    unit = scale / scale.mean(-1, keepdim=True)
    nearest = steps.round().clamp(*bounds)
    found = nearest
    if learning.iterations:
        found = _relaxed(steps, h, unit, bounds, learning, free)
    for start in {id(found): found, id(nearest): nearest}.values():
        polished = _polished(start, steps, h, unit, bounds, learning.sweeps, free)
        found = _better(polished, found, steps, h, unit)
    return _better(found, nearest, steps, h, unit)


def _better(new: Tensor, old: Tensor, steps: Tensor, gram: Tensor, unit: Tensor) -> Tensor:
    """Row by row, the integers of less output error; the old ones where they are equal."""
    errors = [output_error((q - steps) * unit, gram) for q in (new, old)]
    return torch.where((errors[0] < errors[1]).unsqueeze(-1), new, old)


def _relaxed(
    steps: Tensor,
    gram: Tensor,
    unit: Tensor,
    bounds: tuple[int, int],
    learning: Learning,
    free: Tensor | None,
) -> Tensor:
    """AdaRound: gradient descent on h, then the nearer of 0 and 1."""
    floor, nearest = steps.floor(), steps.round().clamp(*bounds)
    v = inverse_rectified_sigmoid((steps - floor).clamp(1e-4, 1 - 1e-4))
    optimizer = torch.optim.Adam([v], lr=learning.rate)
    warm = int(_WARM * learning.iterations)
    for iteration in range(learning.iterations):
        sigmoid = v.sigmoid()
        h = (sigmoid * _STRETCH + _SHIFT).clamp(0, 1)
        codes = (floor + h).clamp(*bounds)
        if free is not None:
            codes = torch.where(free, codes, nearest)
        difference = (codes - steps) * unit
        slope = 2 * (difference @ gram) * unit
        if iteration >= warm:
            share = (iteration - warm) / max(learning.iterations - warm, 1)
            beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * share
            slope = slope + learning.weight * regularizer_slope(h, beta)
        v.grad = slope * _STRETCH * sigmoid * (1 - sigmoid)
        optimizer.step()
    found = (floor + (rectified_sigmoid(v) >= 0.5)).clamp(*bounds)
    return found if free is None else torch.where(free, found, nearest)


def _polished(
    codes: Tensor,
    steps: Tensor,
    gram: Tensor,
    unit: Tensor,
    bounds: tuple[int, int],
    sweeps: int,
    free: Tensor | None,
) -> Tensor:
    """Coordinate descent: one input after another moves to the best integer, the others fixed."""
    codes = codes.clone()
    difference = (codes - steps) * unit
    pull = difference @ gram
    diagonal = gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
    for _ in range(sweeps):
        moved = 0
        for i in range(codes.shape[-1]):
            wanted = codes[..., i] - pull[..., i] / (diagonal[:, i : i + 1] * unit[..., i])
            new = wanted.round().clamp(*bounds)
            if free is not None:
                new = torch.where(free[..., i], new, codes[..., i])
            step = new - codes[..., i]
            if not bool(step.any()):
                continue
            moved += 1
            codes[..., i] = new
            pull += (step * unit[..., i]).unsqueeze(-1) * gram[:, i].unsqueeze(1)
        if not moved:
            break
    return codes
