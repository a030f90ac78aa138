"""Quantized programs made by hand: pairs of quantize and dequantize planted in float ones."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.ir.verify import verify

ACTIVATION = QuantScheme(dtype="uint8", symmetric=False)
WEIGHT = QuantScheme(granularity="channel", axis=0, narrow=True)
LAYERS = (aten.linear.default, aten.conv2d.default)

quantize = torch.ops.planish.quantize.default
dequantize = torch.ops.planish.dequantize.default
dynamic_quantize = torch.ops.planish.dynamic_quantize.default


class Net(nn.Module):
    """A convolution and two linears, with something between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        y: Tensor = self.second(torch.relu(self.first(rows)))
        return y


def planted(
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    dynamic_shapes: Any = None,
    dynamic: bool = False,
    last: bool = False,
) -> Program:
    """A module whose linears and convolutions read quantized values and weights.

    Args:
        module: what to capture.
        args: the sample, which also gives the ranges.
        dynamic_shapes: as ``torch.export`` takes it.
        dynamic: choose the ranges of values when the program runs.
        last: quantize what each layer gives, too.
    """
    program = capture(module.eval().requires_grad_(False), args, dynamic_shapes=dynamic_shapes)
    ranges: dict[Node, Tensor] = {}
    inputs = dict(zip(program.placeholders, program.samples[0], strict=True))
    run(program, program.samples[0], observe=lambda n, v: ranges.update({n: v}))
    ranges.update(inputs)
    rewriter = Rewriter(program, "planted")
    for node in [n for n in program.operators if is_op(n, *LAYERS)]:
        with rewriter.site("planted", node):
            x: Any = node.args[0]
            pair = _dynamic(rewriter, x) if dynamic else _pair(rewriter, x, ranges[x])
            weight = _weight(rewriter, program, node)
            rewriter.set_args(node, (pair, weight, *node.args[2:]))
            if last:
                value = _after_relu(node)
                rewriter.insert_before(value.next)
                result = _pair(rewriter, value, ranges[value])
                ranges[result] = ranges[value]
                for user in [u for u in value.users if u is not result.args[0]]:
                    rewriter.set_args(user, [result if a is value else a for a in user.args])
    program = rewriter.finish()
    verify(program)
    return program


def _after_relu(node: Node) -> Node:
    users = list(node.users)
    return users[0] if len(users) == 1 and is_op(users[0], aten.relu.default) else node


def _pair(rewriter: Rewriter, x: Node, seen: Tensor) -> Node:
    scale, zero = ACTIVATION.qparams(seen.min(), seen.max())
    s, z = rewriter.constant(scale, f"{x.name}.s"), rewriter.constant(zero, f"{x.name}.z")
    codes = rewriter.call(quantize, (x, s, z), {"dtype": "uint8"}, like=x)
    return rewriter.call(dequantize, (codes, s, z), {"dtype": "uint8"}, like=x)


def _dynamic(rewriter: Rewriter, x: Node) -> Node:
    made = rewriter.call(dynamic_quantize, (x,), like=x)
    parts = [rewriter.call(operator.getitem, (made, i), like=x) for i in range(3)]
    return rewriter.call(dequantize, tuple(parts), {"dtype": "uint8"}, like=x)


def _weight(rewriter: Rewriter, program: Program, node: Node) -> Node:
    weight = program.constant(node.args[1])
    assert weight is not None
    scale, zero = WEIGHT.qparams_of(weight)
    name = str(node.args[1].target)  # type: ignore[union-attr]  # by the operator's schema
    codes = WEIGHT.quantize(weight, scale, zero)
    parts = [
        rewriter.constant(t, f"{name}.{n}") for t, n in ((codes, "q"), (scale, "s"), (zero, "z"))
    ]
    return rewriter.call(dequantize, tuple(parts), {"dtype": "int8", "axis": 0}, like=node)
