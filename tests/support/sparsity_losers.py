"""Passes that let go of a sparse weight, each in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult

aten = torch.ops.aten


class _Loser(Pass):
    contract: ClassVar[Contract] = Contract.LOSSY
    constant: ClassVar[str] = "q.weight"

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        for node in list(program.graph.find_nodes(op="get_attr")):
            if node.target == self.constant:
                with rewriter.site("lose", next(iter(node.users))) as allowed:
                    if allowed:
                        self.lose(rewriter, node)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    def lose(self, rewriter: Rewriter, source: Node) -> None:
        value = rewriter.program.constant(source)
        assert value is not None
        name = str(source.target)
        rewriter.replace(source, rewriter.constant(value.clone(), name, like=source))


@dataclass(frozen=True, kw_only=True)
class DropsClaim(_Loser):
    """The same zeros, and nobody says so any more."""

    name: ClassVar[str] = "drops-claim"


@dataclass(frozen=True, kw_only=True)
class Declares(_Loser):
    """The same, and it says that it does."""

    name: ClassVar[str] = "declares"
    gives_up_sparsity: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DropsCodes(_Loser):
    """The same with integers."""

    name: ClassVar[str] = "drops-codes"
    constant: ClassVar[str] = "q.codes"


@dataclass(frozen=True, kw_only=True)
class WritesDense(_Loser):
    """A new linear in place of the old, with a weight that has no zeros."""

    name: ClassVar[str] = "writes-dense"

    def lose(self, rewriter: Rewriter, source: Node) -> None:
        (linear,) = source.users
        value = rewriter.program.constant(source)
        assert value is not None
        weight = rewriter.constant(value + 0.01, "other", like=source)
        args = [linear.args[0], weight, *linear.args[2:]]
        new = rewriter.call(linear.target, args, like=linear)
        rewriter.replace(linear, rewriter.call(aten.mul.Tensor, [new, 1.0], like=linear))


@dataclass(frozen=True, kw_only=True)
class ComputesDense(_Loser):
    """A sparse constant, and a sum with a dense one that is read instead."""

    name: ClassVar[str] = "computes-dense"

    def lose(self, rewriter: Rewriter, source: Node) -> None:
        value = rewriter.program.constant(source)
        assert value is not None
        noise = rewriter.constant(torch.full_like(value, 0.01), "noise", like=source)
        rewriter.replace(source, rewriter.call(aten.add.Tensor, [source, noise], like=source))
