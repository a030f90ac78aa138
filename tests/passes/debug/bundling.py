"""Small nets whose runs fail, and the bundles they leave."""

from pathlib import Path

import torch
from torch import Tensor, nn

from planish.ir import Program, capture


class Net(nn.Module):
    """A linear and a relu, for the passes of tests.support.failing_passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def sample() -> Tensor:
    return torch.linspace(-1.0, 2.0, 12).reshape(3, 4)


def bundle_in(folder: Path) -> Path:
    """The one bundle in a folder."""
    found = [p for p in folder.iterdir() if p.name.startswith("planish-repro-")]
    assert len(found) == 1, [p.name for p in folder.iterdir()]
    return found[0]


class Deep(nn.Module):
    """As many linears as one likes."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.relu(x) * 2


def deep(width: int = 6, depth: int = 1, batch: int = 3) -> Program:
    """Captured with a dynamic batch."""
    x = torch.linspace(-1.0, 2.0, batch * width).reshape(batch, width)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
    return capture(Deep(width, depth).eval(), (x,), dynamic_shapes=shapes)
