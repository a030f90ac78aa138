"""Small models that the command-line tests name as ``tests.support.tiny:...``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim


class ConvBn(nn.Module):
    """A convolution, its batch norm, and a dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Tensor:
        return self.drop(torch.relu(self.bn(self.conv(image))))


def conv_bn() -> tuple[nn.Module, Any, Any]:
    """The model, an example of batch 1, and a dynamic batch."""
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", max=64)},)
    return ConvBn().eval(), (torch.randn(1, 3, 8, 8),), shapes


def not_a_model() -> int:
    """What a user may return by mistake."""
    return 3


def broken() -> nn.Module:
    """A builder that fails."""
    raise ValueError("the checkpoint is gone")


class Branch(nn.Module):
    """Control flow on values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def branch() -> tuple[nn.Module, Any]:
    """A model that cannot be traced."""
    return Branch().eval(), (torch.ones(2),)


def sentences() -> list[dict[str, Tensor]]:
    """A calibration iterable for nothing in particular."""
    return [{"image": torch.randn(1, 3, 8, 8)}]


def labeled() -> list[tuple[Tensor, Tensor]]:
    """Batches with labels, for ``conv_bn``."""
    drawn = torch.Generator().manual_seed(0)
    image = torch.randn(6, 4, 3, 8, 8, generator=drawn)
    return [(x, torch.full((4,), n)) for n, x in enumerate(image)]


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar that depends on both."""
    return nn.functional.cross_entropy(outputs.mean((2, 3)), batch[1] % outputs.shape[1])
