"""Passes that no registry knows, with options of every type, for the tests of recipes and runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

import torch

from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult

aten = torch.ops.aten


class Score(Enum):
    MAGNITUDE = "magnitude"
    SPARSE_GPT = "sparse-gpt"


class Order(Enum):
    FIRST = 1
    LAST = 2


@dataclass(frozen=True)
class Where:
    include: tuple[str, ...] = ()
    depth: int | None = None
    inner: Where | None = None


@dataclass(frozen=True, kw_only=True)
class Everything(Pass):
    """Options of every type a recipe holds."""

    name: ClassVar[str] = "everything"
    contract: ClassVar[Contract] = Contract.EXACT

    text: str = "x"
    maybe_text: str | None = None
    count: int = 1
    ratio: float = 0.5
    maybe_ratio: float | None = None
    flag: bool = False
    number: int | float = 1
    anything: str | int | float | bool | None = None
    pattern: Literal["2:4", "1:2", "off", 4, True] = "2:4"
    score: Score = Score.MAGNITUDE
    order: Order | None = None
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (0, "")
    nested: tuple[tuple[float, ...], ...] = ()
    where: Where = Where()
    table: tuple[Where | str, ...] = ()

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class WithDict(Pass):
    """A dictionary option, and one that must be given."""

    name: ClassVar[str] = "with-dict"
    contract: ClassVar[Contract] = Contract.LOSSY

    bits: int
    ratios: dict[str, float]

    def __post_init__(self) -> None:
        if self.bits > 8:
            raise ValueError("more than 8 bits save nothing")

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class Unwritable(Pass):
    """An option that no recipe can hold."""

    name: ClassVar[str] = "unwritable"
    contract: ClassVar[Contract] = Contract.EXACT

    weight: torch.Tensor

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class Nameless(Pass):
    """Declares no name."""

    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


@dataclass(frozen=True, kw_only=True)
class SwapActivation(Pass):
    """Replace every relu; exact only where ``to`` is relu itself."""

    name: ClassVar[str] = "swap-activation"
    contract: ClassVar[Contract] = Contract.EXACT

    to: Literal["relu", "gelu", "double_relu", "clamp"] = "clamp"

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        for node in program.operators:
            if not is_op(node, aten.relu.default):
                continue
            with rewriter.site(f"relu-to-{self.to}", node) as allowed:
                if not allowed:
                    continue
                x = node.args[0]
                if self.to == "clamp":
                    new = rewriter.call(aten.clamp_min.default, (x, 0), like=node)
                elif self.to == "double_relu":
                    again = rewriter.call(aten.clamp_min.default, (x, 0), like=node)
                    new = rewriter.call(aten.clamp_min.default, (again, 0), like=node)
                else:
                    operator = getattr(aten, self.to).default
                    new = rewriter.call(operator, (x,), like=node)
                rewriter.replace(node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class RoundWeights(Pass):
    """Round all floating-point constants to multiples of ``step``: lossy."""

    name: ClassVar[str] = "round-weights"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset()

    step: float = 1 / 64

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        for node in program.graph.find_nodes(op="get_attr"):
            value = program.constant(node)
            assert value is not None
            if not value.is_floating_point():
                continue
            with rewriter.site("round", node) as allowed:
                if allowed:
                    rounded = (value / self.step).round() * self.step
                    new = rewriter.constant(rounded, str(node.target), like=node)
                    rewriter.replace(node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


@dataclass(frozen=True, kw_only=True)
class NeedsCalibration(RoundWeights):
    """Lossy, and refuses to guess."""

    name: ClassVar[str] = "needs-calibration"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})


@dataclass(frozen=True, kw_only=True)
class Calls(Pass):
    """Whatever a test wants to happen inside a pass."""

    name: ClassVar[str] = "calls"
    contract: ClassVar[Contract] = Contract.EXACT
    behavior: ClassVar[Callable[[Program, PassContext], Any]] = lambda p, c: PassResult(p)

    def run(self, program: Program, context: PassContext) -> PassResult:
        found: PassResult = type(self).behavior(program, context)
        return found


def calling(
    behavior: Callable[[Program, PassContext], Any],
    *,
    name: str = "calls",
    contract: Contract = Contract.EXACT,
    requires: frozenset[Fact] = frozenset(),
) -> Pass:
    """A pass that does what a function does."""
    fields = {
        "name": name,
        "contract": contract,
        "requires": requires,
        "behavior": staticmethod(behavior),
        "__module__": __name__,
    }
    cls: type[Pass] = type("Calls", (Calls,), fields)
    return dataclass(frozen=True, kw_only=True)(cls)()
