"""Which operands of an operator an integer kernel multiplies: values, weights and a bias.

``OPERANDS`` says it for every operator that has a sum of products, or why it cannot use integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir.ops import argument, aten, declared_arguments, is_op, node_of, op_name
from planish.ir.program import Program

QUANTIZE = torch.ops.planish.quantize.default
DEQUANTIZE = torch.ops.planish.dequantize.default
DYNAMIC = torch.ops.planish.dynamic_quantize.default


@dataclass(frozen=True)
class Slot:
    """Where an operator reads an operand: an argument, or one entry of an argument's list."""

    name: str
    index: int | None = None

    def read(self, node: Node) -> Any:  # noqa: ANN401 - a node, a number or None
        """What stands there."""
        value = argument(node, self.name)
        return value if self.index is None else value[self.index]


@dataclass(frozen=True)
class Weight:
    """A constant operand.

    Attributes:
        slot: where it is read.
        axis: the axis of output channels, which may have a scale each; None for a single scale.
        inner: the axis that is summed over, along which blocks lie.
    """

    slot: Slot
    axis: int | None
    inner: int | None


@dataclass(frozen=True)
class Operands:
    """The operands of one operator.

    Attributes:
        kind: what it is: "linear", "convolution", "product", "attention", "embedding",
            "recurrent" or "between" (no products: elementwise, pooling, views).
        values: computed operands.
        weights: constant ones.
        bias: added to the products, per output channel; constant.
    """

    kind: str
    values: tuple[Slot, ...] = ()
    weights: tuple[Weight, ...] = ()
    bias: Slot | None = None

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All operands but the bias."""
        return (*self.values, *(weight.slot for weight in self.weights))


def with_operands(
    node: Node, new: Mapping[Slot, Argument]
) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
    """The arguments of a node with some operands exchanged."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for position, declared in enumerate(declared_arguments(node)):
        slots = [slot for slot in new if slot.name == declared.name]
        if not slots:
            continue
        value: Any = argument(node, declared.name)
        for slot in slots:
            if slot.index is None:
                value = new[slot]
            else:
                value = [*value[: slot.index], new[slot], *value[slot.index + 1 :]]
        if not declared.kwarg_only and position < len(args):
            args[position] = value
        else:
            kwargs[declared.name] = value
    return tuple(args), kwargs


def is_dequantized(value: object) -> TypeGuard[Node]:
    """Whether an operand is already written in integers."""
    return is_op(value, DEQUANTIZE)


def is_written(node: Node, operands: Operands, *, bias: bool) -> bool:
    """Whether an operator reads integers already, its bias included if asked."""
    slots = list(operands.slots)
    if bias and operands.bias is not None:
        slots.append(operands.bias)
    return all(is_dequantized(slot.read(node)) for slot in slots)


def source_of(value: Node) -> Node:
    """The value that a pair of dequantize and quantize stands for; else the value itself."""
    if is_dequantized(value):
        codes = value.args[0]
        if is_op(codes, QUANTIZE):
            return node_of(codes.args[0])
    return value


def operands_of(node: Node, program: Program) -> Operands | str | None:
    """The operands of an operator that multiplies.

    Returns:
        None for an operator of another kind, and a sentence for one that cannot be quantized.
    """
    reader = OPERANDS.get(node.target)
    if reader is None:
        return REFUSED.get(op_name(node.target))
    found = reader(node, program)
    if isinstance(found, str):
        return found
    for slot in found.slots:
        value = slot.read(node)
        dtype = value.meta["val"].dtype
        if not is_dequantized(value) and dtype != torch.float32:
            return f"it computes in {str(dtype).removeprefix('torch.')}, not in float32"
    return found


def is_weight(value: object, program: Program) -> bool:
    """Whether an operand is constant: a float tensor, or integers that stand for one."""
    if is_dequantized(value):
        value = value.args[0]
    return program.constant(value) is not None


def _bias(node: Node, name: str, program: Program) -> Slot | None:
    """The slot of a bias of rank 1 that is constant (or already integers)."""
    value = argument(node, name)
    if not isinstance(value, Node) or not is_weight(value, program):
        return None
    return Slot(name) if value.meta["val"].dim() == 1 else None


def _linear(node: Node, program: Program) -> Operands | str:
    if not is_weight(argument(node, "weight"), program):
        return "its weight is computed, not constant"
    weight = Weight(Slot("weight"), 0, 1)
    return Operands("linear", (Slot("input"),), (weight,), _bias(node, "bias", program))


def _convolution(node: Node, program: Program) -> Operands | str:
    if not is_weight(argument(node, "weight"), program):
        return "its weight is computed, not constant"
    if is_op(node, aten.convolution.default) and argument(node, "transposed"):
        return TRANSPOSED
    weight = Weight(Slot("weight"), 0, 1)
    return Operands("convolution", (Slot("input"),), (weight,), _bias(node, "bias", program))


def _product(first: str, second: str, bias: str | None = None) -> Callable[..., Operands | str]:
    def read(node: Node, program: Program) -> Operands | str:
        if bias is not None and (argument(node, "alpha") != 1 or argument(node, "beta") != 1):
            return "its alpha or beta is not 1"
        values, weights = [], []
        for name, inner in ((first, -1), (second, -2)):
            slot = Slot(name)
            operand = slot.read(node)
            if not is_weight(operand, program):
                values.append(slot)
                continue
            rank = operand.meta["val"].dim()
            if rank < 2:
                return "its constant operand is a vector"
            outer = -3 - inner  # the other one of the last two axes
            weights.append(Weight(slot, rank + outer, rank + inner))
        if not values:
            return "both of its operands are constant: fold-constants computes it once"
        added = _bias(node, bias, program) if bias is not None else None
        if added is not None and (not weights or weights[0].slot.name != second):
            added = None  # a bias per column of a computed operand has no scale of its own
        return Operands("product", tuple(values), tuple(weights), added)

    return read


def _attention(node: Node, program: Program) -> Operands | str:
    return Operands("attention", (Slot("query"), Slot("key"), Slot("value")))


def _embedding(node: Node, program: Program) -> Operands | str:
    if not is_weight(argument(node, "weight"), program):
        return "its table is computed, not constant"
    return Operands("embedding", (), (Weight(Slot("weight"), 0, 1),))


def _recurrent(node: Node, program: Program) -> Operands | str:
    params = argument(node, "params")
    weights = []
    for index, param in enumerate(params):
        if param.meta["val"].dim() != 2:
            continue
        if not is_weight(param, program):
            return "one of its weights is computed, not constant"
        weights.append(Weight(Slot("params", index), 0, 1))
    return Operands("recurrent", (), tuple(weights))


_NO_KERNEL = "runtimes have no integer kernel for "
TRANSPOSED = _NO_KERNEL + "transposed convolutions"

OPERANDS: Mapping[Any, Callable[[Node, Program], Operands | str]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.convolution.default: _convolution,
    aten.matmul.default: _product("self", "other"),
    aten.mm.default: _product("self", "mat2"),
    aten.bmm.default: _product("self", "mat2"),
    aten.addmm.default: _product("mat1", "mat2", "self"),
    aten.baddbmm.default: _product("batch1", "batch2", "self"),
    aten.embedding.default: _embedding,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
}
# Operators that multiply, and have no integer kernel anywhere.
REFUSED: Mapping[str, str] = {
    "aten.conv_transpose1d": TRANSPOSED,
    "aten.conv_transpose2d.input": TRANSPOSED,
    "aten.conv_transpose3d.input": TRANSPOSED,
    "aten.einsum": "an einsum is no single product: write it as matmul",
    "aten.bilinear": "a product of three operands has no integer kernel",
    "aten.embedding_bag.padding_idx": "bags are summed inside of the operator, in float",
    "aten.rnn_tanh.input": _NO_KERNEL + "plain recurrent layers",
    "aten.rnn_relu.input": _NO_KERNEL + "plain recurrent layers",
}
