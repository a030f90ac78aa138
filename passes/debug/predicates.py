"""Predicates of a bisection: what it means that a program is bad, and the evidence.

A predicate is prepared with the original program, which must be good, and then judges others.
Some watch the run of a recipe instead: what they look for is an error that stops it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from planish.ir.compare import Fidelity, bounds_of, difference, measure, worst
from planish.ir.errors import PlanishError, UsageError
from planish.ir.probe import Reference
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.base import PassResult
from planish.passes.checking import CompareEach, VerifyEach, run_seeded
from planish.passes.debug.bisect_predicate import OnOutputs, Predicate, Verdict
from planish.passes.steps import Instrument, Step

_Seconds = dict[int, tuple[Program, Reference]]  # by identity; holding the program keeps it

__all__ = [
    "Crashes",
    "KeepsContract",
    "MaxAbs",
    "MinSqnr",
    "NonFinite",
    "Predicate",
    "Verdict",
]


class _Measured(OnOutputs):
    def judge(self, program: Program) -> Verdict:
        found: list[Fidelity] = []
        for name, reference, answer in self.inputs.pairs(program):
            try:
                found.append(measure(reference, answer))
            except UsageError as error:  # other shapes: nothing can be measured
                return Verdict(True, f"at {name}, {error.what}")
        fidelity = worst(found)
        assert fidelity is not None  # there is at least one sample
        return self._decide(fidelity)

    @abstractmethod
    def _decide(self, fidelity: Fidelity) -> Verdict:
        """Judge the worst of each metric."""


class MinSqnr(_Measured):
    """Every output keeps at least so many decibels of signal to noise; see ``OnOutputs``."""

    def __init__(self, decibels: float, **options: Any):  # noqa: ANN401 - those of OnOutputs
        super().__init__(**options)
        self.decibels = decibels

    @property
    def text(self) -> str:
        """The bound."""
        return f"SQNR of every output against the original is at least {self.decibels:g} dB"

    def _decide(self, fidelity: Fidelity) -> Verdict:
        return Verdict(not fidelity.sqnr_db >= self.decibels, f"SQNR {fidelity.sqnr_db:.1f} dB")


class MaxAbs(_Measured):
    """No output differs from the original's by more than this; see ``OnOutputs``."""

    def __init__(self, bound: float, **options: Any):  # noqa: ANN401 - those of OnOutputs
        super().__init__(**options)
        self.bound = bound

    @property
    def text(self) -> str:
        """The bound."""
        return f"no output differs from the original's by more than {self.bound:g}"

    def _decide(self, fidelity: Fidelity) -> Verdict:
        return Verdict(not fidelity.max_abs <= self.bound, f"max abs {fidelity.max_abs:.3g}")


class NonFinite(OnOutputs):
    """Outputs are finite wherever the original's are."""

    probe = True

    @property
    def text(self) -> str:
        """The demand."""
        return "outputs are finite where the original's are"

    def judge(self, program: Program) -> Verdict:
        """Count the values that are NaN or infinite where the original's are not."""
        names = self.original.signature.output_names
        for place, reference, answer in self.inputs.pairs(program):
            for name, b, a in zip(names, reference, answer, strict=True):
                count = _lost(b, a)
                if count:
                    return Verdict(True, f"{count} values of {name} are not finite at {place}")
        return Verdict(False, "all finite where the original is")


class Crashes(OnOutputs):
    """No pass raises, and every program runs on the samples and the second probe."""

    watches = True
    probe = True

    @property
    def text(self) -> str:
        """The demand."""
        return "no pass fails, and the program runs"

    def judge(self, program: Program) -> Verdict:
        """Run it."""
        for name, inputs in self.inputs:
            try:
                run_seeded(program, inputs, self.seed)
            except PlanishError as error:
                error.within(f"the program no longer runs on {name}")
                raise
        return Verdict(False, "it runs")

    def watchers(self) -> tuple[Instrument, ...]:
        """One that runs every program that changed."""
        return (_JudgeEach(self),)


class KeepsContract(OnOutputs):
    """The default verification: invariants, and outputs within the bound of every exact pass.

    Args:
        bounds: what each output may differ by; None takes those of the original program.
        options: those of ``OnOutputs``.
    """

    watches = True
    probe = True

    def __init__(
        self,
        *,
        bounds: tuple[float, ...] | None = None,
        **options: Any,  # noqa: ANN401 - those of OnOutputs
    ):
        super().__init__(**options)
        self._given = bounds
        self._seconds: _Seconds = {}

    @property
    def text(self) -> str:
        """The demand."""
        return "every pass keeps its contract"

    def prepare(self, original: Program) -> Verdict:
        """Verify the original."""
        verify(original)
        self.bounds = bounds_of(original) if self._given is None else self._given
        self._seconds = {}
        super().prepare(original)
        return Verdict(False, "it is a valid program, and runs")

    def judge(self, program: Program) -> Verdict:
        """Hold all passes together to the bound of one."""
        names = self.original.signature.output_names
        for name, reference, answer in self.inputs.pairs(program):
            problem = difference(reference, answer, names=names, bounds=self.bounds)
            if problem:
                return Verdict(True, f"at {name} {problem}")
        return Verdict(False, "equal within the bound")

    def watchers(self) -> tuple[Instrument, ...]:
        """Those of ``optimize``."""
        return (_Compare(self.bounds, self.seed, self._seconds), VerifyEach())


class _Compare(CompareEach):
    """``CompareEach`` for a part of a recipe, with the bounds of the whole run."""

    def __init__(self, bounds: tuple[float, ...], seed: int, seconds: _Seconds):
        super().__init__(seed=seed)
        self._given = bounds
        self._seconds = seconds

    def bounds(self, program: Program) -> tuple[float, ...]:
        """Those given."""
        return self._given

    def second(self, program: Program) -> Reference:
        """The second probe of a program, found only once."""
        if id(program) not in self._seconds:
            self._seconds[id(program)] = (program, super().second(program))
        return self._seconds[id(program)][1]


class _JudgeEach(Instrument):
    def __init__(self, predicate: Predicate):
        self.predicate = predicate

    def after_pass(self, step: Step, result: PassResult) -> None:
        if step.record.changed:
            self.predicate.judge(result.program)


def _lost(b: object, a: object) -> int:
    """How many values are not finite where the reference is."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0
    if not a.is_floating_point() and not a.is_complex():
        return 0
    wrong = ~a.isfinite()
    if a.shape == b.shape:
        wrong &= b.isfinite()
    elif not bool(b.isfinite().all()):
        return 0  # which value stands for which is unknown
    return int(wrong.sum())
