"""ONNX forms of activation functions and limits."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_pointwise import on_base
from planish.backends.onnx_view import Table, View, dtype_of
from planish.ir.ops import argument

aten = torch.ops.aten


def _gelu(e: Emitter, node: Node) -> View:
    approximate = argument(node, "approximate")
    dtype = dtype_of(node.meta["val"])
    if e.opset >= 20:
        return on_base(e, node, lambda x: e.op("Gelu", x, approximate=approximate))
    half, one = e.constant(0.5, dtype), e.constant(1.0, dtype)
    if approximate == "tanh":

        def tanh_form(x: Any) -> Any:  # noqa: ANN401
            cube = e.op("Mul", x, e.op("Mul", x, x))
            inner = e.op("Add", x, e.op("Mul", cube, e.constant(0.044715, dtype)))
            bent = e.op("Tanh", e.op("Mul", inner, e.constant((2 / torch.pi) ** 0.5, dtype)))
            return e.op("Mul", e.op("Mul", x, e.op("Add", bent, one)), half)

        return on_base(e, node, tanh_form)

    def erf_form(x: Any) -> Any:  # noqa: ANN401
        bent = e.op("Erf", e.op("Div", x, e.constant(2**0.5, dtype)))
        return e.op("Mul", e.op("Mul", x, e.op("Add", bent, one)), half)

    return on_base(e, node, erf_form)


def _silu(e: Emitter, node: Node) -> View:
    return on_base(e, node, lambda x: e.op("Mul", x, e.op("Sigmoid", x)))


def _clamp(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """``clamp``, ``hardtanh``, ``relu6`` and their kin: ONNX Clip."""
    target, dtype = node.target, dtype_of(node.meta["val"])
    low: Any = None
    high: Any = None
    if target is aten.relu6.default:
        low, high = 0.0, 6.0
    elif target is aten.hardtanh.default:
        low, high = argument(node, "min_val"), argument(node, "max_val")
    elif target is aten.clamp_min.default:
        low = argument(node, "min")
    elif target is aten.clamp_max.default:
        high = argument(node, "max")
    else:
        low, high = argument(node, "min"), argument(node, "max")
    limits = [None if limit is None else e.operand(limit, dtype) for limit in (low, high)]
    if limits[1] is None:
        limits.pop()
    return on_base(e, node, lambda x: e.op("Clip", x, *limits))


def _clamp_tensor(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    dtype = dtype_of(node.meta["val"])
    result = e.operand(node.args[0], dtype)
    for name, limit in (("Max", argument(node, "min")), ("Min", argument(node, "max"))):
        if limit is not None:
            result = e.op(name, result, e.operand(limit, dtype))
    return result


def _leaky_relu(e: Emitter, node: Node) -> View:
    slope = argument(node, "negative_slope")
    return on_base(e, node, lambda x: e.op("LeakyRelu", x, alpha=float(slope)))


def _hardsigmoid(e: Emitter, node: Node) -> View:
    return on_base(e, node, lambda x: e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))


ACTIVATIONS: Table = {
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp_tensor,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.relu6.default: _clamp,
    aten.hardtanh.default: _clamp,
    aten.leaky_relu.default: _leaky_relu,
    aten.hardsigmoid.default: _hardsigmoid,
}
