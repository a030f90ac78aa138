"""How linears and convolutions turn what they read into rows of a matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from planish.ir.errors import UnsupportedError
from planish.ir.ops import argument, is_op

aten = torch.ops.aten

_CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
}
# Operator -> its operand and its matrix.
_PRODUCTS: dict[Any, tuple[str, str]] = {
    aten.linear.default: ("input", "weight"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.mm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
}


@dataclass(frozen=True)
class Reading:
    """How a layer turns its operand into rows; layers of the same reading share a matrix."""

    x: Node
    size: int
    groups: int = 1
    spatial: int = 0
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """What its Gram matrix takes."""
        return 8 * self.groups * self.size**2

    def rows(self, piece: Tensor) -> Tensor:
        """Rows of whole samples: float32 [groups, rows, size]."""
        if not self.spatial:
            return piece.reshape(1, -1, self.size)
        patches = self._patches(piece.reshape(-1, *piece.shape[-1 - self.spatial :]))
        n, _, positions = patches.shape
        split = patches.view(n, self.groups, self.size, positions)
        return split.permute(1, 0, 3, 2).reshape(self.groups, -1, self.size)

    def _patches(self, x: Tensor) -> Tensor:
        """[n, channels * kernel, positions]."""
        kernel, stride, dilation = self.kernel, self.stride, self.dilation
        if isinstance(self.padding, str):
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            ends = [(t // 2, t - t // 2) for t in total] if self.padding == "same" else []
        else:
            ends = [(p, p) for p in self.padding]
        x = F.pad(x, [n for pair in reversed(ends) for n in pair])
        if self.spatial == 1:
            x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
        return F.unfold(x, kernel, dilation, 0, stride)


def reading_of(node: Node) -> Reading:
    """How a layer reads its operand.

    Raises:
        UnsupportedError: it is no layer this knows.
    """
    if is_op(node, *_PRODUCTS):
        x, weight = (argument(node, name) for name in _PRODUCTS[node.target])
        declared = weight.meta["val"]
        if declared.dim() == 2:
            inner = declared.shape[1 if is_op(node, aten.linear.default) else 0]
            return Reading(x, int(inner))
    if is_op(node, *_CONVOLUTIONS):
        weight = argument(node, "weight").meta["val"]
        spatial = _CONVOLUTIONS[node.target]
        padding = argument(node, "padding")
        return Reading(
            argument(node, "input"),
            int(weight[0].numel()),
            int(argument(node, "groups")),
            spatial,
            tuple(int(n) for n in weight.shape[2:]),
            _wide(argument(node, "stride"), spatial),
            padding if isinstance(padding, str) else _wide(padding, spatial),
            _wide(argument(node, "dilation"), spatial),
        )
    raise UnsupportedError(
        f"there is no Gram matrix of {node.name}",
        where=node,
        hint="give linears, products with a matrix, or convolutions in one or two dimensions",
    )


def _wide(value: Any, spatial: int) -> tuple[int, ...]:  # noqa: ANN401 - an int or a list of them
    """One number per spatial axis."""
    numbers = [value] if isinstance(value, int) else list(value)
    return tuple(numbers * spatial if len(numbers) == 1 else numbers)
