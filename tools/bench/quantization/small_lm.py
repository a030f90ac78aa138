"""A small language model of bytes, trained here from scratch on running text of gensim's.

Its weights lie on no grid, unlike those of SmolLM2, whose file holds 4-bit codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.tools.bench.fetch import locate

LENGTH = 64
WIDTH, HEADS, LAYERS = 128, 4, 3
_BATCH, _RATE = 8, 2e-3


class Block(nn.Module):
    """Pre-norm attention and a unit of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def start(self) -> None:
        """Small random weights, smaller where the block adds to the stream; no biases."""
        for linear in (self.q, self.k, self.v, self.o, self.up, self.down):
            ends = linear is self.o or linear is self.down
            nn.init.normal_(linear.weight, std=0.06 / math.sqrt(2 * LAYERS if ends else 1))
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, WIDTH] to the same."""
        y = self.norm1(x)
        q, k, v = (
            p(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class ByteLM(nn.Module):
    """Bytes [B, T] to logits [B, T, 256]; the embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        blocks = [Block() for _ in range(LAYERS)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        for block in blocks:
            block.start()
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next byte at every position."""
        places = torch.arange(ids.shape[1], device=ids.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(ids) + self.places(places))))
        return logits


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes held out: the last twentieth."""
    path = locate("gensim", "gensim/test/test_data/lee_background.cor")
    whole = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    cut = len(whole) * 19 // 20
    return whole[:cut], whole[cut:]


def windows(source: Tensor, count: int, seed: int) -> Tensor:
    """Random windows ``[count, LENGTH + 1]``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(source) - LENGTH - 1, (count, 1), generator=generator)
    return source[starts + torch.arange(LENGTH + 1)]


def train(steps: int, told: Callable[[int, float], None] = lambda step, loss: None) -> ByteLM:
    """Train from scratch, the same way every time; ``told`` of (step, loss) now and then."""
    torch.manual_seed(0)
    model, source = ByteLM(), text()[0]
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(steps):
        falling = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 50) * falling
        batch = windows(source, _BATCH, step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            told(step + 1, loss.item())
    return model.eval()
