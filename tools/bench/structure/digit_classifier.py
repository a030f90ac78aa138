"""An encoder of MiniLM's size that reads digits as sequences, trained here in minutes."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.tools.bench.sparsity.nets import Digits

TOKENS, FEATURES = 14, 56  # two rows of pixels are one token
LAYERS, WIDTH, HEADS, NEURONS = 6, 384, 12, 1536
_BATCH, _STEPS, _RATE = 32, 1000, 4e-4


class Block(nn.Module):
    """Attention and a feed-forward unit, norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, WIDTH] to the same."""
        y = self.norm1(x)
        shape = (x.shape[0], TOKENS, HEADS, WIDTH // HEADS)
        q, k, v = (f(y).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(x.shape[0], TOKENS, WIDTH))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class DigitEncoder(nn.Module):
    """Sequences [B, TOKENS, FEATURES] to logits [B, 10]; 10.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.blocks(self.embed(x) + self.places)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


def sequences(pixels: Tensor) -> Tensor:
    """Digits ``[N, 1, 28, 28]`` as sequences ``[N, TOKENS, FEATURES]``."""
    return pixels.reshape(-1, TOKENS, FEATURES)


def _train(data: Digits, seed: int) -> DigitEncoder:
    """AdamW on batches of shifted digits, the rate rising and then falling to 0 as a cosine."""
    torch.manual_seed(seed)
    model = DigitEncoder().train()
    pixels, labels = data.training
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.02)
    for step in range(_STEPS):
        falling = 0.5 + 0.5 * math.cos(math.pi * step / _STEPS)
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / 40) * falling
        chosen = torch.randint(len(pixels), (_BATCH,))
        down, right = torch.randint(-2, 3, (2,)).tolist()
        batch = sequences(pixels[chosen].roll((down, right), (2, 3)))
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def trained(data: Digits, seed: int = 0) -> DigitEncoder:
    """The classifier; trained once, then read from a file in the user's cache.

    Args:
        data: the digits; 4000 train it.
        seed: of its weights and batches.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "planish-bench" / f"digit-encoder-{_STEPS}-{_BATCH}-{seed}.pt"
    model = DigitEncoder()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = _train(data, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        torch.save(model.state_dict(), fresh)
        fresh.replace(path)
    return model
