"""Choose the range of each group by the error of the layer's output, not of the weight.

    min over c of  d_g H_gg d_g^T,   d = Q_c(w) - w,   Q_c: the range of the group times c

H = (2 / n) X^T X is what the layer reads; with H = I it is the squared error of the weight. A
group is judged alone, as if all others were exact, which is what AWQ's clip search does too.

Source: Lin et al., "AWQ", MLSys 2024, and its public code (shrinks of up to one half in 20 steps).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from planish.ir.quantscheme import QuantScheme, spread, to_blocks
from planish.passes.quantize.weights import Codes

_ROWS = 256  # at a time
SHRINKS = tuple(1 - 0.5 * step / 20 for step in range(11))


def group_blocks(gram: Tensor, scheme: QuantScheme) -> Tensor:
    """The diagonal blocks of H that the groups of one row see, ``[groups, n, n]``."""
    inputs = gram.shape[0]
    if scheme.granularity != "block":
        return gram[None]
    size = scheme.block_size
    count = -(-inputs // size)
    padded = gram.new_zeros(count * size, count * size)
    padded[:inputs, :inputs] = gram
    return torch.stack(
        [padded[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(count)]
    )


def group_errors(difference: Tensor, blocks: Tensor, scheme: QuantScheme) -> Tensor:
    """``d_g H_gg d_g^T`` for every row and group.

    Args:
        difference: ``[outputs, inputs]``.
        blocks: ``group_blocks``.
        scheme: a ``row_scheme``.

    Returns:
        ``[outputs, groups]``.
    """
    size = scheme.block_size if scheme.granularity == "block" else difference.shape[1]
    # A last short block repeats its last element, against rows and columns of H that are 0.
    d = to_blocks(difference, 1, size).transpose(0, 1)
    return ((d @ blocks) * d).sum(-1).transpose(0, 1)


def clipped_ranges(
    rows: Tensor,
    scheme: QuantScheme,
    gram: Tensor,
    shrinks: tuple[float, ...] = SHRINKS,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of least output error over shrunken ranges.

    Args:
        rows: float32 ``[outputs, inputs]``.
        scheme: a ``row_scheme``: blocks along axis 1 or channels along axis 0.
        gram: H, ``[inputs, inputs]``.
        shrinks: factors of the range; 1 is among them, so that the error never rises.

    Returns:
        Scale and zero point, shaped as ``scheme.qparams_of`` shapes them.
    """
    blocks = group_blocks(gram.float(), scheme)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for shrink in shrinks:
        scale, zero = scheme.qparams_of(rows * shrink)
        real = scheme.dequantize(scheme.quantize(rows, scale, zero), scale, zero)
        error = group_errors(real - rows, blocks, scheme).reshape(scale.shape)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.minimum(error, least)
    assert best is not None
    return best


def fitted(rows: Tensor, gram: Tensor, codes: Codes, damping: float = 0.01) -> Codes:
    """Scales of least output error for codes that stay as they are.

    With u_g the codes of block g less its zero point, and zeros elsewhere, a row of the weight is
    ``sum_g s_g u_g``, so its scales solve ``sum_h (u_g H u_h^T) s_h = u_g H w^T``. A row whose
    solution is not positive everywhere keeps its scales.

    Args:
        rows: ``[outputs, inputs]``.
        gram: H, ``[inputs, inputs]``.
        codes: of the rows, in blocks.
        damping: share of the mean of diag H that is added to it.
    """
    scheme, inputs = codes.scheme, rows.shape[1]
    size = scheme.block_size
    blocks = -(-inputs // size)
    padded = torch.zeros(blocks * size, blocks * size)
    padded[:inputs, :inputs] = gram
    padded[:inputs, :inputs] += torch.eye(inputs) * (damping * gram.diagonal().mean())
    scale = codes.scale.clone()
    for part in range(0, len(rows), _ROWS):
        here = slice(part, part + _ROWS)
        signed = codes.codes[here].float() - spread(
            codes.zero_point[here], codes.codes[here], 1, size
        )
        u = F.pad(signed, (0, blocks * size - inputs)).unflatten(1, (blocks, size))
        w = F.pad(rows[here], (0, blocks * size - inputs))
        # [row, h, inputs]: u_h H; then u_g against it
        uh = torch.einsum("rhj,hjk->rhk", u, padded.unflatten(0, (blocks, size)))
        a = torch.einsum("rgi,rhgi->rgh", u, uh.unflatten(2, (blocks, size)))
        b = (uh @ w[:, :, None]).squeeze(2)
        ridge = a.diagonal(0, 1, 2).mean(1).clamp(min=1e-30) * 1e-6
        a = a + ridge[:, None, None] * torch.eye(blocks)
        solved = torch.linalg.solve(a, b)
        good = (solved > 0).all(1) & solved.isfinite().all(1)
        scale[here] = torch.where(good[:, None], solved, scale[here])
    return Codes(codes.codes, scale, codes.zero_point, scheme)


def spread_rows(p: Tensor, rows: Tensor, scheme: QuantScheme) -> Tensor:
    """A scale or zero point of a ``row_scheme`` for every element of ``[outputs, inputs]``."""
    return spread(p, rows, *scheme.layout(rows)).expand_as(rows)
