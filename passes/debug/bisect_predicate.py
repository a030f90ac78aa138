"""What a predicate of a bisection is, and the inputs on which programs are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from planish.ir.errors import UsageError
from planish.ir.probe import second_reference
from planish.ir.program import Program
from planish.passes.checking import run_seeded
from planish.passes.steps import Instrument

_KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Verdict:
    """Whether a program is bad, and what was seen."""

    bad: bool
    text: str


class Predicate(ABC):
    """A question about a program.

    Attributes:
        watches: whether the run of a recipe itself answers, by an error of one of ``watchers()``
            or of a pass.
    """

    watches: ClassVar[bool] = False

    @property
    @abstractmethod
    def text(self) -> str:
        """What is demanded of a good program, for the reader."""

    @abstractmethod
    def prepare(self, original: Program) -> Verdict:
        """Look at the original program, which the others are judged against."""

    @abstractmethod
    def judge(self, program: Program) -> Verdict:
        """Look at a program.

        Raises:
            Exception: whatever running a broken program raises; that counts as bad.
        """

    def watchers(self) -> tuple[Instrument, ...]:
        """Instruments that stop a run at the first bad step; fresh ones for every run."""
        return ()


class Inputs:
    """The samples, the calibration batches and, if wanted, the second probe of a program."""

    def __init__(self, program: Program, batches: Iterable[Any], seed: int, *, probe: bool):
        if not program.samples:
            raise UsageError(
                "the program has no sample inputs", hint="capture it with example inputs"
            )
        self.program = program
        self.batches = batches
        self.seed = seed
        found = second_reference(program, seed).inputs if probe else None
        self.named: list[tuple[str, Sequence[Any]]] = [
            ("the sample inputs" if n == 0 else f"sample {n}", sample)
            for n, sample in enumerate(program.samples)
        ]
        if found is not None:
            self.named.append(("the second probe", found))
        self._kept: dict[int, tuple[Any, ...]] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Sequence[Any]]]:
        yield from self.named
        for number, batch in enumerate(self.batches):
            yield f"calibration batch {number}", batch

    def pairs(self, program: Program) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
        """Where, what the original answers there, and what ``program`` answers."""
        for number, (name, inputs) in enumerate(self):
            reference = self._kept.get(number)
            if reference is None:
                reference = run_seeded(self.program, inputs, self.seed)
                size = sum(v.nbytes for v in reference if isinstance(v, Tensor))
                if self._bytes + size <= _KEPT_BYTES:  # beyond, answers are computed again
                    self._kept[number] = reference
                    self._bytes += size
            yield name, reference, run_seeded(program, inputs, self.seed)


class OnOutputs(Predicate):
    """Compares outputs with the original's.

    Args:
        calibration: more inputs than the samples, flat; iterated for every program.
        seed: of programs that draw random numbers, and of the second probe.
    """

    probe: ClassVar[bool] = False

    def __init__(self, *, calibration: Iterable[Any] | None = None, seed: int = 0):
        self.calibration = calibration if calibration is not None else ()
        self.seed = seed

    def prepare(self, original: Program) -> Verdict:
        """Keep the original's inputs and answers, and judge the original itself."""
        self.inputs = Inputs(original, self.calibration, self.seed, probe=self.probe)
        self.original = original
        return self.judge(original)
