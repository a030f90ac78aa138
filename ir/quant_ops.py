"""The operators that quantize: ``planish::quantize``, ``dequantize`` and ``dynamic_quantize``.

Importing this module registers them. They mean exactly what ONNX QuantizeLinear, DequantizeLinear
and DynamicQuantizeLinear mean (round half to even, saturate); the arithmetic is in
``planish.ir.quantscheme``. One layout of arguments serves all granularities:

    per tensor      axis=None, scale []
    per channel     axis=a, scale [C]
    in blocks       axis=a, block_size=b, scale of the rank of x with ceil(D / b) along the axis
    per token       blocks of the whole last axis: axis=-1, block_size=D, scale [.., 1]

Torch's integers carry no gradient, so a pair of quantize and dequantize has none;
``fake_quantize`` is the pair as one differentiable function, straight through where the integer
did not saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planish.ir.operators import LIBRARY
from planish.ir.quantscheme import INTEGERS, dequantize_linear, quantize_linear, spread

LIBRARY.define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, *, str dtype, int? axis=None, "
    "int block_size=0) -> Tensor"
)
LIBRARY.define(
    "dequantize(Tensor q, Tensor scale, Tensor zero_point, *, str dtype, int? axis=None, "
    "int block_size=0) -> Tensor"
)
LIBRARY.define(
    "dynamic_quantize(Tensor x, *, str dtype='uint8', bool per_token=False) "
    "-> (Tensor, Tensor, Tensor)"
)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    dtype: str,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    """Write real numbers as integers.

    Args:
        x: real values, any shape.
        scale: positive; shaped as the module's docstring says.
        zero_point: the integer that stands for 0; the shape of ``scale``.
        dtype: which integers: a name of ``quantscheme.INTEGERS``.
        axis: of channels or blocks.
        block_size: elements of one block; 0 for none.

    Returns:
        Integers of the shape of ``x``; 4-bit ones one to a byte.
    """
    return quantize_linear(x, scale, zero_point, dtype, axis, block_size)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    dtype: str,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    """``(q - zero_point) * scale``; arguments as those of ``quantize``."""
    return dequantize_linear(q, scale, zero_point, axis, block_size)


def dynamic_quantize(
    x: Tensor, *, dtype: str = "uint8", per_token: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize by the range that the values have right now.

    uint8 is asymmetric, exactly as ONNX DynamicQuantizeLinear; int8 is symmetric with a zero point
    of 0.

    Args:
        x: real values.
        dtype: "uint8" or "int8".
        per_token: one scale for each row along the last axis, instead of one for all.

    Returns:
        Integers of the shape of ``x``; scale and zero point, [] or ``[.., 1]``.
    """
    low = (x.amin(-1, keepdim=True) if per_token else x.amin()).clamp(max=0)
    high = (x.amax(-1, keepdim=True) if per_token else x.amax()).clamp(min=0)
    smallest, largest, storage = INTEGERS[dtype]
    if dtype == "uint8":
        scale = (high - low) / (largest - smallest)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (smallest - low / scale).round().clamp(smallest, largest)
    else:
        scale = torch.maximum(high, -low) / largest
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.zeros_like(scale)
    codes = ((x / scale).round() + zero).clamp(smallest, largest)
    return codes.to(storage), scale, zero.to(storage)


# -- shapes of results ----------------------------------------------------------------------------


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    dtype: str,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    storage = INTEGERS[dtype][2]
    torch._check(x.is_floating_point(), lambda: "quantize takes real numbers")
    torch._check(zero_point.dtype == storage, lambda: f"a zero point of {dtype} is {storage}")
    _check_parameters(x, scale, zero_point, axis, block_size)
    return torch.empty_like(x, dtype=storage, memory_format=torch.contiguous_format)


def _fake_dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    dtype: str,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    storage = INTEGERS[dtype][2]
    torch._check(q.dtype == storage, lambda: f"{dtype} is held in {storage}, not in {q.dtype}")
    torch._check(zero_point.dtype == storage, lambda: f"a zero point of {dtype} is {storage}")
    _check_parameters(q, scale, zero_point, axis, block_size)
    return torch.empty_like(q, dtype=scale.dtype, memory_format=torch.contiguous_format)


def _check_parameters(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block_size: int
) -> None:
    torch._check(scale.is_floating_point(), lambda: "a scale is a real number")
    torch._check(scale.dim() == zero_point.dim(), lambda: "one zero point for each scale")
    if axis is None:
        torch._check(scale.numel() == 1 and not block_size, lambda: "per tensor: one scale")
        return
    torch._check(-x.dim() <= axis < x.dim(), lambda: f"there is no axis {axis}")
    if not block_size:
        torch._check(scale.dim() == 1, lambda: "per channel: scales of rank 1")
        torch._check(scale.shape[0] == x.shape[axis], lambda: "per channel: a scale for each")
        return
    torch._check(scale.dim() == x.dim(), lambda: "in blocks: scales of the rank of x")
    blocks = (x.shape[axis] + block_size - 1) // block_size
    torch._check(scale.shape[axis] == blocks, lambda: f"in blocks: {blocks} scales")


def _fake_dynamic_quantize(
    x: Tensor, *, dtype: str = "uint8", per_token: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(dtype in ("uint8", "int8"), lambda: f"dynamic quantization to {dtype}")
    storage = INTEGERS[dtype][2]
    shape = (*x.shape[:-1], 1) if per_token else ()
    codes = torch.empty_like(x, dtype=storage, memory_format=torch.contiguous_format)
    return codes, x.new_empty(shape), x.new_empty(shape, dtype=storage)


# -- straight-through gradients -------------------------------------------------------------------


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    dtype: str,
    axis: int | None = None,
    block_size: int = 0,
) -> Tensor:
    """``dequantize(quantize(x))`` with gradients: straight through inside of the range.

    The gradient of ``x`` is that of the result where the integer did not saturate, else 0. Scales
    get the gradient of the learned step size: ``codes - x / scale`` inside, the bound outside.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013;
        Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.1.
    """
    low, high, _ = INTEGERS[dtype]
    s = spread(scale, x, axis, block_size)
    zero = spread(zero_point, x, axis, block_size).to(x.dtype)
    real = x / s
    # Rounded before the zero point is added: an odd one would send ties the other way.
    codes = (real.round().detach() - real.detach() + real + zero).clamp(low, high)
    return (codes - zero) * s


for _name, _kernel, _fake in (
    ("quantize", quantize, _fake_quantize),
    ("dequantize", dequantize, _fake_dequantize),
    ("dynamic_quantize", dynamic_quantize, _fake_dynamic_quantize),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"planish::{_name}", _fake, lib=LIBRARY)
