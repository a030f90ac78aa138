"""Quantized linear layers as plain integer products, for files that cannot hold packed weights.

    q = uint8 codes of x, scale s, zero point z        w = int8 codes, one scale v for each output

    (q - 128) @ w.T                      int8 by int8 into int32: ``aten._int_mm``, oneDNN's product
      + (128 - z) * sum over inputs of w a constant: what moving the codes by 128 changed
      in float, times s * v, plus bias

``onednn.qlinear_prepack`` takes 2.8 ms for 384 x 1536, ten times the product itself; this product
takes plain weights in the 0.22 ms that the packed one takes (128 rows, one thread).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from planish.backends.torch_grids import Weight, float_bias
from planish.backends.torch_lowering import Lowering
from planish.ir.ops import argument, aten, node_of

_MIDDLE = 128  # of uint8 codes


def integer_product(
    low: Lowering, node: Node, source: tuple[Node, Any, Any], weight: Weight
) -> Node:
    """A linear layer of codes, in real numbers.

    Args:
        low: on its way.
        node: the layer.
        source: uint8 codes of the activation, their scale and zero point: numbers, or nodes.
        weight: int8 codes.
    """
    codes, scale, zero = source
    inputs = node_of(node.args[0]).meta["val"].shape[-1]
    rows = low.cached(("int8 rows", codes), lambda: _signed_rows(low, codes, int(inputs)))
    across = low.call(aten.t.default, low.value(weight.codes))
    product = low.call(aten._int_mm.default, rows, across)
    shifted = low.call(aten.add.Tensor, product, _shift(low, weight, zero))
    real = low.call(aten.to.dtype, shifted, torch.float32)
    steps = _scale(low, weight, scale)
    bias = float_bias(low, argument(node, "bias"))
    made = (
        low.call(aten.mul.Tensor, real, steps)
        if bias is None
        else low.call(aten.addcmul.default, bias, real, steps)
    )
    return _as_before(low, node, made, codes)


def _signed_rows(low: Lowering, codes: Node, inputs: int) -> Node:
    """Codes less 128 as int8, one row for each vector: turning the highest bit over does that."""
    signed = low.call(aten.bitwise_xor.Scalar, low.call(aten.view.dtype, codes, torch.int8), -128)
    return low.call(aten.reshape.default, signed, [-1, inputs])


def _shift(low: Lowering, weight: Weight, zero: Any) -> Node:  # noqa: ANN401 - number or node
    held = low.program.constant(weight.codes)
    assert held is not None
    name, key = str(weight.codes.target), weight.codes.target
    if not isinstance(zero, Node):
        offset = low.cached(
            ("offset", key, zero), lambda: (_MIDDLE - zero) * held.sum(1, dtype=torch.int32)
        )
        return low.constant(f"{name}_offset", offset)
    sums = low.constant(
        f"{name}_sums", low.cached(("sums", key), lambda: held.sum(1, dtype=torch.int32))
    )
    return low.call(aten.mul.Tensor, low.call(aten.rsub.Scalar, zero, _MIDDLE), sums)


def _scale(low: Lowering, weight: Weight, scale: Any) -> Node:  # noqa: ANN401 - number or node
    name = str(weight.codes.target)
    key = ("int_mm scale", weight.codes.target, None if isinstance(scale, Node) else scale)
    if not isinstance(scale, Node):
        return low.constant(f"{name}_scale", low.cached(key, lambda: scale * weight.scale))
    steps = low.constant(f"{name}_scale", low.cached(key, lambda: weight.scale))
    return low.call(aten.mul.Tensor, scale, steps)


def _as_before(low: Lowering, node: Node, rows: Node, codes: Node) -> Node:
    """Rows in the layer's own shape; sizes that are not known are read from its operand's codes."""
    value = node.meta["val"]
    if value.dim() == 2:
        return rows
    sizes: list[Any] = [
        size if isinstance(size, int) else _size(low, codes, axis)
        for axis, size in enumerate(value.shape)
    ]
    return low.call(aten.reshape.default, rows, sizes)


def _size(low: Lowering, codes: Node, axis: int) -> Node:
    made: Node = low.cached(("size", codes, axis), lambda: low.call(aten.sym_size.int, codes, axis))
    return made
