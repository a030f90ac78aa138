"""Linears, convolutions and norms seen alike: an operator with constant per-channel numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir.ops import argument
from planish.ir.rewriter import Rewriter
from planish.passes.fold import _numbers
from planish.passes.fold._axes import describe, value

aten = torch.ops.aten

LINEAR, CONVOLUTION, NORM = "linear", "convolution", "norm"

# Operator -> number of spatial axes.
CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
TRANSPOSED: dict[Any, int] = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
LAYERS = frozenset({aten.linear.default, aten.convolution.default, *CONVOLUTIONS, *TRANSPOSED})
# Operator -> axis its weight and bias act on.
NORMS: dict[Any, int] = {
    aten.layer_norm.default: -1,
    aten.rms_norm.default: -1,
    aten.group_norm.default: 1,
    aten.batch_norm.default: 1,
    aten.instance_norm.default: 1,
}


@dataclass(frozen=True)
class Layer:
    """A linear, convolution or norm whose numbers are constants.

    Attributes:
        node: its operator.
        kind: ``LINEAR``, ``CONVOLUTION`` or ``NORM``.
        axis: axis of the channels, in the output and in the input.
        channels: number of output channels.
        weight: None for a norm without one.
        bias: None where it has none.
        groups: of a convolution; else 1.
        transposed: whether it is a transposed convolution.
    """

    node: Node
    kind: str
    axis: int
    channels: int
    weight: Tensor | None
    bias: Tensor | None
    groups: int = 1
    transposed: bool = False

    @property
    def x(self) -> Node:
        """The operand."""
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def rows(self) -> Tensor:
        """The weight as float64 ``[G, O/G, I/G, *kernel]``; ``[1, C, 1]`` for a norm."""
        if self.weight is None:
            return torch.ones(1, self.channels, 1, dtype=torch.float64)
        if self.kind == NORM:
            return self.weight.double().reshape(1, -1, 1)
        return _numbers.grouped(self.weight, self.groups, transposed=self.transposed)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        if self.weight is None or self.kind == NORM:
            return self.channels
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel sizes; empty for all but convolutions."""
        if self.kind != CONVOLUTION or self.weight is None:
            return ()
        return tuple(self.weight.shape[2:])

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position is a function of the same input position alone."""
        if self.kind != CONVOLUTION:
            return self.kind == LINEAR
        strides: list[int] = list(argument(self.node, "stride"))
        return all(n == 1 for n in (*self.kernel, *strides)) and not self.pads

    @property
    def pads(self) -> bool:
        """Whether zeros enter at the border or, transposed, contributions are missing there."""
        if self.kind != CONVOLUTION:
            return False
        padding = argument(self.node, "padding")
        if isinstance(padding, str):
            return padding == "same" and any(k != 1 for k in self.kernel)
        if self.transposed:
            strides = argument(self.node, "stride")
            extra = argument(self.node, "output_padding")
            return any(n != 1 for n in (*self.kernel, *strides)) or any((*extra, *padding))
        return any(padding)

    @property
    def shared_with(self) -> Node | None:
        """Another operator that reads the weight matrix, which a fold would have to duplicate."""
        source = argument(self.node, "weight")
        if self.kind == NORM or not isinstance(source, Node):
            return None
        return next((user for user in source.users if user is not self.node), None)

    def scale_outputs(self, scale: Tensor | None, shift: Tensor | None) -> Fold | str:
        """``scale * layer + shift`` as this layer; vectors are float64 ``[O]``."""
        return self.fold(*_numbers.scale_outputs(self.rows, self.bias, scale, shift))

    def scale_inputs(self, scale: Tensor | None, shift: Tensor | None) -> Fold | str:
        """``layer(scale * x + shift)`` as this layer; vectors are float64 ``[I]``."""
        if shift is not None and self.pads:
            return f"{describe(self.node)} pads with zeros, which a shift before it would move"
        return self.fold(*_numbers.scale_inputs(self.rows, self.bias, scale, shift))

    def fold(self, rows: Tensor | None, bias: Tensor | None) -> Fold | str:
        """Round new numbers (None: unchanged); a reason where that cannot be done."""
        dtype = value(self.node).dtype if self.weight is None else self.weight.dtype
        exact = {}
        if rows is not None:
            if self.shared_with is not None:
                return f"its weight is shared with {describe(self.shared_with)}"
            norm = self.kind == NORM
            flat = rows.flatten() if norm else _numbers.ungrouped(rows, transposed=self.transposed)
            exact["weight"] = (flat, dtype)
        if bias is not None:
            if self.node.target is aten.rms_norm.default:
                return "rms_norm has no bias"
            exact["bias"] = (bias, dtype if self.bias is None else self.bias.dtype)
        return rounded_fold(self.node, exact)


@dataclass(frozen=True)
class Fold:
    """An operator with its new constants, by the name of the argument; others stay."""

    node: Node
    constants: Mapping[str, Tensor]

    def write(self, rewriter: Rewriter, like: Node, *, x: Node | None = None) -> Node:
        """Put the operator with its new constants in its place and return it.

        Args:
            rewriter: with an open site.
            like: the operator that was folded into it, for provenance.
            x: what it reads instead of its operand.
        """
        rewriter.insert_before(self.node)
        changed: dict[str, Argument] = {}
        for role, tensor in self.constants.items():
            name = _constant_name(self.node, role)
            layout = rewriter.program.layouts.get(name) if role == "weight" else None
            changed[role] = rewriter.constant(tensor, name, like=self.node, layout=layout)
        args, kwargs = with_arguments(self.node, changed)
        read = args if x is None else (x, *args[1:])
        new = rewriter.call(self.node.target, read, kwargs, like=(self.node, like))
        rewriter.replace(self.node, new)
        return new


def rounded_fold(node: Node, exact: Mapping[str, tuple[Tensor, torch.dtype]]) -> Fold | str:
    """A fold of float64 constants, each rounded to its type; a reason where one cannot be."""
    constants = {}
    for role, (numbers, dtype) in exact.items():
        tensor = _numbers.rounded(numbers, dtype)
        if isinstance(tensor, str):
            return tensor
        constants[role] = tensor
    return Fold(node, constants)


def _constant_name(node: Node, role: str) -> str:
    """The old constant's name, or one like that of the weight, or one like the operator's."""
    source, weight = argument(node, role), argument(node, "weight")
    if isinstance(source, Node):
        return str(source.target)
    if isinstance(weight, Node):
        # A weight that was folded before has a number at its end until the pass is done.
        sibling = re.fullmatch(r"(.*)weight(_\d+)?", str(weight.target))
        if sibling is not None:
            return sibling[1] + role
    return f"{node.name}_{role}"


def with_arguments(
    node: Node, changed: dict[str, Argument]
) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
    """A node's arguments with some of them, by schema name, replaced or added."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        name = declared.name
        if name not in changed:
            continue
        if position < len(args):
            args[position] = changed[name]
        elif position == len(args) and not declared.kwarg_only and name not in kwargs:
            args.append(changed[name])
        else:
            kwargs[name] = changed[name]
    return tuple(args), kwargs
