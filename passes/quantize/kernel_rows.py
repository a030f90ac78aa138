"""Products of uint8 values and int8 weights as the matrices that an integer kernel multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, declared_arguments, is_op, node_of
from planish.ir.program import Program
from planish.passes.quantize.operands import (
    DYNAMIC,
    QUANTIZE,
    Operands,
    is_dequantized,
    operands_of,
)


@dataclass(frozen=True)
class Mixed:
    """A product of uint8 by int8.

    Attributes:
        node: the operator.
        codes: what makes its uint8 operand, ``quantize`` or ``dynamic_quantize``; None for a
            recurrent layer, which makes it inside.
        weight: ``[G, N, K]`` int8: for each group (or batch) the rows of output channels; K in the
            order in which kernels add, channels last.
    """

    node: Node
    codes: Node | None
    weight: Tensor


def mixed_operators(program: Program) -> Iterator[Mixed]:
    """The products of uint8 by int8 of a program; not depthwise ones, see ``saturation``."""
    for node in program.operators:
        operands = operands_of(node, program)
        if not isinstance(operands, Operands):
            continue
        codes = _codes(node, operands)
        if codes is None and operands.kind != "recurrent":
            continue
        for position in range(len(operands.weights)):
            weight = _matrices(node, operands, position, program)
            if weight is not None:
                yield Mixed(node, codes, weight)


def _codes(node: Node, operands: Operands) -> Node | None:
    """What makes the one uint8 operand of a product."""
    if len(operands.values) != 1:
        return None
    value = operands.values[0].read(node)
    if not is_dequantized(value) or argument(value, "dtype") != "uint8":
        return None
    codes = node_of(value.args[0])
    if codes.target is QUANTIZE:
        return codes
    made: object = codes.args[0] if codes.args else None
    return made if isinstance(made, Node) and is_op(made, DYNAMIC) else None


def _matrices(node: Node, operands: Operands, position: int, program: Program) -> Tensor | None:
    """One weight's codes as ``[G, N, K]``; None where no kernel pairs them with uint8."""
    weight = operands.weights[position]
    source = weight.slot.read(node)
    if not is_dequantized(source) or argument(source, "dtype") not in ("int8", "int4"):
        return None
    w = program.constant(source.args[0])
    assert w is not None  # operands_of looked
    if operands.kind == "convolution":
        if w.shape[1] == 1:
            return None
        grouped: Tensor = w.unflatten(0, (int(argument(node, "groups")), -1))
        return grouped.movedim(2, -1).flatten(2)
    if operands.kind == "product":
        if weight.axis != w.dim() - 1:
            return None  # the constant is the left operand
        return w.mT.reshape(-1, w.shape[-1], w.shape[-2])
    return w[None] if operands.kind in ("linear", "recurrent") else None


def rows_of(mixed: Mixed, x: Tensor, zero_point: int = 0) -> Iterator[Tensor]:
    """The other operand, one ``[M, K]`` for each group of the weight.

    Args:
        mixed: which product.
        x: its codes, as the operator reads them.
        zero_point: what a convolution pads with.
    """
    groups = mixed.weight.shape[0]
    if is_convolution(mixed.node):
        return iter(_patches(mixed.node, x, zero_point).chunk(groups, 1))
    if groups == 1:
        return iter([x.reshape(-1, x.shape[-1])])
    return iter(x.expand(groups, *x.shape[-2:]).unbind(0))


def zero_point_of(mixed: Mixed, program: Program) -> int:
    """The integer that a convolution pads with; 0 for other products, which do not pad."""
    if not is_convolution(mixed.node):
        return 0
    assert mixed.codes is not None
    zero = program.constant(mixed.codes.args[2])
    return 0 if zero is None else int(zero)


def is_convolution(node: Node) -> bool:
    """Whether a node is a convolution."""
    return "groups" in {a.name for a in declared_arguments(node)}


def _patches(node: Node, x: Tensor, zero_point: int) -> Tensor:
    """What each output position of a convolution reads.

    Shapes: ``[B, C, *S]`` to ``[M, G * K]``, ``K = prod(k) * C / G``, channels last in a group.
    """
    kernel = argument(node, "weight").meta["val"].shape[2:]
    groups, rank = int(argument(node, "groups")), len(kernel)
    stride, dilation = (_each(argument(node, name), rank) for name in ("stride", "dilation"))
    x = torch.nn.functional.pad(x, _padding(node, kernel, dilation), value=zero_point)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, gap * (int(size) - 1) + 1, step)[..., ::gap]
    x = x.unflatten(1, (groups, -1))  # [B, G, C / G, *positions, *kernel]
    positions, offsets = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
    return x.permute(0, *positions, 1, *offsets, 2).flatten(2 + rank).flatten(0, rank).flatten(1)


def _padding(node: Node, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Padding as ``torch.nn.functional.pad`` takes it: the last axis first."""
    padding = argument(node, "padding")
    if padding == "valid":
        return [0] * (2 * len(kernel))
    sides = []
    for axis in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[axis] * (int(kernel[axis]) - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [_each(padding, len(kernel))[axis]] * 2
    return sides


def _each(value: int | list[int], rank: int) -> tuple[int, ...]:
    """One number for each axis."""
    numbers = [value] if isinstance(value, int) else list(value)
    return tuple(numbers * rank if len(numbers) == 1 else numbers)
