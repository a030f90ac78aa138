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
