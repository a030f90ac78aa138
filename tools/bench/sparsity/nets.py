"""A small ResNet and a small ViT for 28 x 28 digits, and how they are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.tools.bench.quantization.digits import digits

TRAINING = 4000  # of 5000 digits; the others are held
_BATCH = 64


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short: nn.Module = nn.Identity()
        if stride > 1:
            self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(y + self.short(x))


class SmallResNet(nn.Module):
    """Pixels [B, 1, 28, 28] to logits [B, 10]; 152k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2), Residual(64, 64, 1)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y = self.blocks(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Attention and a unit of twice the width, norms first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (p.transpose(1, 2) for p in parts.unbind(2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class SmallViT(nn.Module):
    """Pixels [B, 1, 28, 28], as 16 patches of 7 x 7, to logits [B, 10]; 139k parameters."""

    def __init__(self, width: int = 64, depth: int = 4):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, 7)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@dataclass(frozen=True)
class Digits:
    """5000 of MNIST's digits, f32 ``[N, 1, 28, 28]`` and labels, split once and for all."""

    training: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]


def load_digits() -> Digits:
    """4000 to train with and 1000 held, every class as often in both."""
    pixels, labels = digits(5000)
    scaled = ((pixels.float() / 255 - 0.1307) / 0.3081).unsqueeze(1)
    return Digits((scaled[:TRAINING], labels[:TRAINING]), (scaled[TRAINING:], labels[TRAINING:]))


@dataclass(frozen=True)
class Training:
    """Steps of AdamW on batches of 64 digits shifted by up to 2 pixels.

    What is done at a step depends on the seed and the step alone, so that training may begin
    anywhere.

    Attributes:
        data: the digits.
        steps: in all.
        rate: the highest learning rate; it falls to 0 as a cosine.
    """

    data: Digits
    steps: int
    rate: float = 2e-3

    def __call__(self, model: nn.Module, *, start: int, stop: int | None, seed: int) -> None:
        """Train a model in place from one step to another; None is the end."""
        pixels, labels = self.data.training
        optimizer = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=0.02)
        model.train()
        for step in range(start, self.steps if stop is None else stop):
            falling = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
            optimizer.param_groups[0]["lr"] = self.rate * min(1.0, (step + 1) / 50) * falling
            drawn = torch.Generator().manual_seed(1_000_003 * seed + step)
            chosen = torch.randint(len(pixels), (_BATCH,), generator=drawn)
            down, right = torch.randint(-2, 3, (2,), generator=drawn).tolist()
            batch = pixels[chosen].roll((down, right), (2, 3))  # digits have a margin of 4 pixels
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[chosen]).backward()
            optimizer.step()
        model.eval()


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """``[N, 10]``."""
    with torch.no_grad():
        return torch.cat([model(part) for part in pixels.split(250)])


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Share of logits ``[N, 10]`` whose largest is the label."""
    return float((found.argmax(1) == labels).double().mean())
