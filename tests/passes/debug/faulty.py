"""A pass that fails in the way its options say, for the tests of reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from planish.ir.execute import run
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Faulty(Pass):
    """Fails at a linear layer that reads a layer normalization.

    ``crash`` raises there; ``verifier`` claims a wrong type; ``numbers`` drops the bias.
    """

    name: ClassVar[str] = "faulty"
    contract: ClassVar[Contract] = Contract.EXACT

    how: Literal["crash", "verifier", "numbers"] = "crash"

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        for node in program.operators:
            if not is_op(node, aten.linear.default) or len(node.args) < 3:
                continue
            if not any(is_op(operand, aten.layer_norm.default) for operand in node.args):
                continue
            with rewriter.site("drop-bias", node) as allowed:
                if not allowed:
                    continue
                if self.how == "crash":
                    raise KeyError("planted")
                kept = 2 if self.how == "numbers" else 3
                new = rewriter.call(aten.linear.default, node.args[:kept], like=node)
                rewriter.replace(node, new)
                if self.how == "verifier":
                    new.meta["val"] = new.meta["val"].to(torch.float64)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class Calibrated(Pass):
    """Fails at an activation that is zero somewhere on the calibration data."""

    name: ClassVar[str] = "calibrated"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})

    def run(self, program: Program, context: PassContext) -> PassResult:
        assert context.calibration is not None
        zeros: set[str] = set()

        def look(node: Node, value: object) -> None:
            if isinstance(value, torch.Tensor) and bool((value == 0).any()):
                zeros.add(node.name)

        for batch in context.calibration:
            run(program, batch, observe=look)
        for node in program.operators:
            if is_op(node, aten.relu.default) and node.name in zeros:
                raise ZeroDivisionError(f"the scale of {node.name}")
        return PassResult(program)
