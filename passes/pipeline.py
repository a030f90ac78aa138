"""Run a recipe: every pass on a private clone, every result judged by what it is.

The pipeline decides what changed, stops at what is wrong, and tells instruments; it knows none of
them. They are called like a stack: the first is told first before a pass and last after it.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from planish.ir.errors import PassError, PlanishError, RequirementError
from planish.ir.infer import fake_constant, infer_node
from planish.ir.ops import op_name
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Change
from planish.ir.snapshot import Snapshot
from planish.ir.symbols import Symbols
from planish.passes.base import PassContext, PassResult
from planish.passes.changed import Untouched, differs, unrecorded
from planish.passes.recipe import Recipe, options_text, step_text
from planish.passes.registry import check_class
from planish.passes.steps import Instrument, Run, Step, StepRecord, Version

__all__ = ["OUTSIDE", "Instrument", "Run", "Step", "StepRecord", "run_pipeline"]

OUTSIDE = "edit-outside-the-rewriter"  # the rule of a change that no rewriter recorded


def run_pipeline(
    program: Program,
    recipe: Recipe,
    context: PassContext | None = None,
    instruments: Sequence[Instrument] = (),
) -> Run:
    """Run the passes of a recipe.

    Args:
        program: where to start; it is not edited.
        recipe: which passes, in which order.
        context: what passes may look at; None makes one from the recipe.
        instruments: the outermost first.

    Raises:
        RecipeError: an option of a pass cannot be written down.
        RequirementError: a pass needs something that the context lacks; says what to add.
        PassError: a pass failed, or returned something that is no result.
        PlanishError: whatever else a pass or an instrument raised, with the pass's name.
    """
    context = context or PassContext(target=recipe.target or "onnx")
    run = Run(program, recipe, context, program)
    run.steps = _plan(run)
    driver = _Driver(run, tuple(instruments))
    start = time.perf_counter()
    try:
        driver.go()
    finally:
        run.seconds = time.perf_counter() - start
    return run


def _plan(run: Run) -> tuple[Step, ...]:
    version = Version(run.original)
    for pass_ in run.recipe.passes:
        check_class(type(pass_))
    times = Counter(pass_.name for pass_ in run.recipe.passes)
    steps = []
    for index, pass_ in enumerate(run.recipe.passes, 1):
        label = f"pass {pass_.name}" + (f" (step {index})" if times[pass_.name] > 1 else "")
        options = options_text(pass_, index)
        record = StepRecord(index, pass_.name, pass_.contract, options, version, version)
        steps.append(Step(index, pass_, step_text(pass_, index), label, run, record))
    return tuple(steps)


_QUANTIZING = ("planish.quantize", "planish.dequantize", "planish.dynamic_quantize")


def _is_quantized(program: Program) -> bool:
    return any(op_name(node.target) in _QUANTIZING for node in program.operators)


class _Driver:
    """Runs the steps and calls the instruments."""

    def __init__(self, run: Run, instruments: tuple[Instrument, ...]):
        self.run = run
        self.instruments = instruments
        self.version = Version(run.original)
        self.shared = Snapshot(run.original)
        # A clone that a pass got and left as it was is still private: the next pass gets it.
        self.spare: Program | None = None
        self.handed: Untouched | None = None
        run.floating = None if _is_quantized(run.original) else run.original

    def go(self) -> None:
        entered: list[Instrument] = []
        failure: BaseException | None = None
        try:
            for instrument in self.instruments:
                instrument.before_pipeline(self.run)
                entered.append(instrument)
            for step in self.planned():
                self.step(step)
        except BaseException as error:  # also an interrupt: instruments must be told to clean up
            failure = self.run.failure = error
        for instrument in reversed(entered):
            try:
                instrument.after_pipeline(self.run)
            except BaseException as error:  # the others must still be told
                if failure is None:
                    failure = self.run.failure = error
                else:
                    _note(failure, instrument, error)
        if failure is not None:
            raise failure

    def planned(self) -> list[Step]:
        """The steps that run; each one's requirements hold."""
        for step in self.run.steps:
            step.planned = all(i.should_run(step) for i in self.instruments)
        planned = [step for step in self.run.steps if step.planned]
        facts = self.run.context.facts()
        for step in planned:
            missing = sorted(step.pass_.needs() - facts, key=lambda fact: fact.name)
            if missing:
                wanted = " and ".join(fact.name.lower() for fact in missing)
                raise RequirementError(
                    f"{step.label} requires {wanted}",
                    hint="; ".join(fact.value for fact in missing),
                )
        return planned

    def step(self, step: Step) -> None:
        step.before = self.run.program
        entered: list[Instrument] = []
        try:
            for instrument in self.instruments:
                instrument.before_pass(step)
                entered.append(instrument)
            result = self.run_pass(step)
            while entered:
                entered.pop().after_pass(step, result)
        except BaseException as error:
            if isinstance(error, PlanishError):
                error.within(step.label)
            while entered:
                instrument = entered.pop()
                try:
                    instrument.after_failure(step, error)
                except Exception as second:  # the first error is the one that must show
                    _note(error, instrument, second)
            raise
        self.run.program = result.program
        if result.program is not self.run.floating and not _is_quantized(result.program):
            self.run.floating = result.program
        # What a step held on to would keep every state of the constants in memory.
        step.before = step.after = None

    def run_pass(self, step: Step) -> PassResult:
        before, record, sites = self.run.program, step.record, self.run.context.sites
        first = sites.count + 1
        private = self.spare
        if private is None or self.handed is None:
            private = before.clone() if private is None else private
            self.handed = Untouched(private)
        self.spare = None
        result = self.call(step, private)
        record.operators = result.operators
        changed = False
        if not self.handed.holds(result.program):
            self.handed = None
            changed = differs(before, result.program)
        result = self.judge(step, result, changed)
        record.ran = True
        record.changed = result.program is not before
        record.changes, record.refusals = result.changes, result.refusals
        record.sites = (first, sites.count) if sites.count >= first else None
        step.after = result.program
        if record.changed:
            self.version = Version(result.program)
            self.shared = Snapshot(result.program)
        record.after = self.version
        for later in self.run.records[step.index :]:
            later.before = later.after = self.version
        return result

    def call(self, step: Step, private: Program) -> PassResult:
        """Run the pass itself and hold it to its signature."""
        run, before = self.run, self.run.program
        run.context.generator.manual_seed(_seed(run.recipe.seed, step.text))
        symbols = Symbols(before)
        start = time.perf_counter()
        try:
            result = step.pass_.run(private, self.context_of(step))
        except PlanishError:
            raise
        except Exception as error:  # whatever a pass may raise; all are reported alike
            raise PassError(
                f"it failed: {type(error).__name__}: {error}", where=_origin(error)
            ) from error
        finally:
            step.record.seconds = time.perf_counter() - start
            if symbols.restore():
                # Torch had fixed them for every program of the run, the caller's included.
                step.remark(
                    "it asked for dynamic sizes as if they were those of the sample; they "
                    "stay dynamic"
                )
        for name in self.shared.written():
            raise PassError(
                f"it wrote into {name}, which the caller's model shares and which is changed now",
                hint="make a new tensor and insert it with Rewriter.constant",
            )
        _check_result(result, before)
        result.program.absorb_module_edits()
        _type_new_nodes(result.program)
        return result

    def context_of(self, step: Step) -> PassContext:
        """What a pass may look at."""
        floating, given = self.run.floating, self.run.context.float_program

        def tell(done: int, total: int) -> None:
            self.run.context.tell(done, total)
            for instrument in self.instruments:
                instrument.within_pass(step, done, total)

        return replace(
            self.run.context,
            remark=step.remark,
            tell=tell,
            float_program=floating.clone if floating is not None else given,
        )

    def judge(self, step: Step, result: PassResult, changed: bool) -> PassResult:
        """Bring a result's claims into line with what happened to the program."""
        before, changes = self.run.program, result.changes
        if not changed:
            self.spare = result.program
            if changes:
                step.remark(f"it claimed {len(changes)} changes, but the program is the same")
            return PassResult(before, (), result.refusals)
        outside = unrecorded(before, result.program, changes)
        if changes and not outside:
            return result
        number = self.run.context.sites.take()
        shown = ", ".join(outside[:5]) + (", ..." if len(outside) > 5 else "")
        what = "it edited the program without the rewriter" + (f" ({shown})" if shown else "")
        if number is None:
            step.remark(f"{what}; that site is beyond the limit, so the whole pass was undone")
            return PassResult(before, (), result.refusals)
        step.remark(f"{what}; that counts as one site, and is verified like any other")
        change = _outside(number, step.name, before, result.program, outside)
        return PassResult(result.program, (*changes, change), result.refusals)


def _outside(
    number: int, pass_name: str, before: Program, after: Program, names: tuple[str, ...]
) -> Change:
    """The one change that stands for all edits of which the rewriter knows nothing."""
    old = {n.name for n in before.operators}
    new = [n.name for n in after.operators]
    added = tuple(name for name in new if name not in old and name in names)
    for node in after.operators:
        if node.name in added:
            node.meta.setdefault("from", (pass_name, OUTSIDE, ()))
    removed = tuple(name for name in names if name in old)
    first = (*added, *removed, *new, *old)[:1]
    return Change(number, OUTSIDE, first[0] if first else "output", removed, added)


def _type_new_nodes(program: Program) -> None:
    """Derive the types that an edit without the rewriter left out, so that it can be verified."""
    for node in program.nodes:
        if "val" in node.meta:
            continue
        if node.op == "call_function":
            node.meta["val"] = infer_node(program, node)
        elif (value := program.constant(node)) is not None:
            node.meta["val"] = fake_constant(program, value)


def _check_result(result: object, before: Program) -> None:
    if not isinstance(result, PassResult):
        raise PassError(
            f"it returned a {type(result).__name__}, not a PassResult",
            hint="end run() with: return PassResult(program, changes, refusals)",
        )
    if not isinstance(result.program, Program):
        raise PassError(f"its result holds a {type(result.program).__name__}, not a program")
    claims: tuple[tuple[type, object], ...] = (
        (Change, result.changes),
        (Refusal, result.refusals),
    )
    for kind, values in claims:
        if not isinstance(values, tuple) or not all(isinstance(v, kind) for v in values):
            raise PassError(f"its result holds something else than a tuple of {kind.__name__}s")
    after = result.program.signature
    if after is not before.signature and after != before.signature:
        raise PassError(
            "it changed the inputs or the outputs that the caller sees",
            hint="a pass rewrites what is between them; the signature stays",
        )


def _origin(error: Exception) -> str | None:
    """Where in the pass's code an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else None


def _note(failure: BaseException, instrument: Instrument, error: BaseException) -> None:
    kind = type(instrument).__name__
    failure.add_note(f"besides, {kind} failed: {type(error).__name__}: {error}")


def _seed(seed: int, text: str) -> int:
    """A pass draws the same numbers wherever it stands and whatever ran before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big")
