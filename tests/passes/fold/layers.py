"""Small layers with random numbers, for the tests of the fold passes."""

from typing import Any

import torch
from torch import nn

from planish.ir.program import Program
from planish.passes.base import Pass
from planish.passes.recipe import Recipe

# They hand out Any: torch types the attributes of modules as ``Tensor | Module | None``.
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def batch_norm(channels: int, dims: int = 2, *, affine: bool = True, seed: int = 0) -> Any:
    """A batch norm whose statistics and parameters are unlike those it starts with."""
    generator = torch.Generator().manual_seed(seed)
    norm = BATCH_NORMS[dims](channels, affine=affine)
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2.0, generator=generator)
    if affine:
        nn.init.normal_(norm.weight, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    return norm.eval()


def convolution(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    dims: int = 2,
    transposed: bool = False,
    **options: Any,
) -> Any:
    """A convolution of any kind."""
    torch.manual_seed(0)
    kinds = TRANSPOSED if transposed else CONVOLUTIONS
    return kinds[dims](inputs, outputs, kernel, **options)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor]:
    """One random input, as an argument tuple."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)


def is_still(program: Program, name: str, tensor: torch.Tensor) -> bool:
    """Whether a constant is the caller's own tensor, not a copy."""
    constant = program.constants[name]
    return isinstance(constant, torch.Tensor) and constant.data_ptr() == tensor.data_ptr()


def assert_is_a_value(pass_: Pass) -> None:
    """Equal passes are equal and hash alike, and a recipe gives them back."""
    assert pass_ == type(pass_)()
    assert hash(pass_) == hash(type(pass_)())
    recipe = Recipe(passes=(pass_,))
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
