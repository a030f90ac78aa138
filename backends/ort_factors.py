"""What ``linear``, ``addmm`` and the products of two operands multiply and add."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from planish.backends.onnx_view import rank_of
from planish.ir.ops import argument, aten, is_op, node_of


@dataclass(frozen=True)
class Factors:
    """The operands of ``x @ weight + bias``.

    Attributes:
        x: ``[.., in]``.
        weight: ``[out, in]`` or ``[in, out]``; for a product, its right operand, whatever that is.
        bias: ``[out]``, or None.
        out_axis: which axis of the weight counts outputs: 0 for ``linear``, 1 for the others.
    """

    x: Node
    weight: Node
    bias: Node | None
    out_axis: int


def factors_of(node: Node) -> Factors | None:
    """What a linear or a product multiplies; None where it adds or scales in another way."""
    bias: Node | None = None
    if is_op(node, aten.addmm.default):
        if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
            return None
        bias, x, weight = (node_of(operand) for operand in node.args[:3])
    else:
        x, weight = (node_of(operand) for operand in node.args[:2])
        if is_op(node, aten.linear.default):
            bias = argument(node, "bias")
    if bias is not None and rank_of(bias) != 1:
        return None
    return Factors(x, weight, bias, 0 if is_op(node, aten.linear.default) else 1)
