"""What a pass is: an immutable value with a contract, run on a private clone of the program."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from planish.ir.pattern import Refusal, Rule, rewrite_greedily
from planish.ir.program import Program
from planish.ir.rewriter import Change, Rewriter, SiteCounter

if TYPE_CHECKING:
    from planish.ir.compare import Fidelity
    from planish.passes.calibrate import Spool


class Contract(Enum):
    """What a pass promises about the function it rewrites."""

    EXACT = "exact"  # the same within the bound of the dtype; checked
    LOSSY = "lossy"  # changes it, and reports by how much


class Fact(Enum):
    """What a pass may require; the value is the sentence on what to add."""

    CALIBRATED = "pass calibration=... : an iterable of inputs that look like real ones"
    LABELS = "pass labeled=... : batches with labels, and loss=... to score them"
    LOSS = "pass loss=... : a function of (outputs, batch) that returns a scalar"


class Timer(Protocol):
    """Measures programs where they will be served."""

    def seconds(self, programs: Sequence[tuple[Program, Sequence[Any]]]) -> list[float]:
        """Seconds that one run of each takes, lowered to the target, on one thread.

        All are run in turns, so that what else the machine does falls on all alike.

        Args:
            programs: each with its flat inputs.

        Raises:
            PlanishError: one cannot be lowered, or the target runs nothing here.
        """
        ...


@dataclass
class PassContext:
    """What a pass may look at besides the program.

    Attributes:
        target: name of the target the program will be lowered to.
        calibration: the spooled calibration inputs, or None.
        held_out: calibration inputs that ``calibration`` does not have, to judge a result on; None
            where there are too few batches, or no pass asks for them.
        metric: ``metric(outputs, reference)``, higher is better, or None; both are what the model
            returns for one batch, ``reference`` in floating point. Where ``labeled`` is given, it
            is ``metric(model, labeled)`` instead, with a callable of the model's signature.
        float_program: gives a private clone of the latest program of the run in which nothing was
            quantized; None where there was no such program.
        labeled: a re-iterable of labeled batches, or None.
        loss: ``loss(outputs, batch)``, or None.
        generator: the only source of randomness a pass may use.
        remark: takes a sentence for the report.
        tell: takes (steps done, steps in all), first with 0, from a pass that takes long: batches
            of calibration inputs, weights, or both added up.
        sites: numbers the rewrite sites of the whole run.
        timer: measures small programs on the target, or None where nothing can run there.
    """

    target: str = "onnx"
    calibration: Spool | None = None
    held_out: Spool | None = None
    metric: Callable[[Any, Any], float] | None = None
    float_program: Callable[[], Program] | None = None
    labeled: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    remark: Callable[[str], None] = lambda sentence: None
    tell: Callable[[int, int], None] = lambda done, total: None
    sites: SiteCounter = field(default_factory=SiteCounter)
    timer: Timer | None = None

    def facts(self) -> frozenset[Fact]:
        """The facts that hold."""
        held = {
            Fact.CALIBRATED: self.calibration is not None,
            Fact.LABELS: self.labeled is not None,
            Fact.LOSS: self.loss is not None,
        }
        return frozenset(fact for fact, holds in held.items() if holds)


@dataclass(frozen=True)
class OperatorError:
    """What quantizing or pruning one operator, and nothing else, costs.

    Attributes:
        node: the operator.
        operator: its name in ATen, "linear".
        source: the user's source line, if known.
        own: its own output, fed with values in floating point.
        output_db: what that makes of the model's outputs: signal to noise in decibels.
        kept_float: whether it was therefore left in floating point.
        becomes: what was made of it instead: "50% zero" or "dense"; None for integers.
    """

    node: str
    operator: str
    source: str | None
    own: Fidelity
    output_db: float
    kept_float: bool = False
    becomes: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite ``output_db`` is None."""
        return {
            "node": self.node,
            "operator": self.operator,
            "source": self.source,
            "own": self.own.to_dict(),
            "output_db": self.output_db if math.isfinite(self.output_db) else None,
            "kept_float": self.kept_float,
            "becomes": self.becomes,
        }


@dataclass(frozen=True)
class PassResult:
    """What a pass returns. Whether anything changed is derived by the pipeline, not claimed.

    Attributes:
        program: the rewritten program.
        changes: what was rewritten.
        refusals: what was declined, and why.
        operators: for a pass that measures operators one by one, what it measured.
    """

    program: Program
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    operators: tuple[OperatorError, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A named rewrite of a program; its dataclass fields are its options.

    Class attributes:
        name: kebab-case, as recipes write it.
        contract: exact or lossy.
        requires: facts the pipeline checks before the pass runs; ``needs`` may ask for fewer.
        source: papers, "Author, Title, venue year, section".
        holds_out: whether it judges by calibration inputs that no other pass sees.
        gives_up_sparsity: whether it may let an operator whose weight was typed sparse read one
            that is not; every other pass that does is stopped.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    source: ClassVar[tuple[str, ...]] = ()
    holds_out: ClassVar[bool] = False
    gives_up_sparsity: ClassVar[bool] = False

    def needs(self) -> frozenset[Fact]:
        """The facts that this pass requires with the options it has: ``requires``, or fewer."""
        return self.requires

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite ``program`` in place (it is a private clone) and say what was done."""

    def apply_rules(
        self, program: Program, context: PassContext, rules: Sequence[Rule]
    ) -> PassResult:
        """The body of most passes: apply rules until none fires."""
        rewriter = Rewriter(program, self.name, context.sites)
        refusals = rewrite_greedily(program, rules, rewriter)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), refusals)
