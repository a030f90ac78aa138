"""The instruments that hold every pass to its contract: invariants, and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from planish.ir.compare import Fidelity, bounds_of, difference, measure, worst
from planish.ir.errors import PlanishError, UsageError, VerificationError
from planish.ir.execute import Observer, run
from planish.ir.lockstep import is_random
from planish.ir.probe import Reference, second_reference
from planish.ir.program import Program
from planish.ir.symbols import Symbols
from planish.ir.textdiff import compare
from planish.ir.verify import verify
from planish.passes.base import Contract, PassResult
from planish.passes.debug.ancestry import Ancestry
from planish.passes.debug.attribution import Sweep, with_errors
from planish.passes.debug.lineage import stands
from planish.passes.sparse_claims import check_claims
from planish.passes.steps import Instrument, Run, Step
from planish.passes.unchanged import Proof

_SHOWN = 24  # lines of a diff in a message

_UNCOMPARED = "no outputs were compared: the program has no sample inputs"


class VerifyEach(Instrument):
    """Check every invariant of a program after each pass that changed it.

    Args:
        at_end: check only the result of the whole run.
    """

    def __init__(self, *, at_end: bool = False):
        self.at_end = at_end

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Verify what changed, and that sparse weights stayed typed so.

        Raises:
            VerificationError: an invariant is broken.
        """
        check_claims(step, result)  # even at_end: layouts come and go in between
        if step.record.changed and not self.at_end:
            verify(result.program, since=step.before)

    def after_pipeline(self, run: Run) -> None:
        """Verify the result, if asked for the end only."""
        if self.at_end and run.failure is None and run.program is not run.original:
            verify(run.program, since=run.original)


@dataclass
class _Probe:
    """Inputs, and what the programs so far answered there.

    ``original`` is the answer of the program the run began with, ``current`` of the latest one.
    """

    name: str
    inputs: tuple[Any, ...]
    original: tuple[Any, ...]
    current: tuple[Any, ...]
    measured: bool  # real data, on which an error means something
    inferred: bool = False  # ``current`` is that of a program before, proven to be the same


class CompareEach(Instrument):
    """Run each changed program and compare: exact passes must agree, lossy ones are measured.

    Every program runs once per probe; the probes are the samples and a second set of inputs at
    other legal sizes. What a lossy pass did is measured on the samples and on the first batches
    of the calibration data: at the outputs, of which the worst batch counts, and at every value it
    rewrote, over all batches together. For that the original, the program before and the one after
    run side by side, once each.

    Args:
        at_end: compare only the result of the whole run with the original.
        seed: of the second probe.
        batches: how many calibration batches a lossy pass is measured on.

    Attributes:
        reference: the second probe of the latest run; None where it has not come to that.
        answers: flat outputs of the original program and of the result, over all samples one after
            the other; None where nothing was compared.
    """

    def __init__(self, *, at_end: bool = False, seed: int = 0, batches: int = 8):
        self.at_end = at_end
        self.seed = seed
        self.batches = batches
        self.reference: Reference | None = None
        self.answers: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None

    def before_pipeline(self, run: Run) -> None:
        """Forget the run before."""
        self._probes: list[_Probe] | None = None
        self._bounds: tuple[float, ...] = ()
        self._rejected: tuple[str, ...] = ()
        self._lineage = Ancestry(run)
        self.reference = self.answers = None
        self._symbols = Symbols(run.original)
        self._told = False
        if run.steps:  # before any pass can write into what the original reads
            self._probes_of(run)

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Compare the program with the one before.

        Raises:
            VerificationError: an exact pass changed an output by more than the bound of its type,
                or nothing is there to measure a lossy pass with.
        """
        if not step.record.changed or self.at_end:
            return
        probes = self._probes_of(step.run)
        if not self._told:
            self._told = True
            for sentence in self._rejected:
                step.remark(f"the second probe was weakened: {sentence}")
            if not probes:
                step.remark(_UNCOMPARED)
        if step.pass_.contract is Contract.LOSSY:
            answers = self._measure(step, result, probes)
        else:
            answers = self._compare(step, result, probes)
        for probe, answer in zip(probes, answers, strict=True):
            probe.current = answer

    def _compare(
        self, step: Step, result: PassResult, probes: Sequence[_Probe]
    ) -> list[tuple[Any, ...]]:
        """Hold an exact pass to its promise; returns its answers."""
        notes = self._lineage.new_notes(step.index)
        proof = None
        if notes is None and step.before is not None:
            proof = Proof(step.before, result.program, result.changes)
        answers = []
        for number, probe in enumerate(probes):
            observe = notes.observe if notes is not None and number == 0 else None
            proven = proof is not None and proof.possible and proof.holds(probe.inputs)
            answers.append(
                probe.current if proven else self._answer(result.program, probe, observe)
            )
            probe.inferred = proven
        for probe, answer in zip(probes, answers, strict=True):
            problem = self._problem(step.run, probe, answer)
            if problem:
                raise _broken(step, result, probe, problem)
        pairs = [(p, a) for p, a in zip(probes, answers, strict=True) if p.measured]
        step.record.fidelity = worst([measure(p.current, a) for p, a in pairs])
        step.record.cumulative = worst([measure(p.original, a) for p, a in pairs])
        if self._lineage.wanted(step.index):
            assert step.before is not None
            found = stands(step.before, result.program, result.changes)
            self._lineage.follow(step, result.program, found, notes)
        return answers

    def _measure(
        self, step: Step, result: PassResult, probes: Sequence[_Probe]
    ) -> list[tuple[Any, ...]]:
        """Measure a lossy pass, at the outputs and at what it rewrote; returns its answers."""
        before, after, original = step.before, result.program, step.run.original
        assert before is not None
        found = stands(before, after, result.changes)
        sweep = Sweep(original, before, after, found, self._lineage.names, self.seed)
        local, total = [], []
        answers = []
        notes = self._lineage.new_notes(step.index)
        for number, probe in enumerate(probes):
            observe = notes.observe if notes is not None and number == 0 else None
            if probe.measured and sweep.rewritten:
                with _at(probe.name):
                    answer = sweep.run(probe.inputs, observe).after
            else:
                answer = self._answer(after, probe, observe)
            problem = _unusable(probe.current, answer)
            if problem:
                raise _broken(step, result, probe, problem)
            if probe.measured:
                local.append(measure(probe.current, answer))
                total.append(measure(probe.original, answer))
            answers.append(answer)
        for number, inputs in enumerate(islice(step.run.context.calibration or (), self.batches)):
            with _at(f"calibration batch {number}"):
                outputs = sweep.run(inputs)
            local.append(measure(outputs.before, outputs.after))
            total.append(measure(outputs.original, outputs.after))
        if not local:
            raise VerificationError(
                "it is lossy, and there is no input to measure its error on",
                hint="give the program sample inputs, or pass calibration=...",
            )
        record = step.record
        record.fidelity, record.cumulative = worst(local), worst(total)
        record.node_errors = sweep.errors()
        record.changes = with_errors(record.changes, record.node_errors)
        _remark_unmeasured(step)
        self._lineage.follow(step, after, found, notes)
        return answers

    def after_pipeline(self, run: Run) -> None:
        """Compare the result with the original.

        Raises:
            VerificationError: no pass was lossy, and an output differs: by one pass, or, where
                each was compared with the one before, by the sum of what all may change.
        """
        if run.failure is not None or run.program is run.original:
            return
        if self.at_end:
            self._compare_ends(run)
        else:
            self._run_inferred(run)
            self._drift(run)
        samples = [p for p in self._probes or () if p.measured]
        self.answers = (
            tuple(value for probe in samples for value in probe.original),
            tuple(value for probe in samples for value in probe.current),
        )
        self._probes = None  # nobody needs their inputs any more

    def _compare_ends(self, run: Run) -> None:
        lossy = [r.name for r in run.records if r.changed and r.contract is Contract.LOSSY]
        found: list[Fidelity] = []
        for probe in self._probes_of(run):
            answer = self._answer(run.program, probe)
            problem = (
                _unusable(probe.original, answer) if lossy else self._problem(run, probe, answer)
            )
            if problem:
                raise VerificationError(
                    f"the recipe changed what the program computes: at {probe.name} {problem}",
                    hint="verify='each' names the pass at fault",
                )
            if probe.measured:
                found.append(measure(probe.original, answer))
            probe.current = answer
        last = [step for step in run.steps if step.record.changed][-1]
        last.record.cumulative = worst(found)
        if not self._probes:
            last.remark(_UNCOMPARED)

    def _run_inferred(self, run: Run) -> None:
        """Run the result where its last passes were proven only: what is reported is measured."""
        for probe in self._probes or ():
            if not probe.inferred:
                continue
            answer = self._answer(run.program, probe)
            if problem := self._problem(run, probe, answer):
                raise VerificationError(
                    f"the passes kept what they touched, and at {probe.name} {problem}",
                    hint="a pass wrote into a tensor that it shares; `planish bisect` finds it",
                )
            probe.current = answer

    def _drift(self, run: Run) -> None:
        """Hold the last answers, of passes that each kept the bound, to the bound together."""
        if any(r.changed and r.contract is Contract.LOSSY for r in run.records):
            return
        names = run.original.signature.output_names
        for probe in self._probes or ():
            problem = difference(probe.original, probe.current, names=names, bounds=self._bounds)
            if problem:
                raise VerificationError(
                    f"each pass kept its bound, but not all together: at {probe.name} {problem}",
                    hint="leave one out: `planish run-pass` shows how far each moves the outputs",
                )

    def bounds(self, program: Program) -> tuple[float, ...]:
        """What each output may differ by; ``program`` is the original one."""
        return bounds_of(program)

    def second(self, program: Program) -> Reference:
        """The second probe; ``program`` is the original one."""
        with _seeded(program, self.seed):
            return second_reference(program, self.seed)

    def _probes_of(self, run: Run) -> list[_Probe]:
        """The probes with the original program's answers; made once."""
        if self._probes is None:
            program = run.original
            self._bounds = self.bounds(program)
            probes = []
            self._lineage.notes = notes = self._lineage.new_notes(0)
            for number, sample in enumerate(program.samples):
                observe = notes.observe if notes is not None and number == 0 else None
                answer = run_seeded(program, sample, self.seed, observe)
                name = "the sample inputs" if number == 0 else f"sample {number}"
                probes.append(_Probe(name, sample, answer, answer, measured=True))
            with self._symbols.restored():  # a pass may have fixed a size of all programs
                second = self.reference = self.second(program)
            self._rejected = second.rejected
            if second.inputs is not None:
                sizes = ", ".join(f"{k}={v}" for k, v in (second.sizes or {}).items())
                name = f"the second probe ({sizes})" if sizes else "the second probe"
                answer = second.outputs
                if second.rejected:
                    # Rejected attempts drew random numbers before this one, if it draws any.
                    answer = run_seeded(program, second.inputs, self.seed)
                probes.append(_Probe(name, second.inputs, answer, answer, measured=False))
            self._probes = probes
        return self._probes

    def _answer(
        self, program: Program, probe: _Probe, observe: Observer | None = None
    ) -> tuple[Any, ...]:
        with _at(probe.name):
            return run_seeded(program, probe.inputs, self.seed, observe)

    def _problem(self, run: Run, probe: _Probe, answer: tuple[Any, ...]) -> str | None:
        names = run.original.signature.output_names
        return difference(probe.current, answer, names=names, bounds=self._bounds)


@contextmanager
def _at(name: str) -> Iterator[None]:
    """A program that fails here ran on these inputs before the pass."""
    try:
        yield
    except VerificationError:
        raise
    except PlanishError as error:
        error.within(f"the program no longer runs on {name}")
        raise VerificationError(error.what, where=error.where) from error


def _broken(step: Step, result: PassResult, probe: _Probe, problem: str) -> VerificationError:
    return VerificationError(
        f"it is {step.pass_.contract.value}, and at {probe.name} {problem}",
        where=_where(step, result),
        hint="`planish bisect` names the rewrite at fault; until then leave the pass out of the "
        "recipe",
    )


def _remark_unmeasured(step: Step) -> None:
    """Name the rewrites whose error nobody will find in the table."""
    measured = {error.site for error in step.record.node_errors}
    left = [c for c in step.record.changes if c.number not in measured]
    if left:
        shown = ", ".join(f"{c.rule} at {c.node}" for c in left[:3])
        more = f", and {len(left) - 3} more" if len(left) > 3 else ""
        step.remark(
            f"{len(left)} of {len(step.record.changes)} rewrites left no value that could be "
            f"measured by itself: {shown}{more}"
        )


def run_seeded(
    program: Program, inputs: Sequence[Any], seed: int, observe: Observer | None = None
) -> tuple[Any, ...]:
    """Run a program; one that draws random numbers always draws the same, and nobody notices."""
    with _seeded(program, seed):
        return run(program, inputs, observe=observe)


@contextmanager
def _seeded(program: Program, seed: int) -> Iterator[None]:
    if not any(is_random(node) for node in program.operators):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _unusable(reference: tuple[Any, ...], answer: tuple[Any, ...]) -> str | None:
    """Say what even a lossy pass must not do."""
    try:
        found = measure(reference, answer)
    except UsageError as error:
        return error.what
    numbers: Iterable[Tensor] = (v for v in answer if isinstance(v, Tensor))
    if math.isinf(found.max_abs) and not all(bool(v.isfinite().all()) for v in numbers):
        return "an output is not finite where it was before"
    return None


def _where(step: Step, result: PassResult) -> str:
    """The rewrites of a step, and how its text changed."""
    assert step.before is not None
    sites = [
        f"{change.rule} at {change.node}" + (f" ({change.source})" if change.source else "")
        for change in result.changes[:3]
    ]
    if len(result.changes) > 3:
        sites.append(f"and {len(result.changes) - 3} more rewrites")
    lines = compare(step.before, result.program).brief(_SHOWN)
    return "\n".join(["; ".join(sites), *lines])
