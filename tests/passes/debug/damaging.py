"""A chain of rectifiers, and a pass that replaces each of them, some of them wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.capture import capture
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.debug.bisect import Bisection

aten = torch.ops.aten

How = Literal[
    "scale", "undo", "nan", "crash", "match", "type", "write", "slow", "drift", "outside", "silent"
]


class Chain(nn.Module):
    """``x = relu(x + weight)``, again and again."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.weight = nn.Parameter(torch.full((4,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.length):
            x = torch.relu(x + self.weight)
        return x


def chain(length: int) -> Program:
    """The captured chain; its rectifiers are ``relu``, ``relu_1``, and so on."""
    return capture(Chain(length).eval(), (torch.linspace(0.0, 1.0, 8).reshape(2, 4),))


def chain_of_six() -> tuple[nn.Module, tuple[Tensor]]:
    """For the command line."""
    return Chain(6).eval(), (torch.linspace(0.0, 1.0, 8).reshape(2, 4),)


def least(model: nn.Module) -> float:
    """A score: how small the outputs stay."""
    x = torch.linspace(0.0, 1.0, 8).reshape(2, 4)
    return 1.0 - float(model(x).sum())


@dataclass(frozen=True, kw_only=True)
class Damage(Pass):
    """Rewrites every rectifier; those at the given positions go wrong.

    Attributes:
        at: positions along the chain, from 0.
        how: ``scale`` and ``undo`` multiply by 2 and by 1/2, ``drift`` by a little more than 1;
            ``nan`` takes the logarithm of negative numbers; ``crash`` raises within a site, and
            ``match`` before one; ``type`` claims a wrong type; ``write`` writes into a constant;
            ``slow`` adds much work; ``outside`` edits without the rewriter's knowledge, and
            ``silent`` with a rewriter that counts no sites.
        only: leave the other rectifiers alone.
    """

    name: ClassVar[str] = "damage"
    contract: ClassVar[Contract] = Contract.EXACT

    at: tuple[int, ...] = ()
    how: How = "scale"
    only: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        sites = None if self.how == "silent" else context.sites
        rewriter = Rewriter(program, self.name, sites)
        rectifiers = [
            n for n in program.operators if is_op(n, aten.relu.default, aten.clamp_min.default)
        ]
        for position, node in enumerate(rectifiers):
            wrong = position in self.at
            if self.only and not wrong:
                continue
            if wrong and self.how == "match":
                raise KeyError(node.name)
            if wrong and self.how == "outside":
                _double_behind_the_back(program, node)
                continue
            with rewriter.site("rectify", node) as allowed:
                if allowed:
                    self.rectify(program, rewriter, node, wrong=wrong)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    def rectify(self, program: Program, rewriter: Rewriter, node: Node, *, wrong: bool) -> None:
        if wrong and self.how == "crash":
            raise KeyError("planted")
        if wrong and self.how == "write":
            weight = program.constants["weight"]
            assert isinstance(weight, Tensor)
            weight.fill_(3.0)
        new = rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)
        factor = {"scale": 2.0, "silent": 2.0, "undo": 0.5, "drift": 1.00006, "nan": -1.0}
        if wrong and self.how in factor:
            new = rewriter.call(aten.mul.Tensor, (new, factor[self.how]), like=node)
        if wrong and self.how == "nan":
            new = rewriter.call(aten.log.default, (new,), like=node)
        if wrong and self.how == "slow":
            for _ in range(200):
                new = rewriter.call(aten.sin.default, (new,), like=node)
                new = rewriter.call(aten.asin.default, (new,), like=node)
        rewriter.replace(node, new)
        if wrong and self.how == "type":
            new.meta["val"] = new.meta["val"].to(torch.float64)


def _double_behind_the_back(program: Program, node: Node) -> None:
    operand = node.args[0]
    assert isinstance(operand, Node)
    with program.graph.inserting_before(node):
        doubled = program.graph.call_function(aten.mul.Tensor, (operand, 2.0))
    node.replace_input_with(operand, doubled)


def sound(found: Bisection) -> None:
    """What holds of every bisection: the budget, and that each look is told of."""
    for level in ("pass", "site", "confirm"):
        looks = [e for e in found.evaluations if e.level == level]
        assert [e.number for e in looks] == list(range(1, len(looks) + 1))
        assert all(e.number <= e.budget for e in looks)
