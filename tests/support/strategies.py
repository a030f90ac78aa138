"""Hypothesis strategies for tensors, layers and programs.

Values come from a drawn seed, not from drawn numbers: a failure still shrinks in shape, and large
tensors cost nothing to draw.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of random values."""
    return st.integers(0, 2**16)


def shapes(
    *, min_dims: int = 0, max_dims: int = 4, min_side: int = 1, max_side: int = 7
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes; ``min_side=0`` includes empty tensors."""
    sides = st.integers(min_side, max_side)
    return st.lists(sides, min_size=min_dims, max_size=max_dims).map(tuple)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Tensor:
    """Normal values (integers: from -5 to 5, or 0 to 5), in memory of any order of axes."""
    drawn = shapes() if shape is None else shape
    size = draw(drawn) if isinstance(drawn, st.SearchStrategy) else drawn
    dtype, seed = draw(st.sampled_from(dtypes)), draw(seeds())
    order = draw(st.permutations(range(len(size))))
    stored = tuple(size[axis] for axis in order)
    if dtype.is_floating_point or dtype.is_complex:
        values = normal(stored, seed).to(dtype)
    else:
        low = 0 if dtype == torch.uint8 else -5
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(low, 6, stored, generator=generator).to(dtype)
    back = sorted(range(len(order)), key=lambda axis: order[axis])
    return values.permute(back) if back else values


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer values that hide no mistake; return it in evaluation mode.

    A fresh batch norm has mean 0, variance 1, scale 1 and shift 0, so that a wrong fold is right.
    Variances come out between 0.5 and 2.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return module.eval()


@st.composite
def convolutions(
    draw: st.DrawFn, dims: tuple[int, ...] = (1, 2, 3), *, transposed: bool = False
) -> tuple[Any, Tensor]:
    """A convolution with random settings and values, and an input that fits it.

    Kernel, stride, padding, dilation and groups vary; a depthwise one is among them.
    """
    axes = draw(st.sampled_from(dims))
    groups = draw(st.sampled_from((1, 2, 3)))
    inputs = groups * draw(st.integers(1, 2))
    outputs = groups * draw(st.integers(1, 3))
    name = f"Conv{'Transpose' if transposed else ''}{axes}d"
    layer = getattr(nn, name)(
        inputs,
        outputs,
        kernel_size=draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    seed = draw(seeds())
    return randomize(layer, seed), normal((2, inputs, *(5 + i for i in range(axes))), seed)


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Linear, Tensor]:
    """A linear layer with random values, and an input of one to three leading axes."""
    layer = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6)), bias=draw(st.booleans()))
    leading = draw(shapes(min_dims=1, max_dims=3, max_side=4))
    seed = draw(seeds())
    randomize(layer, seed)
    return layer, normal((*leading, layer.in_features), seed)
