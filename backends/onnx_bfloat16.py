"""Bfloat16 programs for runtimes that hold the type and compute with nothing of it.

ONNX Runtime converts float16 operators that it has no kernels for by itself; for bfloat16 it
refuses the file. So every bfloat16 operator is written in float32 between conversions: its result
is the float32 result, rounded, which is what the type promises. Weights stay in bfloat16, two
bytes each; a runtime that computes in bfloat16 can take the conversions out again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter

CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)


def computes_in_bfloat16(program: Program) -> bool:
    """Whether any operator but a conversion reads or gives bfloat16."""
    return any(_needs_float(node) for node in program.operators)


def in_float32(program: Program, remark: Callable[[str], None]) -> Program:
    """A copy whose bfloat16 operators compute in float32 between conversions.

    Args:
        program: any; one without such operators is returned as it is.
        remark: told that there were such operators.
    """
    if not computes_in_bfloat16(program):
        return program
    remark(
        "bfloat16 operators are written in float32 between conversions: ONNX Runtime on a CPU "
        "has no others, so the file is smaller and not faster there"
    )
    rewriter = Rewriter(program.clone(), "bfloat16-in-float32")
    for node in [n for n in rewriter.program.operators if _needs_float(n)]:
        with rewriter.site("widen", node):
            _widen(rewriter, node)
    return rewriter.finish()


def _needs_float(node: Node) -> bool:
    if is_op(node, *CONVERSIONS, operator.getitem):
        return False  # a part of a tuple goes with the operator that gives it
    return any(_is_brain(n.meta.get("val")) for n in (node, *node.all_input_nodes))


def _is_brain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_brain(part) for part in value)
    return isinstance(value, Tensor) and value.dtype is torch.bfloat16


def _widen(rewriter: Rewriter, node: Node) -> None:
    """Compute a node in float32, and give its users bfloat16 back."""

    def wide(argument: Node) -> Node:
        if not _is_brain(argument.meta.get("val")):
            return argument
        return rewriter.call(aten.to.dtype, (argument, torch.float32), like=node)

    def plain(argument: Any) -> Any:  # noqa: ANN401 - whatever the operator takes
        return torch.float32 if argument is torch.bfloat16 else argument

    value = node.meta["val"]
    args: Any = map_arg(node.args, wide)
    kwargs: Any = {k: plain(v) for k, v in map_arg(dict(node.kwargs), wide).items()}
    made = rewriter.call(node.target, tuple(plain(a) for a in args), kwargs, like=node)
    if not isinstance(value, (tuple, list)):
        result = made
        if _is_brain(value):
            result = rewriter.call(aten.to.dtype, (made, torch.bfloat16), like=node)
        rewriter.replace(node, result)
        return
    for user in list(node.users):
        part = rewriter.call(user.target, (made, user.args[1]), like=user)
        if _is_brain(user.meta["val"]):
            part = rewriter.call(aten.to.dtype, (part, torch.bfloat16), like=user)
        rewriter.replace(user, part)
