"""Tensors that hold one number everywhere, found without computing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.program import Program
from planish.passes.cleanup._sizes import bound, tensor_of

aten = torch.ops.aten

Scalar = bool | int | float

# Every element of the result is some element of the first operand.
_MOVES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.repeat.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
    }
)
# Factories -> the number they fill with, or the position of the argument that gives it.
FILLS: dict[Any, Scalar | str] = {
    aten.ones.default: 1,
    aten.zeros.default: 0,
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
    aten.new_ones.default: 1,
    aten.new_zeros.default: 0,
    aten.full.default: "fill_value",
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.scalar_tensor.default: "s",
}


def uniform_value(tensor: Tensor) -> Scalar | None:
    """The number every element equals; None if they differ, or there are none, or one is NaN."""
    if tensor.numel() == 0 or tensor.is_complex() or tensor.layout is not torch.strided:
        return None
    flat = tensor.detach().flatten()
    first = flat[0].item()
    # Two elements tell most tensors apart, so that weights are not read.
    if flat[-1].item() != first or not bool((flat == flat[0]).all()):
        return None
    return first


def uniform(value: object, program: Program) -> Scalar | None:
    """The number an argument stands for: a number itself, or a tensor that holds it everywhere.

    Args:
        value: any argument of a node.
        program: gives the constants.
    """
    dtypes: list[torch.dtype] = []
    while isinstance(value, Node) and value.target in _MOVES and value.args:
        tensor = tensor_of(value)
        if tensor is not None:
            dtypes.append(tensor.dtype)
        value = value.args[0]
    found = _source(value, program)
    for dtype in reversed(dtypes):
        found = None if found is None else _cast(found, dtype)
    return found


def _source(value: object, program: Program) -> Scalar | None:
    if isinstance(value, (bool, int, float)):
        return value
    constant = program.constant(value)
    if constant is not None:
        return uniform_value(constant)
    tensor = tensor_of(value)
    if tensor is None or not isinstance(value, Node) or value.target not in FILLS:
        return None
    fill: object = FILLS[value.target]
    if isinstance(fill, str):
        names = [a.name for a in value.target._schema.arguments]  # type: ignore[union-attr]
        fill = bound(value)[names.index(fill)]
    return _cast(fill, tensor.dtype) if isinstance(fill, (bool, int, float)) else None


def _cast(value: Scalar, dtype: torch.dtype) -> Scalar:
    """What a number becomes as an element of this type."""
    number: Scalar = torch.tensor(value).to(dtype).item()
    return number
