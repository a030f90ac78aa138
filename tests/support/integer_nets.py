"""Small modules that compute on integers, written with planish's own operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import Artifact, ExportOptions
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.program import Program


class Grid(nn.Module):
    """Rounds to a grid: quantize, then dequantize."""

    def __init__(self, low: float, high: float, dtype: str = "uint8") -> None:
        super().__init__()
        smallest, largest = (0, 255) if dtype == "uint8" else (-128, 127)
        scale = (high - low) / 255
        zero = max(smallest, min(largest, round(smallest - low / scale)))
        self.dtype = dtype
        self.scale = nn.Buffer(torch.tensor(scale))
        self.zero = nn.Buffer(torch.tensor(zero, dtype=getattr(torch, dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """What ``x`` is on the grid."""
        q = torch.ops.planish.quantize(x, self.scale, self.zero, dtype=self.dtype)
        result: Tensor = torch.ops.planish.dequantize(q, self.scale, self.zero, dtype=self.dtype)
        return result


class Conv(nn.Module):
    """A convolution of ``grid``'s values with int8 weights, per channel, and an int32 bias."""

    def __init__(self, shape: tuple[int, ...], grid: Grid, *, bias: bool = True, **how: Any):
        super().__init__()
        outputs = shape[0]
        self.codes = nn.Buffer(torch.randint(-127, 128, shape, dtype=torch.int8))
        fan = self.codes[0].numel()
        self.scale = nn.Buffer((torch.rand(outputs) + 0.5) / (127 * fan**0.5))
        self.zero = nn.Buffer(torch.zeros(outputs, dtype=torch.int8))
        self.bias = nn.Buffer(torch.randint(-900, 900, (outputs,), dtype=torch.int32))
        self.unit = nn.Buffer(self.scale * grid.scale)
        self.none = nn.Buffer(torch.zeros(outputs, dtype=torch.int32))
        self.how, self.biased, self.rank = how, bias, len(shape) - 2

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of numbers on the grid."""
        dequantize = torch.ops.planish.dequantize
        weight = dequantize(self.codes, self.scale, self.zero, dtype="int8", axis=0)
        bias = None
        if self.biased:
            bias = dequantize(self.bias, self.unit, self.none, dtype="int32", axis=0)
        result: Tensor = (F.conv1d, F.conv2d)[self.rank - 1](x, weight, bias, **self.how)
        return result


def program_of(module: nn.Module, x: Tensor, dynamic: bool = False) -> Program:
    """Capture, with a dynamic batch where asked for."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},) if dynamic else None
    return capture(module.eval().requires_grad_(False), (x,), dynamic_shapes=shapes)


def exported(
    program: Program,
    path: Path,
    *,
    target: str = "onnxruntime-cpu",
    stem: str = "plain",
    wide: str = "whole",
) -> Artifact:
    """Write a file and hold it to the program, with no choice left to measurement."""
    known = {"stem": stem, "wide": wide, "linear": "gemm"}
    choices = known if target == "onnxruntime-cpu" else None
    return load_backend(target).export(program, path, ExportOptions(choices=choices))
