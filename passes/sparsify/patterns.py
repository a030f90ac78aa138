"""``Pattern``: where a weight may be zero, and the choice of its zeros by score.

A pattern speaks of a weight as a matrix ``[outputs, inputs]`` whose inputs are what is summed
over. Of a convolution the columns run through the taps first and through the channels of one tap
last, so that ``m`` consecutive columns are ``m`` channels under one tap; see ``sites``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from planish.ir.tensortype import SparseLayout

_FORM = re.compile(r"(?P<a>\d+)(?P<sign>[:x])(?P<b>\d+)")
WRITTEN = "a pattern is N:M (2:4), RxC (blocks of 4x4) or unstructured"


@dataclass(frozen=True)
class Pattern:
    """Which weights may stay.

    Attributes:
        kind: "grouped" (``n`` of every ``m`` consecutive inputs of an output stay),
            "blocks" of ``n`` outputs by ``m`` inputs that stay or go as a whole, or
            "unstructured", any weights at all.
        n: see above; 1 where unstructured.
        m: likewise.
    """

    kind: Literal["grouped", "blocks", "unstructured"]
    n: int = 1
    m: int = 1

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read ``2:4``, ``4x4`` or ``unstructured``.

        Raises:
            ValueError: it is none of these.
        """
        if text == "unstructured":
            return Pattern("unstructured")
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no pattern: {WRITTEN}")
        n, m = int(found["a"]), int(found["b"])
        if found["sign"] == "x":
            if n < 1 or m < 1:
                raise ValueError(f"{text!r} has empty blocks")
            return Pattern("blocks", n, m)
        if not 0 < n < m:
            raise ValueError(f"{text!r} leaves no weight out, or none in: N of M stay, 0 < N < M")
        return Pattern("grouped", n, m)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        return {"grouped": f"{self.n}:{self.m}", "blocks": f"{self.n}x{self.m}"}.get(
            self.kind, "unstructured"
        )

    def problem(self, rows: int, columns: int, window: int = 1) -> str | None:
        """Say why a matrix of this size cannot have the pattern, or None.

        Args:
            rows: outputs.
            columns: inputs, all taps of a window together.
            window: taps; groups and blocks lie within the channels of one.
        """
        channels = columns // window
        if self.kind == "grouped" and channels % self.m:
            return f"its reduction axis has {channels} entries, no multiple of {self.m}"
        if self.kind == "blocks" and (rows % self.n or channels % self.m):
            return f"{rows} x {channels} is no multiple of blocks of {self.n}x{self.m}"
        return None

    def zeros(self, numel: int, ratio: float) -> int:
        """How many of ``numel`` weights go at a ratio: whole groups or blocks, rounded down."""
        if self.kind == "grouped":
            return numel // self.m * (self.m - self.n)
        unit = self.n * self.m
        # 1e-9: 0.9 * 1000 is 900.0000000000001 or 899.9999999999999 as the case may be
        return int(numel // unit * ratio + 1e-9) * unit

    def keep(self, scores: Tensor, zeros: int) -> Tensor:
        """The mask of the weights that stay: exactly ``zeros`` of the lowest go, ties by position.

        Args:
            scores: ``[outputs, inputs]``, higher is kept; must not hold NaN.
            zeros: how many weights go; a grouped pattern decides that by itself.

        Returns:
            bool ``[outputs, inputs]``.
        """
        if self.kind == "grouped":
            groups = scores.unflatten(1, (-1, self.m))
            order = groups.argsort(dim=-1, descending=True, stable=True)
            kept = torch.zeros_like(groups, dtype=torch.bool)
            kept.scatter_(-1, order[..., : self.n], True)
            return kept.flatten(1)
        if self.kind == "blocks":
            blocks = scores.unflatten(0, (-1, self.n)).unflatten(2, (-1, self.m)).sum((1, 3))
            kept = _keep_highest(blocks, zeros // (self.n * self.m))
            return kept.repeat_interleave(self.n, 0).repeat_interleave(self.m, 1)
        return _keep_highest(scores, zeros)

    def layout(self, kept: Tensor, axis: int) -> SparseLayout:
        """The claim of a weight with this mask.

        Args:
            kept: bool ``[outputs, inputs]``.
            axis: of the weight, the one summed over.
        """
        if self.kind == "grouped":
            return SparseLayout(self.n, self.m, axis)
        if self.kind == "blocks":
            block = (self.n, self.m) if axis else (self.m, self.n)
            unit = self.n * self.m
            return SparseLayout(int(kept.sum()) // unit, kept.numel() // unit, None, block)
        return SparseLayout(int(kept.sum()), kept.numel(), None)


def _keep_highest(scores: Tensor, count: int) -> Tensor:
    """A mask without the ``count`` lowest, of equal ones the last."""
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    order = scores.flatten().argsort(descending=True, stable=True)
    kept[order[len(order) - count :]] = False
    return kept.reshape(scores.shape)
