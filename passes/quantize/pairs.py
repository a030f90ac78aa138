"""Where a pair of quantize and dequantize stands, and which one is there already."""

from __future__ import annotations

import torch
from torch.fx import Node

from planish.ir.rewriter import Rewriter
from planish.passes.quantize.operands import QUANTIZE, is_dequantized
from planish.passes.quantize.ranges import Grid


def behind(value: Node) -> Node:
    """The node before which what reads a value can first stand."""
    behind = value.next
    while behind.op == "placeholder":
        behind = behind.next
    return behind


def existing_pair(value: Node, grid: Grid, rewriter: Rewriter) -> Node | None:
    """A pair of the value that an earlier pass has made with the same scale."""
    for codes in value.users:
        if codes.target is not QUANTIZE or codes.kwargs.get("dtype") != grid.scheme.dtype:
            continue
        scale = rewriter.program.constant(codes.args[1])
        if scale is None or scale.shape != grid.scale.shape or not torch.equal(scale, grid.scale):
            continue
        for pair in codes.users:
            if is_dequantized(pair):
                return pair
    return None
