"""Small layers with correlated inputs, and what their errors are."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def layer(
    outputs: int = 8, inputs: int = 16, samples: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight, float32 ``[outputs, inputs]``, and its float64 ``H``."""
    made = torch.Generator().manual_seed(seed)
    samples = samples or 4 * inputs
    mix = torch.randn(inputs, inputs, generator=made) / inputs**0.5 + 0.3 * torch.eye(inputs)
    x = (torch.randn(samples, inputs, generator=made) @ mix).double()
    return torch.randn(outputs, inputs, generator=made), x.T @ x * (2 / samples)


def loss(change: Tensor, h: Tensor) -> float:
    """``tr(D H D^T) / 2``."""
    d = change.double()
    return float(((d @ h) * d).sum()) / 2


def damped(h: Tensor, damping: float = 0.01) -> Tensor:
    """``H`` with a share of the mean of its diagonal added."""
    return h + torch.eye(len(h), dtype=h.dtype) * (damping * h.diagonal().mean())


def least_squares(row: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """The best weights of a mask, from a square root of H: ``min |L^T (w' - w)|``."""
    root = torch.linalg.cholesky(h).T
    found = torch.linalg.lstsq(root[:, kept], (root @ row.double())[:, None]).solution[:, 0]
    return torch.zeros_like(row, dtype=torch.float64).masked_scatter(kept, found)


SEEDS = st.integers(0, 10_000)
