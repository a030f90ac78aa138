"""R of tall activations, folded together block by block (TSQR), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.passes.prune.groups import Group


class Triangle:
    """R of all rows seen so far; its Gram matrix is theirs.

    Args:
        columns: m.
        parts: into how many the columns of a unit are told apart, see ``parts_of``; 0 for none.

    Attributes:
        rows: how many were seen.
        parts: a triangle for each part.
    """

    def __init__(self, columns: int, parts: int = 0):
        self.columns = columns
        self.rows = 0
        self.parts = tuple(Triangle(columns) for _ in range(parts))
        self._held: list[Tensor] = [torch.zeros(0, columns, dtype=torch.float64)]
        self._height = 0

    def add(self, rows: Tensor) -> None:
        """Take in ``[n, parts, m]``, or ``[n, m]`` of one part, of any floating dtype."""
        for part, own in zip(self.parts, rows.unbind(1) if self.parts else (), strict=True):
            part.add(own)
        rows = rows.reshape(-1, self.columns)
        self.rows += len(rows)
        # Rows are gathered to as many as the triangle has, so that each is reflected about twice.
        for part in rows.split(max(4 * self.columns, 256)):
            self._held.append(part.double())
            self._height += len(part)
            if self._height >= max(3 * self.columns, 256):
                self._reduce()

    def _reduce(self) -> None:
        stack = torch.cat(self._held)
        if len(stack) > self.columns:
            stack = torch.linalg.qr(stack, mode="r").R
        self._held, self._height = [stack], len(stack)

    def r(self) -> Tensor:
        """``[min(rows, m), m]``, upper triangular where there are more rows than columns."""
        self._reduce()
        return self._held[0]


def parts_of(group: Group) -> int:
    """How many columns each unit owns, where each may be made up by a matrix of its own; else 0.

    A unit of ``head-dims`` is one number of every head. The heads have nothing to do with one
    another, so how its other numbers follow from the kept ones is a matter of each head.
    """
    values = {(read.value.node, read.value.axis) for read in group.reads}
    if group.kind != "head-dims" or len(values) != 1:
        return 0
    unit = group.reads[0].value.unit
    return int((unit >= 0).sum()) // group.size
