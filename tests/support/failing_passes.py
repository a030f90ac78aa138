"""Passes that fail in every way a pass can, each importable by name, as a bundle needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.execute import run
from planish.ir.infer import infer
from planish.ir.ops import is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult

aten = torch.ops.aten


class BadRule(Rule):
    """Finds a relu and falls over it."""

    name = "bad-rule"
    roots = frozenset({aten.relu.default})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        return Match(node, {})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        raise KeyError(f"nothing is known of {match.root.name}")


@dataclass(frozen=True, kw_only=True)
class CrashInRule(Pass):
    """A rule raises."""

    name: ClassVar[str] = "crash-in-rule"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        return self.apply_rules(program, context, [BadRule()])


@dataclass(frozen=True, kw_only=True)
class Crash(Pass):
    """The pass itself raises."""

    name: ClassVar[str] = "crash"
    contract: ClassVar[Contract] = Contract.EXACT

    error: Literal["value", "none", "pass", "site"] = "value"

    def run(self, program: Program, context: PassContext) -> PassResult:
        if self.error == "none":
            return None  # type: ignore[return-value]
        if self.error == "pass":
            Rewriter(program, self.name, context.sites).note("outside of a site")
        if self.error == "site" and context.sites.count < 2:
            return PassResult(program)
        raise ValueError(f"the number {len(program.operators)} is not to its liking")


@dataclass(frozen=True, kw_only=True)
class WrongType(Pass):
    """Claims another type than the operator gives."""

    name: ClassVar[str] = "wrong-type"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        node = relu(program)
        with rewriter.site("mistype", node) as allowed:
            if allowed:
                new = rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)
                new.meta["val"] = new.meta["val"].double()
                rewriter.replace(node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class Wrong(Pass):
    """Replaces a relu by something that is not the same.

    ``numbers`` differs everywhere; ``elsewhere`` is right on the sample alone; ``size`` takes the
    sample's batch size for a constant; ``infinite`` divides by zero.
    """

    name: ClassVar[str] = "wrong"
    contract: ClassVar[Contract] = Contract.EXACT

    how: Literal["numbers", "elsewhere", "size"] = "numbers"

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        node = relu(program)
        with rewriter.site(self.how, node) as allowed:
            if allowed:
                rewriter.replace(node, getattr(self, f"_{self.how}")(program, rewriter, node))
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    def _numbers(self, program: Program, rewriter: Rewriter, node: Node) -> Node:
        return rewriter.call(aten.sigmoid.default, (node.args[0],), like=node)

    def _elsewhere(self, program: Program, rewriter: Rewriter, node: Node) -> Node:
        x = node.args[0]
        mean = rewriter.call(aten.mean.default, (x,), like=node)
        factor = rewriter.call(aten.div.Tensor, (mean, _mean_of(program, x)), like=node)
        again = rewriter.call(aten.relu.default, (x,), like=node)
        return rewriter.call(aten.mul.Tensor, (again, factor), like=node)

    def _size(self, program: Program, rewriter: Rewriter, node: Node) -> Node:
        zeros = torch.zeros(int(node.meta["val"].shape[0]), 1)  # makes torch fix the size
        floor = rewriter.constant(zeros, "floor")
        return rewriter.call(aten.maximum.default, (node.args[0], floor), like=node)


@dataclass(frozen=True, kw_only=True)
class Slightly(Pass):
    """Off by a part of the bound: right alone, wrong if done often enough."""

    name: ClassVar[str] = "slightly"
    contract: ClassVar[Contract] = Contract.EXACT

    part: float = 6e-5

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        node = relu(program)
        with rewriter.site("scale", node) as allowed:
            if allowed:
                scaled = rewriter.call(aten.mul.Tensor, (node.args[0], 1.0 + self.part), like=node)
                rewriter.set_args(node, (scaled,))
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class Infinite(Pass):
    """Lossy, and so much so that nothing is left."""

    name: ClassVar[str] = "infinite"
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        node = relu(program)
        with rewriter.site("divide", node) as allowed:
            if allowed:
                new = rewriter.call(aten.div.Tensor, (node.args[0], 0.0), like=node)
                rewriter.replace(node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class Behind(Pass):
    """Edits without the rewriter, and wrongly."""

    name: ClassVar[str] = "behind"
    contract: ClassVar[Contract] = Contract.EXACT

    how: Literal["numbers", "dead"] = "numbers"

    def run(self, program: Program, context: PassContext) -> PassResult:
        node = relu(program)
        if self.how == "numbers":
            node.target = aten.sigmoid.default
            return PassResult(program)
        with program.graph.inserting_before(program.output):
            dead = program.graph.call_function(aten.neg.default, (node,))
        dead.meta["val"] = infer(program, aten.neg.default, (node,))
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class Overwrite(Pass):
    """Writes into a tensor that the caller's model shares."""

    name: ClassVar[str] = "overwrite"
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, program: Program, context: PassContext) -> PassResult:
        for value in program.constants.values():
            if isinstance(value, Tensor):
                value.zero_()
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class Calibrated(Pass):
    """Fails for what it saw in the calibration inputs."""

    name: ClassVar[str] = "calibrated"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})

    def run(self, program: Program, context: PassContext) -> PassResult:
        assert context.calibration is not None
        largest = max(float(batch[0].max()) for batch in context.calibration)
        if largest > 100:
            raise OverflowError(f"{largest} is out of range, after {len(context.calibration)}")
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class Scored(Pass):
    """Fails for what the loss said."""

    name: ClassVar[str] = "scored"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOSS, Fact.LABELS})

    def run(self, program: Program, context: PassContext) -> PassResult:
        assert context.loss is not None
        assert context.labeled is not None
        for batch in context.labeled:
            raise ArithmeticError(str(context.loss((), batch)))
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class Upcast(Pass):
    """Compute in float32 what was half precision: lossy, and finer than before."""

    name: ClassVar[str] = "upcast"
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        for node in program.operators:
            if not is_op(node, aten.to.dtype) or node.args[1] is torch.float32:
                continue
            with rewriter.site("skip", node) as allowed:
                if allowed:
                    rewriter.replace(node, node.args[0])  # the source is float32
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class Unsaveable(Pass):
    """Leaves a program that runs, and that no file can hold."""

    name: ClassVar[str] = "unsaveable"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        for name, value in program.constants.items():
            if isinstance(value, Tensor):
                program.constants[name] = _Odd(value)
        return PassResult(program)


class _Odd(Tensor):
    """A tensor of a class that no file knows."""

    @staticmethod
    def __new__(cls, value: Tensor) -> _Odd:
        made: Any = Tensor._make_subclass(cls, value)
        return made


def relu(program: Program) -> Node:
    """The first activation of a program."""
    return next(n for n in program.operators if is_op(n, aten.relu.default, aten.gelu.default))


def _mean_of(program: Program, value: Any) -> float:
    """The mean of a value on the first sample."""
    seen: dict[Node, Tensor] = {}
    run(program, program.samples[0], observe=seen.__setitem__)
    return float(seen[value].mean())
