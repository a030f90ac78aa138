"""What a run is made of: its steps, their records, and the instruments that watch them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from planish.ir.compare import Fidelity
from planish.ir.cost import Cost, cost
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Change
from planish.passes.base import Contract, OperatorError, Pass, PassContext, PassResult
from planish.passes.changed import outline
from planish.passes.recipe import Recipe


class Version:
    """One state of the program, kept without the values of its constants."""

    def __init__(self, program: Program):
        self._outline: Program | None = outline(program)

    @cached_property
    def cost(self) -> Cost:
        """What this state costs; computed when first asked for."""
        assert self._outline is not None
        found = cost(self._outline)
        self._outline = None
        return found


@dataclass(frozen=True)
class NodeError:
    """How far one rewrite of a lossy pass moved one value, over all batches.

    A rewritten constant has no error of its own: its rewrite counts at the operators that read it.

    Attributes:
        site: the number of the rewrite site.
        rule: which rule.
        node: name of the node in the program after the pass.
        replaces: name of the node in the program before, whose value it stands for.
        source: the user's source line, if known.
        own: error of this rewrite alone, fed with the values of the program before; other
            rewrites, also of other constants that the operator reads, have no part in it.
        local: the value against the program before the pass.
        cumulative: the value against the original program; None where that has no such value.
        constant: dotted name of the rewritten constant that the node reads, if that is the rewrite.
    """

    site: int
    rule: str
    node: str
    replaces: str
    source: str | None
    own: Fidelity
    local: Fidelity
    cumulative: Fidelity | None
    constant: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "site": self.site,
            "rule": self.rule,
            "node": self.node,
            "replaces": self.replaces,
            "constant": self.constant,
            "source": self.source,
            "own": self.own.to_dict(),
            "local": self.local.to_dict(),
            "cumulative": self.cumulative.to_dict() if self.cumulative is not None else None,
        }


@dataclass
class StepRecord:
    """What one pass did, as the pipeline and the instruments saw it.

    Attributes:
        index: position in the recipe, from 1.
        name: the pass.
        contract: exact or lossy.
        options: those that differ from their defaults, as recipe text.
        changes: what it rewrote; an edit that no rewriter recorded counts as one.
        refusals: what it declined, and why.
        seconds: wall time of the pass itself.
        ran: False where an instrument kept it from running.
        changed: whether the program is another one than before.
        sites: numbers of the first and the last rewrite site, or None where there was none.
        fidelity: outputs against the program before this pass, where measured.
        cumulative: outputs against the original program, where measured.
        node_errors: for a lossy pass, the error of every value it rewrote.
        operators: for a pass that measures operators one by one, what it measured.
        remarks: sentences for the reader.
        before: the state before the pass.
        after: the state after it.
    """

    index: int
    name: str
    contract: Contract
    options: str
    before: Version
    after: Version
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    seconds: float = 0.0
    ran: bool = False
    changed: bool = False
    sites: tuple[int, int] | None = None
    fidelity: Fidelity | None = None
    cumulative: Fidelity | None = None
    node_errors: tuple[NodeError, ...] = ()
    operators: tuple[OperatorError, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def cost(self) -> Cost:
        """Parameters, bytes and MACs after the pass."""
        return self.after.cost

    @property
    def cost_before(self) -> Cost:
        """Parameters, bytes and MACs before the pass."""
        return self.before.cost


@dataclass
class Step:
    """One pass of a run, as instruments meet it.

    Attributes:
        index: position in the recipe, from 1.
        pass_: the pass, with its options.
        text: the pass as a recipe writes it.
        label: how errors name it.
        run: the run it belongs to.
        record: filled in as the step goes on; instruments add to it.
        before: the program before the pass, which the pass never gets hold of; None until its turn.
        after: the program after it; None until the pass has returned one.
        planned: whether no instrument keeps it from running.
    """

    index: int
    pass_: Pass
    text: str
    label: str
    run: Run = field(repr=False)
    record: StepRecord = field(repr=False)
    before: Program | None = field(default=None, repr=False)
    after: Program | None = field(default=None, repr=False)
    planned: bool = True

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.pass_.name

    def remark(self, sentence: str) -> None:
        """Add a sentence for the reader."""
        self.record.remarks = (*self.record.remarks, sentence)
        self.run.context.remark(f"{self.name}: {sentence}")


@dataclass
class Run:
    """A recipe being run, or having been run.

    Attributes:
        original: the program as it was given; never edited.
        recipe: what runs.
        context: what the passes may look at.
        program: the current program, in the end the result.
        steps: one per pass of the recipe.
        floating: the latest program in which nothing was quantized; None where the run began with
            a quantized one.
        failure: what stopped the run, if anything did.
        seconds: wall time of the whole run, instruments included.
    """

    original: Program
    recipe: Recipe
    context: PassContext
    program: Program
    steps: tuple[Step, ...] = ()
    floating: Program | None = None
    failure: BaseException | None = None
    seconds: float = 0.0

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """One record per pass, in order."""
        return tuple(step.record for step in self.steps)


class Instrument:
    """Watches a run; subclasses override what they need.

    What ``before_pass`` began, either ``after_pass`` or ``after_failure`` ends, in reverse order
    of the instruments. An error raised in a hook stops the run.
    """

    def before_pipeline(self, run: Run) -> None:
        """The run begins; ``run.steps`` lists what is planned."""

    def should_run(self, step: Step) -> bool:
        """Whether a pass may run; asked once for every step, before the first pass."""
        return True

    def before_pass(self, step: Step) -> None:
        """``step.before`` is about to be handed, as a clone, to the pass."""

    def within_pass(self, step: Step, done: int, total: int) -> None:
        """The pass has read this many of all calibration batches; it may read them repeatedly."""

    def after_pass(self, step: Step, result: PassResult) -> None:
        """The pass returned; ``result`` is what the pipeline found to be true of it."""

    def after_failure(self, step: Step, error: BaseException) -> None:
        """The pass, or an instrument after it, raised; ``step.after`` is set if the pass returned.

        An error raised here becomes a note on the first one.
        """

    def after_pipeline(self, run: Run) -> None:
        """The run ended; ``run.failure`` says whether well."""
