"""Hand-written modules with odd inputs, outputs, state and control flow, one oddity each."""

# ruff: noqa: D102 - a forward is described by the docstring of its class

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree


class DictInput(nn.Module):
    """Takes a dict of tensors and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 16)
        self.right = nn.Linear(4, 16)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        joint = torch.tanh(self.left(batch["left"]) + self.right(batch["right"]))
        return {"joint": joint, "norm": joint.norm(dim=-1)}


class NestedTuples(nn.Module):
    """Takes nested tuples and lists, and returns them nested another way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(
        self, pair: tuple[Tensor, list[Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        first, (second, third) = pair
        mixed = self.linear(first) * torch.sigmoid(second)
        return mixed, (mixed + third, [third.relu(), mixed.amax(dim=-1)])


@dataclass
class Detection:
    """Output of DataclassOutput."""

    scores: Tensor
    boxes: Tensor
    extra: Tensor | None = None


pytree.register_dataclass(Detection)


class DataclassOutput(nn.Module):
    """Returns a dataclass with one field left None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.scores = nn.Conv2d(8, 2, 1)
        self.boxes = nn.Conv2d(8, 4, 1)

    def forward(self, pixels: Tensor) -> Detection:
        features = self.body(pixels)
        return Detection(
            scores=self.scores(features).softmax(dim=1), boxes=self.boxes(features).exp()
        )


class Moments(NamedTuple):
    """Output of KeywordOnly."""

    mean: Tensor
    variance: Tensor


class KeywordOnly(nn.Module):
    """Keyword-only tensors and a named tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, *, values: Tensor, weights: Tensor) -> Moments:
        projected = self.project(values)
        weights = weights / weights.sum(dim=1, keepdim=True)
        mean = (weights * projected).sum(dim=1)
        variance = (weights * (projected - mean.unsqueeze(1)).square()).sum(dim=1)
        return Moments(mean, variance)


class OptionalInputs(nn.Module):
    """Two optional inputs; the sample leaves one of them None."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.output = nn.Linear(8, 5)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        hidden = self.embedding(ids)
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        if bias is not None:
            hidden = hidden + bias
        logits: Tensor = self.output(hidden.mean(dim=1))
        return logits


class PythonConstants(nn.Module):
    """A float, an int, a bool and a string among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float, steps: int, flip: bool, mode: str) -> Tensor:
        for _ in range(steps):
            x = torch.tanh(self.linear(x)) * scale
        if flip:
            x = x.flip(-1)
        return x.sum(-1) if mode == "sum" else x


class InPlace(nn.Module):
    """relu_, add_, mul_ on views, slice assignment and masked fill in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.conv(x))
        y.add_(0.5).clamp_(max=2.0)
        y[:, :2] = y[:, 2:4] * 2
        y[:, 4].mul_(0.25)
        y.masked_fill_(y > 1.5, 1.5)
        return y


class TiedWeights(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.mix(self.embedding(ids))))
        return logits


class SharedLayer(nn.Module):
    """One layer called three times, and its weight used once more on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        for _ in range(2):
            y = torch.relu(self.layer(y))
        return y + x @ self.layer.weight


class Buffers(nn.Module):
    """Buffers of three dtypes, one of them not persistent, and a plain tensor attribute."""

    table: Tensor
    keep: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(10, 6))
        self.register_buffer("keep", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("offset", torch.arange(6), persistent=False)
        self.scale = torch.full((6,), 1.5)

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table[index] * self.scale
        return torch.where(self.keep, rows, -rows), index.unsqueeze(-1) + self.offset


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers and a GRU, with their last states as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 5, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, (_, cell) = self.lstm(x)
        outputs, last = self.gru(hidden)
        return outputs, torch.cat([last[0], cell[-1]], dim=-1)


class LstmWithState(nn.Module):
    """An LSTM whose initial state is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        outputs, (hidden, _) = self.lstm(x, state)
        return outputs, hidden


class Conditional(nn.Module):
    """A branch on the data, written with torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def warm(y: Tensor) -> Tensor:
            return torch.sin(y) + 1.0

        def cold(y: Tensor) -> Tensor:
            return torch.cos(y) - 1.0

        y = self.linear(x)
        chosen: Tensor = torch.cond(y.sum() > 0, warm, cold, (y,))
        return chosen
