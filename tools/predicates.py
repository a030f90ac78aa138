"""Predicates of ``planish bisect`` that need a model or a file: a metric, and a latency."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.passes.debug.predicates import Predicate, Verdict

if TYPE_CHECKING:
    from planish.tools.candidates import Candidate, Values

_LIMIT = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)(?P<unit>x|us|ms|s)?")
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class Metric(Predicate):
    """A score does not drop by more than so much.

    Args:
        function: takes the program as a module with the caller's own signature; returns the
            score, higher is better.
        max_drop: how much less than the original's score is still good.
        name: of the function, for the reader.
    """

    def __init__(
        self, function: Callable[[nn.Module], Any], max_drop: float, *, name: str = "the metric"
    ):
        self.function = function
        self.max_drop = max_drop
        self.name = name
        self.base = math.nan

    @property
    def text(self) -> str:
        """The bound."""
        return f"{self.name} drops by at most {self.max_drop:g}"

    def prepare(self, original: Program) -> Verdict:
        """Score the original.

        Raises:
            UsageError: the function fails, or returns something that is no number.
        """
        try:
            self.base = self._score(original)
        except UsageError:
            raise
        except Exception as error:  # the user's own code
            raise UsageError(
                f"{self.name} fails on the original program: {type(error).__name__}: {error}",
                hint="it is called with the optimized model, which takes the original's inputs",
            ) from error
        return Verdict(False, f"{self.name} {self.base:g}")

    def judge(self, program: Program) -> Verdict:
        """Score a program."""
        score = self._score(program)
        drop = self.base - score
        return Verdict(not drop <= self.max_drop, f"{self.name} {score:g}, a drop of {drop:g}")

    def _score(self, program: Program) -> float:
        from planish.model import OptimizedModule

        score = self.function(OptimizedModule(program))
        try:
            number = float(score)
        except (TypeError, ValueError):
            raise UsageError(
                f"{self.name} returned a {type(score).__name__}", hint="return one number"
            ) from None
        if math.isnan(self.base) and math.isnan(number):
            raise UsageError(f"{self.name} is not a number for the original program")
        return number


def read_limit(text: str) -> tuple[float, bool]:
    """Read ``1.1`` or ``1.1x`` (a ratio), ``800us``, ``12ms`` or ``0.5s`` (a duration).

    Returns:
        The ratio, or milliseconds; and whether it is a ratio.

    Raises:
        UsageError: another form, or a ratio that the original itself exceeds.
    """
    found = _LIMIT.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"{text!r} is neither a ratio nor a duration", hint="write 1.1, 1.1x, 12ms or 0.5s"
        )
    number, unit = float(found["number"]), found["unit"]
    if unit in _MILLISECONDS:
        return number * _MILLISECONDS[unit], False
    if number < 1.0:
        raise UsageError(
            f"the original itself is slower than {text} of its own time",
            hint="give a ratio of at least 1: 1.1 is ten percent slower than the original",
        )
    return number, True


class SlowerThan(Predicate):
    """The exported file is not slower than a limit, in the runtime that serves the target.

    The file of each program runs in alternation with that of the original, on the first sample.

    Args:
        limit: as ``read_limit`` takes it: a ratio to the original's time, or a duration.
        target: what to export for.
        threads: within an operator.
        rounds: timed rounds; both files run in each.
    """

    def __init__(self, limit: str, *, target: str, threads: int = 1, rounds: int = 40):
        self.limit, self.is_ratio = read_limit(limit)
        self.target = target
        self.threads = threads
        self.rounds = rounds
        self._folder = Path(tempfile.mkdtemp(prefix="planish-bisect-"))
        self._number = 0

    def __enter__(self) -> SlowerThan:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def text(self) -> str:
        """The limit."""
        much = f"{self.limit:g} times the original's" if self.is_ratio else f"{self.limit:g} ms"
        return f"the median time of the file for {self.target} is at most {much}"

    def prepare(self, original: Program) -> Verdict:
        """Export the original and time it, as a ratio against itself."""
        if not original.samples:
            raise UsageError(
                "the program has no sample inputs", hint="capture it with example inputs"
            )
        self._inputs: Values = {
            name: value.numpy() if isinstance(value, Tensor) else np.asarray(value)
            for name, value in zip(
                original.signature.tensor_names, original.samples[0], strict=True
            )
        }
        self._base = self._open(original)
        return self.judge(original)

    def judge(self, program: Program) -> Verdict:
        """Time a program's file beside the original's."""
        from planish.tools.timing import interleave

        candidate = self._open(program)
        both = [partial(c.run, self._inputs) for c in (self._base, candidate)]
        _, timing = interleave(both, rounds=self.rounds)
        slowdown = 1.0 / timing.ratio
        seen = (
            f"{timing.median_ms:.3g} ms, {slowdown:.2f} times the original's "
            f"(quartiles {1.0 / timing.high:.2f}-{1.0 / timing.low:.2f})"
        )
        return Verdict((slowdown if self.is_ratio else timing.median_ms) > self.limit, seen)

    def _open(self, program: Program) -> Candidate:
        from planish.backends.base import ExportOptions
        from planish.backends.registry import load_backend
        from planish.tools.candidates import open_candidate

        self._number += 1
        backend = load_backend(self.target)
        path = self._folder / f"{self._number}{backend.target.suffix}"
        backend.export(program, path, ExportOptions(verify=False))
        found = open_candidate(str(path), threads=self.threads)
        for file in self._folder.glob(path.name + "*"):  # it is in memory now
            file.unlink()
        return found
