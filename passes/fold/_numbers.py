"""The arithmetic of folding: pure functions on tensors, in float64, rounded once at the end.

All weights have one shape here, ``[G, O/G, I/G, *kernel]`` (a linear has G = 1 and no kernel, a
norm G = 1 and I/G = 1), so that a scale of the outputs is a row scale and a scale of the inputs a
column scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped(weight: Tensor, groups: int = 1, *, transposed: bool = False) -> Tensor:
    """A weight as float64 ``[G, O/G, I/G, *kernel]``.

    Args:
        weight: ``[O, I/G, *kernel]``, or ``[I, O/G, *kernel]`` where transposed.
        groups: G.
        transposed: whether it belongs to a transposed convolution.
    """
    first, second, *kernel = weight.shape
    split = weight.double().reshape(groups, first // groups, second, *kernel)
    return split.transpose(1, 2) if transposed else split


def ungrouped(rows: Tensor, *, transposed: bool = False) -> Tensor:
    """The inverse of ``grouped``; stays float64."""
    split = rows.transpose(1, 2) if transposed else rows
    return split.reshape(split.shape[0] * split.shape[1], *split.shape[2:])


def scale_outputs(
    rows: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``scale * layer(x; W, b) + shift`` as one layer.

    ``W' = scale W`` (row scale) and ``b' = scale b + shift``.

    Args:
        rows: ``[G, O/G, I/G, *kernel]`` float64.
        bias: ``[O]``; None stands for zeros.
        scale: ``[O]`` float64; None stands for ones.
        shift: ``[O]`` float64; None stands for zeros.

    Returns:
        The new rows and bias; None for one that stays as it is.
    """
    new_rows, new_bias = None, shift
    if scale is not None:
        new_rows = rows * scale.reshape(rows.shape[0], -1, *[1] * (rows.dim() - 2))
    if bias is not None and (scale is not None or shift is not None):
        new_bias = bias.double() * (1.0 if scale is None else scale)
        new_bias = new_bias if shift is None else new_bias + shift
    return new_rows, new_bias


def scale_inputs(
    rows: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``layer(scale * x + shift; W, b)`` as one layer.

    ``W' = W scale`` (column scale) and ``b' = b + W shift``, summed over inputs and kernel. For a
    convolution the shift is exact only where no zeros are added at the border.

    Args:
        rows: ``[G, O/G, I/G, *kernel]`` float64.
        bias: ``[O]``; None stands for zeros.
        scale: ``[I]`` float64; None stands for ones.
        shift: ``[I]`` float64; None stands for zeros.

    Returns:
        The new rows and bias; None for one that stays as it is.
    """
    columns = [rows.shape[0], 1, -1, *[1] * (rows.dim() - 3)]
    new_rows = None if scale is None else rows * scale.reshape(columns)
    if shift is None:
        return new_rows, None
    new_bias = (rows * shift.reshape(columns)).flatten(2).sum(2).flatten()
    return new_rows, new_bias if bias is None else bias.double() + new_bias


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor | str:
    """A float64 result in the type it must have; a reason where that type cannot hold it."""
    least, most = exact.aminmax() if exact.numel() else (0.0, 0.0)
    peak = max(-float(least), float(most))  # NaN if any is
    if not peak <= torch.finfo(dtype).max:
        return f"the folded numbers are not finite in {dtype}"
    if 0 < peak < torch.finfo(dtype).tiny:
        return f"the folded numbers are too small for {dtype}"
    return exact.to(dtype).contiguous()
