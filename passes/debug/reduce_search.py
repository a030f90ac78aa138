"""The state of a reduction, and its stages; ``planish.passes.debug.reduce`` says in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from planish.ir.errors import PassError
from planish.ir.program import Program
from planish.passes.debug import reduce_steps as steps
from planish.passes.debug.reduce_ddmin import ddmin
from planish.passes.debug.reduce_values import Recorded
from planish.passes.debug.reduce_windows import halves, windows
from planish.passes.debug.subgraph import closure, induced, without

_ROUNDS = 4  # of ddmin and simplification; the second finds little, a third rarely anything
_ANCHORS = 8  # places to start from; messages may name many


@dataclass(frozen=True)
class Progress:
    """How far the search is.

    Attributes:
        stage: what was tried.
        before: operators before this stage.
        now: operators now.
        tries: programs tried so far, in all.
    """

    stage: str
    before: int
    now: int
    tries: int

    def to_dict(self) -> dict[str, str | int]:
        """For JSON."""
        return {"stage": self.stage, "before": self.before, "now": self.now, "tries": self.tries}


Tell = Callable[[Progress], None]
Fails = Callable[[Program], bool]


class SpentError(Exception):
    """All tries are spent; what was found so far stands."""


class Search:
    """The best program so far, and what was tried."""

    def __init__(self, program: Program, fails: Fails, tell: Tell | None, max_tries: int):
        self.program = program
        self.fails = fails
        self.tell = tell
        self.max_tries = max_tries
        self.tries = 0
        self.story: list[Progress] = []
        self.stage = "start"
        self.before = len(program.operators)
        self._root(program)

    def _root(self, program: Program) -> None:
        """Cut out of this program from now on: its types, outputs or samples are new."""
        self.whole = program
        self.program = program
        self.values = Recorded(program)
        self.tried: dict[frozenset[str], bool] = {}

    # -- trying -------------------------------------------------------------------------------

    def attempt(self, candidate: Program) -> bool:
        """Whether a program fails; counts."""
        if self.tries >= self.max_tries:
            raise SpentError
        self.tries += 1
        found = self.fails(candidate)
        if self.tell is not None:
            self.tell(self._progress())
        return found

    def keeps(self, keep: frozenset[str]) -> bool:
        """Whether these operators alone fail; if so and they are fewer, they are the best now."""
        if keep not in self.tried:
            try:
                candidate = induced(self.whole, keep, self.values)
            except PassError:  # the program fails before it has what these operators read
                self.tried[keep] = False
                return False
            self.tried[keep] = self.attempt(candidate)
            if self.tried[keep] and len(keep) < len(self.program.operators):
                self.program = candidate
        return self.tried[keep]

    def take(self, candidates: Iterable[Program | None]) -> bool:
        """Take the first of these programs that fails."""
        for candidate in candidates:
            if candidate is not None and self.attempt(candidate):
                self._root(candidate)
                return True
        return False

    def _progress(self) -> Progress:
        return Progress(self.stage, self.before, len(self.program.operators), self.tries)

    def open(self, stage: str) -> None:
        """Begin a stage."""
        self.stage, self.before = stage, len(self.program.operators)

    def close(self) -> None:
        """End a stage: it is part of the story."""
        self.story.append(self._progress())
        if self.tell is not None:
            self.tell(self.story[-1])

    # -- the stages ---------------------------------------------------------------------------

    def go(self, anchors: Sequence[str]) -> None:
        """All stages."""
        found = self.locate(anchors)
        self._root(self.program)
        changed = self.one_sample()
        changed = self.static() or changed
        if changed and not found:
            self.locate(anchors)
            self._root(self.program)
        for round_ in range(_ROUNDS):
            size = len(self.program.operators)
            self.minimize()
            settled = round_ > 0 and size == len(self.program.operators)
            if settled or not self.simplify():
                break

    def locate(self, anchors: Sequence[str]) -> bool:
        """Find a small part that fails: around the anchors, else by halves."""
        self.open("window")
        known = {node.name for node in self.whole.operators}
        starts = [name for name in dict.fromkeys(anchors) if name in known][:_ANCHORS]
        size = len(known)
        found = any(self.keeps(keep) for keep in windows(self.whole, starts) if len(keep) < size)
        if not found:
            self._halve()
        self.close()
        return len(self.program.operators) < size

    def _halve(self) -> None:
        """Go on with the first, the middle or the last half, as long as one of them fails."""
        current = [n.name for n in self.whole.operators]
        smaller: list[str] | None = current
        while smaller is not None:
            current = smaller
            smaller = next(filter(self._half_fails(current), halves(current)), None)

    def _half_fails(self, current: list[str]) -> Callable[[list[str]], bool]:
        def fails(half: list[str]) -> bool:
            keep = closure(self.whole, frozenset(half))
            return 0 < len(keep) < len(current) and self.keeps(keep)

        return fails

    def one_sample(self) -> bool:
        """Keep the first sample that shows the failure alone."""
        program = self.program
        if len(program.samples) < 2:
            return False
        self.open("samples")
        found = self.take(steps.only_sample(program, i) for i in range(len(program.samples)))
        self.close()
        return found

    def static(self) -> bool:
        """Put the sample's sizes in place of dynamic ones."""
        if not _is_dynamic(self.program):
            return False
        self.open("static sizes")
        found = self.take([steps.static(self.program)])
        self.close()
        return found

    def minimize(self) -> None:
        """``ddmin`` over the operators."""
        self.open("operators")
        whole = self.whole
        ddmin(
            [n.name for n in whole.operators],
            self.keeps,
            grown=lambda chunk: closure(whole, chunk),
            shrunk=lambda keep, drop: without(whole, keep, drop),
        )
        self._root(self.program)
        self.close()

    def simplify(self) -> bool:
        """Outputs, inputs, constants and samples; says whether any of it changed."""
        changed = False
        self.open("outputs")
        while self.take(steps.fewer_outputs(self.program)):
            changed = True
        self.close()
        self.open("inputs")
        for position in reversed(range(len(self.program.placeholders))):
            changed |= self.take([steps.without_input(self.program, position)])
        self.close()
        self.open("constants")
        for name in list(self.program.constants):
            changed |= self.take(steps.plainer_constants(self.program, name))
        self.close()
        self.open("sample values")
        for number, sample in enumerate(self.program.samples):
            for position in range(len(sample)):
                changed |= self.take(steps.plainer_samples(self.program, number, position))
        self.close()
        return changed


def _is_dynamic(program: Program) -> bool:
    """Whether any input has a size that is not a number."""
    for node in program.placeholders:
        value: Any = node.meta.get("val")
        if not isinstance(value, Tensor) or not all(isinstance(s, int) for s in value.shape):
            return True
    return False
