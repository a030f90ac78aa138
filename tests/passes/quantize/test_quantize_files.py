"""Files of quantized programs run, whatever the mode: exported, verified, and near the program."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish
from tests.passes.quantize.nets import linear, normal


class Attention(nn.Module):
    """Projections, attention and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tied(nn.Module):
    """An embedding and a head on one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


X = normal(2, 7, 16)
IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])
BLOCKS = "mode=weight,weights=uint4,granularity=block,block_size=16"


@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
@pytest.mark.parametrize(
    ("make", "x", "options"),
    [
        (Attention, X, "attention=true"),
        (Attention, X, "mode=dynamic,per_token=true,attention=true"),
        (Attention, X, "mode=dynamic,per_token=true,activations=int8"),
        (Attention, X, "saturation=signed"),
        (Attention, X, BLOCKS),
        (Tied, IDS, "mode=weight"),
        (Tied, IDS, BLOCKS),
        (Tied, IDS, "embedding=true"),
        (Recurrent, normal(2, 5, 8), "mode=dynamic"),
    ],
)
def test_the_file_agrees_with_the_program(
    make: Any, x: Tensor, options: str, target: str, tmp_path: Path
) -> None:
    """``export`` itself holds the file to the program, and raises where they differ."""
    calibration = [(x,), (x.flip(0),)]
    recipe = f"exact,quantize{{{options}}}"
    result = planish.optimize(
        make().eval(), (x,), recipe=recipe, target=target, calibration=calibration
    )
    result.export(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 0
