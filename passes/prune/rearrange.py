"""Which units of a layer go, given how many: what they do together counts, not each by itself.

Taking the units Z away changes the loss by about ``sum of (sum over Z of g_i)^2`` over batches,
``1_Z^T F 1_Z`` with ``F = G^T G``. Two units that push the loss in opposite ways can go together.

Source: Kwon et al., NeurIPS 2022, section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SWEEPS = 4


def joint_cost(fisher: Tensor, gone: Tensor) -> float:
    """``1_Z^T F 1_Z`` for the units Z that go."""
    return float(fisher[gone][:, gone].sum())


def rearrange(gradients: Tensor, kept: int) -> Tensor:
    """The units that stay.

    Starts from the units worth least by themselves. Each of the others, by rising worth, is added
    to those that go, and the one whose return helps most comes back; sweeps end when none changes
    anything. No step makes the cost larger.

    Args:
        gradients: ``[batches, units]`` of the loss by each unit's mask.
        kept: how many stay.

    Returns:
        int64 ``[kept]``, ascending.
    """
    g = gradients.double()
    fisher = g.T @ g
    order = torch.argsort(fisher.diagonal(), stable=True)
    count = len(order) - kept
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[:count]] = True
    if 0 < count < len(order):
        for _ in range(_SWEEPS):
            if not _sweep(fisher, order, gone):
                break
    return (~gone).nonzero().flatten()


def _sweep(fisher: Tensor, order: Tensor, gone: Tensor) -> bool:
    """Swap every unit that stays in once, where that helps; whether anything changed."""
    diagonal = fisher.diagonal()
    sums = fisher @ gone.double()  # of each unit with those that go
    changed = False
    for unit in order[~gone[order]].tolist():
        gone[unit] = True
        sums = sums + fisher[unit]
        # Without v the cost is less by 2 s_v - F_vv. The added unit stays on a tie.
        gain = torch.where(gone, 2 * sums - diagonal, -torch.inf)
        back = int(gain.argmax())
        if gain[back] <= gain[unit] + 1e-12 * abs(float(gain[back])):
            back = unit
        gone[back] = False
        sums = sums - fisher[back]
        changed |= back != unit
    return changed
