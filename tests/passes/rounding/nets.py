"""A small language model, and calibration for it."""

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool

WORDS, WIDTH = 80, 72


class SmallLM(nn.Module):
    """Embedding, a gated unit, a Conv1D and an output layer, perhaps tied to the embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.conv1d = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.conv1d_bias = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        x = torch.addmm(self.conv1d_bias, x.reshape(-1, WIDTH), self.conv1d).view(x.shape)
        logits: Tensor = self.head(x)
        return logits


def ids(seed: int, batch: int = 2, tokens: int = 9) -> Tensor:
    """Token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (batch, tokens), generator=generator)


def small_lm(*, tied: bool = True) -> Program:
    """The model as a program of any number of tokens."""
    shapes = {"ids": {0: Dim("batch", max=64), 1: Dim("tokens", max=64)}}
    return capture(SmallLM(tied=tied).eval(), (ids(0),), dynamic_shapes=shapes)


def calibrated(program: Program, batches: int = 6) -> PassContext:
    """A context with token ids that look like the sample."""
    return PassContext(calibration=spool([ids(7 + i, 2, 20) for i in range(batches)], program))


def tensor(program: Program, name: str) -> Tensor:
    """A constant that is a tensor."""
    value = program.constants[name]
    assert isinstance(value, Tensor)
    return value
