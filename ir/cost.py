"""What a program costs: parameters, bytes, and multiply-accumulates by operator.

Symbolic sizes count as the sample has them. One multiply-accumulate is one MAC; pointwise
operators, norms and softmax count none, as everywhere in the literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node

from planish.ir.ops import argument, op_name
from planish.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Cost of one program on its sample.

    Attributes:
        parameters: elements of all floating-point and quantized constants, tied ones once.
        bytes: size of all constants.
        macs: multiply-accumulates of one run.
    """

    parameters: int
    bytes: int
    macs: int

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def cost(program: Program) -> Cost:
    """The cost of a program."""
    live = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
    tensors = {
        id(t): t for name, t in program.constants.items() if name in live and isinstance(t, Tensor)
    }
    return Cost(
        parameters=sum(t.numel() for t in tensors.values() if _is_parameter(t)),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        macs=sum(macs_by_operator(program).values()),
    )


def _is_parameter(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype in (torch.int8, torch.uint8)


def macs_by_operator(program: Program) -> dict[str, int]:
    """Multiply-accumulates per operator name, largest first; operators without any are left out."""
    sizes = _sample_sizes(program)
    counts: dict[str, int] = {}
    for node in program.operators:
        count = _macs(node, sizes)
        if count:
            name = op_name(node.target)
            counts[name] = counts.get(name, 0) + count
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _sample_sizes(program: Program) -> dict[Any, sympy.Integer]:
    """Symbol -> its size in the first sample."""
    sizes: dict[Any, sympy.Integer] = {}
    if not program.samples:
        return sizes
    for node, value in zip(program.placeholders, program.samples[0], strict=True):
        declared = node.meta.get("val")
        if not isinstance(declared, Tensor) or not isinstance(value, Tensor):
            continue
        for symbolic, size in zip(declared.shape, value.shape, strict=True):
            if isinstance(symbolic, SymInt) and symbolic.node.expr.is_Symbol:
                sizes[symbolic.node.expr] = sympy.Integer(int(size))
    return sizes


def _shape(value: object, sizes: dict[Any, sympy.Integer]) -> list[int]:
    """A node's sizes as numbers; a size that only the data decides counts as its hint, else 1."""
    tensor = value.meta.get("val") if isinstance(value, Node) else value
    if not isinstance(tensor, Tensor):
        return []
    return [_number(size, sizes) for size in tensor.shape]


def _number(size: int | SymInt, sizes: dict[Any, sympy.Integer]) -> int:
    if isinstance(size, int):
        return size
    found = size.node.expr.xreplace(sizes)
    return int(found) if found.is_Integer else int(size.node.hint or 1)


def _linear(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    weight = _shape(node.args[1], sizes)
    return math.prod(_shape(node.args[0], sizes)) * (weight[0] if len(weight) == 2 else 1)


def _convolution(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    weight, out = _shape(node.args[1], sizes), _shape(node, sizes)
    if _is_transposed(node):
        # Each input element meets every tap of every output channel of its group.
        return math.prod(_shape(node.args[0], sizes)) * math.prod(weight[1:])
    return math.prod(out) * math.prod(weight[1:])


def _is_transposed(node: Node) -> bool:
    if node.target is aten.convolution.default:
        return bool(argument(node, "transposed"))
    return "transpose" in op_name(node.target)


def _matmul(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    left = _shape(node.args[0], sizes)
    return math.prod(_shape(node, sizes)) * (left[-1] if left else 1)


def _addmm(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    return math.prod(_shape(node, sizes)) * _shape(node.args[1], sizes)[-1]


def _attention(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    query, key, value = (_shape(a, sizes) for a in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    """Every weight matrix is used once per step and batch element."""
    steps_and_batch = math.prod(_shape(node.args[0], sizes)[:-1])
    lists = [a for a in node.args if isinstance(a, (list, tuple)) and len(a) > 2]
    weights = [_shape(w, sizes) for w in (lists[0] if lists else ())]
    return steps_and_batch * sum(math.prod(w) for w in weights if len(w) == 2)


_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
_MACS: dict[Any, Callable[[Node, dict[Any, sympy.Integer]], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}


def _macs(node: Node, sizes: dict[Any, sympy.Integer]) -> int:
    count = _MACS.get(node.target)
    return count(node, sizes) if count is not None else 0
