"""Random small networks of everything that units pass: drawn while they run, replayed after."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[..., Tensor]


class RandomNet(nn.Module):
    """A network drawn from a seed.

    Attributes:
        example: what it reads: tokens ``[b, t, c]``, pictures ``[b, c, h, w]`` or rows ``[b, c]``.
        dynamic: whether the batch may be.
    """

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.parts = nn.ModuleList()
        self.steps: list[tuple[Step, tuple[int, ...]]] = []
        kind = self.random.choice(["tokens", "pictures", "rows", "table"])
        shape = {"tokens": (3, 5, 6), "pictures": (3, 4, 6, 6), "rows": (3, 6), "table": (3, 5)}
        self.example = torch.randn(shape[kind])
        if kind == "table":
            self.example = torch.randint(11, shape[kind])
        self.dynamic = self.random.random() < 0.5
        self.values = [self.example]
        if kind == "table":
            table = self._part(nn.Embedding(11, 8))
            self._add(table, 0)
        for _ in range(self.random.randint(3, 11)):
            self._grow()
        self._end()
        self.values.clear()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Replay what was drawn."""
        values = [x]
        for step, read in self.steps:
            values.append(step(*(values[i] for i in read)))
        return values[-1]

    # -- drawing --------------------------------------------------------------------------

    def _part(self, module: nn.Module) -> nn.Module:
        for name, held in [*module.named_parameters(), *module.named_buffers()]:
            if held.is_floating_point() and held.dim() == 1:
                nn.init.uniform_(held, 0.5, 1.5) if "var" in name else nn.init.normal_(held)
        self.parts.append(module.eval())
        return module

    def _add(self, step: Any, *read: int) -> int:
        with torch.no_grad():
            self.values.append(step(*(self.values[i] for i in read)))
        self.steps.append((step, read))
        return len(self.values) - 1

    def _floats(self) -> list[int]:
        return [i for i, v in enumerate(self.values) if v.is_floating_point()]

    def _recent(self) -> int:
        found = self._floats()
        return found[-1] if self.random.random() < 0.7 else self.random.choice(found)

    def _width(self) -> int:
        return self.random.choice([4, 6, 8, 12])

    def _linear(self, at: int, out: int, bias: bool | None = None) -> int:
        size = self.values[at].shape[-1]
        bias = self.random.random() < 0.8 if bias is None else bias
        return self._add(self._part(nn.Linear(size, out, bias=bias)), at)

    def _grow(self) -> None:
        at = self._recent()
        value = self.values[at]
        any_rank = [self._two, self._cat, self._split, self._point, self._linear_step, self._move]
        by_rank = {
            2: [self._linear_step, self._unsqueeze, self._linear_step, self._addmm],
            3: [self._attention, self._attention, self._norm, self._chunked, self._heads],
            4: [self._conv, self._conv, self._conv, self._batch_norm, self._pool, self._shuffle],
        }
        if value.numel() > 20000 or value.dim() > 4:
            return
        self.random.choice([*any_rank, *by_rank.get(value.dim(), [])])(at)

    def _linear_step(self, at: int) -> None:
        self._linear(at, self._width())

    def _addmm(self, at: int) -> None:
        size, out = self.values[at].shape[-1], self._width()
        weight = nn.Parameter(torch.randn(size, out))
        bias = nn.Parameter(torch.randn(self.random.choice([(out,), (1, out), (1,), (1, 1)])))
        part = nn.ParameterList([weight, bias])
        self.parts.append(part)
        self._add(lambda x: torch.addmm(part[1], x, part[0]), at)

    def _point(self, at: int) -> None:
        self._add(
            self.random.choice(
                [F.gelu, F.relu, torch.sigmoid, F.silu, torch.tanh, lambda x: x * 0.5 + 1.0]
            ),
            at,
        )

    def _two(self, at: int) -> None:
        """Add or multiply two values, made to fit where they do not."""
        shape = self.values[at].shape
        fit = [
            i for i in self._floats() if i != at and self._broadcasts(self.values[i].shape, shape)
        ]
        if not fit or self.random.random() < 0.3:
            other = self._linear(at, shape[-1])
            if self.random.random() < 0.3:
                other = self._add(lambda x: x.mean(-1, keepdim=True), other)
        else:
            other = self.random.choice(fit)
        step = self.random.choice([torch.add, torch.mul, torch.sub, torch.maximum])
        self._add(step, *((at, other) if self.random.random() < 0.5 else (other, at)))

    @staticmethod
    def _broadcasts(a: torch.Size, b: torch.Size) -> bool:
        return all(x in (y, 1) or y == 1 for x, y in zip(reversed(a), reversed(b), strict=False))

    def _cat(self, at: int) -> None:
        rank = self.values[at].dim()
        dim = self.random.choice([1, -1]) if rank > 1 else -1
        shape = list(self.values[at].shape)
        fit = []
        for i in self._floats():
            sizes = list(self.values[i].shape)
            if len(sizes) == rank and all(
                sizes[a] == shape[a] for a in range(rank) if a != dim % rank
            ):
                fit.append(i)
        other = self.random.choice(fit)
        pairs: list[tuple[int, ...]] = [(at, other), (other, at), (at, other, at)]
        pair = self.random.choice(pairs)
        self._add(lambda *v: torch.cat(v, dim), *pair)

    def _split(self, at: int) -> None:
        dim = self.random.choice([1, -1])
        size = self.values[at].shape[dim]
        way = self.random.choice(["chunk", "split", "sizes", "slice"])
        if size < 2:
            return
        first = self.random.randint(1, size - 1)
        steps: dict[str, list[Step]] = {
            "chunk": [lambda x: x.chunk(2, dim)[0], lambda x: x.chunk(2, dim)[-1]],
            "split": [lambda x: x.split(first, dim)[0], lambda x: x.split(first, dim)[-1]],
            "sizes": [
                lambda x: x.split([first, size - first], dim)[0],
                lambda x: x.split([first, size - first], dim)[1],
            ],
            "slice": [
                lambda x: x.narrow(dim, 0, first),
                lambda x: x.narrow(dim, first - 1, size - first + 1),
            ],
        }
        for step in steps[way][: self.random.randint(1, 2)]:
            self._add(step, at)

    def _chunked(self, at: int) -> None:
        """A gated unit from one linear."""
        wide = self._linear(at, 2 * self._width())
        self._add(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], wide)

    def _move(self, at: int) -> None:
        rank = self.values[at].dim()
        if rank < 3:
            return
        order = [0, *self.random.sample(range(1, rank), rank - 1)]
        if self.random.random() < 0.5:
            self._add(lambda x: x.permute(order), at)
        else:
            self._add(lambda x: x.transpose(1, -1), at)

    def _unsqueeze(self, at: int) -> None:
        dim = self.random.choice([1, -1])
        found = self._add(lambda x: x.unsqueeze(dim), at)
        if self.random.random() < 0.5:
            self._add(lambda x: x.squeeze(dim), found)

    def _heads(self, at: int) -> None:
        """Into heads, something to each, and back."""
        size = self.values[at].shape[-1]
        each = self.random.choice([d for d in range(1, size + 1) if size % d == 0])
        wide = self._add(lambda x: x.unflatten(-1, (-1, each)), at)
        if self.random.random() < 0.5:
            wide = self._linear(wide, each)
        self._add(lambda x: x.flatten(-2), wide)

    def _norm(self, at: int) -> None:
        size = self.values[at].shape[-1]
        self._add(self._part(self.random.choice([nn.LayerNorm, nn.RMSNorm])(size)), at)

    def _attention(self, at: int) -> None:
        heads, each = self.random.choice([(4, 3), (4, 2), (2, 4)])
        shared = self.random.choice([1, 1, 2, heads])
        other = self.random.choice([i for i in self._floats() if self.values[i].dim() == 3] or [at])
        q = self._linear(at, heads * each)
        k, v = (self._linear(other, heads // shared * each) for _ in range(2))
        way = self.random.choice(["gqa", "expand", "interleave", "product"])
        masked = self.random.random() < 0.3
        scores = self.values[at].shape[1], self.values[other].shape[1]
        shape = self.random.choice([scores, (heads, *scores), (1, heads, 1, scores[1])])
        bias = nn.ParameterList([nn.Parameter(torch.randn(shape))])
        self.parts.append(bias)

        def split(x: Tensor) -> Tensor:
            return x.view(x.shape[0], x.shape[1], -1, each).transpose(1, 2)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = split(q), split(k), split(v)
            mask = bias[0] if masked else None
            if shared > 1 and way == "expand":
                k, v = (y[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for y in (k, v))
            elif shared > 1 and way != "gqa":
                k, v = (y.repeat_interleave(shared, 1) for y in (k, v))
            if way == "product":
                s = q @ k.transpose(-1, -2) / math.sqrt(each)
                y = (s if mask is None else s + mask).softmax(-1) @ v
            else:
                gqa = shared > 1 and way == "gqa"
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
            return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], heads * each)

        self._add(attend, q, k, v)

    def _conv(self, at: int) -> None:
        channels = self.values[at].shape[1]
        groups = self.random.choice([g for g in (1, 1, 2, 4, channels) if channels % g == 0])
        out = groups * self.random.choice([1, 2] if groups > 4 else [1, 2, 3])
        size = self.random.choice([1, 3])
        made: nn.Module = nn.Conv2d(channels, out, size, padding=size // 2, groups=groups)
        if groups == 1 and self.random.random() < 0.2:
            made = nn.ConvTranspose2d(channels, out, size, padding=size // 2)
        self._add(self._part(made), at)

    def _batch_norm(self, at: int) -> None:
        channels = self.values[at].shape[1]
        groups = [g for g in (1, 2, channels) if channels % g == 0]
        norms: list[nn.Module] = [
            nn.BatchNorm2d(channels),
            nn.GroupNorm(self.random.choice(groups), channels),
        ]
        self._add(self._part(self.random.choice(norms)), at)

    def _pool(self, at: int) -> None:
        steps: list[Step] = [
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: x.mean((2, 3), keepdim=True),
            lambda x: F.max_pool2d(x, 3, 1, 1),
            lambda x: F.avg_pool2d(x, 3, 1, 1),
            lambda x: x.flatten(1),
            lambda x: x.mean((2, 3)),
            lambda x: x.flatten(2).transpose(1, 2),
            lambda x: F.pad(x, (1, 1)),
        ]
        found = self._add(self.random.choice(steps), at)
        if tuple(self.values[found].shape[2:]) == (1, 1) and self.random.random() < 0.5:
            self._add(
                self.random.choice([lambda x: x.squeeze(-1).squeeze(-1), lambda x: x.flatten(1)]),
                found,
            )

    def _shuffle(self, at: int) -> None:
        channels = self.values[at].shape[1]
        if channels % 2 == 0:
            self._add(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), at)

    def _end(self) -> None:
        last = self._floats()[-1]
        self._linear(last, 3)
