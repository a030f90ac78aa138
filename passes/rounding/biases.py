"""Biases of quantized operators: what adding to one gives in its integers, and writing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.quantize.operands import (
    DEQUANTIZE,
    Operands,
    Slot,
    is_dequantized,
    operands_of,
    with_operands,
)
from planish.passes.quantize.weights import quantize_bias


def corrected(
    bias: Tensor | None, scale: Tensor | None, error: Tensor
) -> tuple[Tensor, Tensor] | None:
    """A bias with the mean error added.

    Args:
        bias: [C], float, or int32 where there is a scale; None for none.
        scale: of the integers, [C] or []; None for a float bias.
        error: [C], ``E[y] - E[y']``.

    Returns:
        The new bias, in the type of the old one (int32 if there was none but a scale), and what it
        really adds [C]; None where that changes nothing, or the integers do not fit.
    """
    if scale is None:
        old = torch.zeros_like(error) if bias is None else bias.double()
        new = (old + error).to(torch.float32 if bias is None else bias.dtype)
        added = new.double() - old
        # What is left after a correction is rounding; to correct that would never end.
        if float(added.abs().max()) <= 1e-5 * max(float(old.abs().max()), 1e-5):
            return None
        return new, added
    step = scale.double()
    held = torch.zeros_like(error) if bias is None else bias.double() * step
    codes = quantize_bias((held + error).float(), scale)
    if codes is None:
        return None
    added = codes.double() * step - held
    return None if bias is not None and torch.equal(codes, bias) else (codes, added)


@dataclass(frozen=True)
class NewBias:
    """A bias to be written.

    Attributes:
        value: [C], float or int32.
        added: [C], by how much it differs from the old one.
        scale: of the integers; None for a float bias.
    """

    value: Tensor
    added: Tensor
    scale: Tensor | None


def new_bias(program: Program, node: Node, error: Tensor) -> NewBias | None:
    """The bias of an operator with its mean error added; None to leave it."""
    operands = operands_of(node, program)
    assert isinstance(operands, Operands)
    name = "self" if operands.kind == "product" else "bias"
    old = argument(node, name)
    bias, scale = program.constant(old), None
    if is_dequantized(old):
        bias, scale = program.constant(old.args[0]), program.constant(old.args[1])
    elif bias is None:
        scale = _product_scale(program, node, operands, len(error))
    found = corrected(bias, scale, error)
    return None if found is None else NewBias(found[0], found[1], scale)


def _product_scale(
    program: Program, node: Node, operands: Operands, channels: int
) -> Tensor | None:
    """``s_x s_w`` [C], where both are constant and neither is of blocks."""
    x, w = (slot.read(node) for slot in operands.slots)
    if not (is_dequantized(x) and is_dequantized(w)) or w.kwargs.get("block_size"):
        return None
    scales = program.constant(x.args[1]), program.constant(w.args[1])
    if scales[0] is None or scales[1] is None or scales[0].numel() != 1:
        return None
    return (scales[0] * scales[1]).reshape(-1).expand(channels).contiguous()


def write_bias(rewriter: Rewriter, node: Node, new: NewBias) -> None:
    """Let an operator read its new bias."""
    program = rewriter.program
    operands = operands_of(node, program)
    assert isinstance(operands, Operands)
    name = "self" if operands.kind == "product" else "bias"
    old = argument(node, name)
    source = old.args[0] if is_dequantized(old) else old
    stem = str(source.target) if isinstance(source, Node) else f"{node.name}.bias"
    bias = rewriter.constant(new.value, stem, like=node)
    if is_dequantized(old):
        bias = rewriter.call(DEQUANTIZE, [bias, *old.args[1:]], old.kwargs, like=old)
    elif new.scale is not None:
        scale = rewriter.constant(new.scale, f"{stem}_scale", like=node)
        zero = torch.zeros_like(new.scale, dtype=torch.int32)
        parts = [bias, scale, rewriter.constant(zero, f"{stem}_zero_point", like=node)]
        bias = rewriter.call(DEQUANTIZE, parts, {"dtype": "int32", "axis": 0}, like=node)
    size = float(new.added.square().mean().sqrt())
    rewriter.note(f"its bias moved by {size:.3g} (root mean square)")
    rewriter.set_args(node, *with_operands(node, {Slot(name): bias}))
