"""Small modules to quantize, with calibration for them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool

Layer = TypeVar("Layer", bound=nn.Module)


class Net(nn.Module):
    """``f(self, *inputs)`` with layers and tensors given by name."""

    def __init__(self, f: Callable[..., Any], **parts: nn.Module | Tensor):
        super().__init__()
        self.f = f
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(self, *inputs)


def seeded(make: Callable[[], Layer]) -> Layer:
    """A layer with the same weights every time."""
    torch.manual_seed(0)
    return make()


def linear(inputs: int = 4, outputs: int = 3, bias: bool = True) -> nn.Linear:
    return seeded(lambda: nn.Linear(inputs, outputs, bias=bias))


def conv(inputs: int = 2, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return seeded(lambda: nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options}))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(program: Program, batches: int = 4) -> PassContext:
    """A context with normal inputs of the sample's shapes; integers stay those of the sample."""
    inputs = [
        tuple(
            normal(*v.shape, seed=seed).to(v.dtype) if v.is_floating_point() else v
            for v in program.samples[0]
        )
        for seed in range(batches)
    ]
    remarks: list[str] = []
    context = PassContext(calibration=spool(inputs, program), remark=remarks.append)
    context.remarks = remarks  # type: ignore[attr-defined]  # for the tests to read
    return context


def captured(f: Callable[..., Any], *inputs: Tensor, **parts: nn.Module | Tensor) -> Program:
    """The program of ``f``."""
    return capture(Net(f, **parts).eval(), inputs)


def residual(m: Any, x: Tensor) -> Tensor:
    """Two convolutions with a sum, a concatenation, a pooling and a linear."""
    y = F.relu6(m.a(x))
    z = m.b(y)
    y = torch.cat([y + z, z], 1)
    y = F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).flatten(1)
    return m.c(y)


def residual_net() -> Program:
    """A program of ``residual``."""
    parts = {"a": conv(2, 4), "b": conv(4, 4), "c": linear(8, 3)}
    return captured(residual, normal(2, 2, 8, 8), **parts)
