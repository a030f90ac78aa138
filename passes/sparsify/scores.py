"""What a weight is worth on its own: higher is kept."""

from __future__ import annotations

from torch import Tensor


def magnitude(rows: Tensor) -> Tensor:
    """``|w|``."""
    return rows.abs()


def wanda(rows: Tensor, h: Tensor) -> Tensor:
    """``|w| ||x||``, the size of what a weight adds to its output.

    Args:
        rows: ``[outputs, inputs]``.
        h: ``(2 / n) X X^T``, ``[inputs, inputs]``; its diagonal is read.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024, section 3.
    """
    return rows.abs() * h.diagonal().clamp(min=0).sqrt().to(rows.dtype)


def undecayed(rows: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """``|-w g + decay w^2|``: magnitude where training is done, gradients where it is not.

    Args:
        rows: weights of any shape.
        gradient: of the plain loss, without weight decay, the same shape.
        decay: the L2 weight decay of the training.

    Source: Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning
    Algorithm", NeurIPS 2022 (the form of the authors' code: g has no decay in it).
    """
    return (decay * rows.square() - rows * gradient).abs()
