"""Run what a call of ``optimize`` asks for: one recipe, or a race between several."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import Contract, PassContext
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.quantize.outputs import Judge, Padding, Score
from planish.passes.quantize.ranges import padding_input
from planish.passes.recipe import Recipe

if TYPE_CHECKING:
    from planish.passes.instruments import CompareEach, Instrument
    from planish.race import Race

Answers = tuple[tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class HeldOut:
    """The result against the captured program, on inputs that nothing was calibrated with.

    Attributes:
        score: how near the outputs are.
        batches: on how many batches.
    """

    score: Score
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "batches": self.batches,
            "metric": self.score.metric,
            **self.score.fidelity.to_dict(),
        }


@dataclass(frozen=True)
class Ended:
    """What came out.

    Attributes:
        recipe: that made it; names no alternatives.
        run: of that recipe.
        answers: flat outputs of the captured program and of the result, over all samples.
        held_out: on inputs that were held out; None where nothing was lossy, or there are none.
        race: between recipes, where there was one.
        remarks: sentences for the reader.
    """

    recipe: Recipe
    run: Run
    answers: Answers
    held_out: HeldOut | None
    race: Race | None = None
    remarks: tuple[str, ...] = ()


@dataclass
class Runner:
    """Runs recipes on one captured program.

    Attributes:
        program: as captured.
        context: what passes may look at.
        verify: when to check.
        dump_dir: a folder for the program after every pass; each entrant of a race has one inside.
        instruments: the caller's; they watch every recipe that runs.
        seed: of everything random.
    """

    program: Program
    context: PassContext
    verify: Literal["each", "end", "off"]
    dump_dir: str | Path | None
    instruments: tuple[Instrument, ...]
    seed: int

    def __post_init__(self) -> None:
        self._compares: dict[int, CompareEach] = {}

    def result(self, recipe: Recipe, padding_mask: str | None) -> Ended:
        """Run a recipe, or the race that it asks for."""
        from planish.backends.registry import load_backend

        padding = Padding.named(self.program, padding_mask or padding_input(self.program))
        if not recipe.alternatives:
            finished = self.start(recipe, None)
            return self._ended(recipe, finished, padding)
        from planish.fastest import Fastest

        backend = load_backend(self.context.target)
        outcome = Fastest(self.program, recipe, self.start, backend, self.context, padding).run()
        ended = self._ended(outcome.recipe, outcome.run, padding)
        return Ended(
            ended.recipe, ended.run, ended.answers, ended.held_out, outcome.race, outcome.remarks
        )

    def start(self, recipe: Recipe, name: str | None) -> Run:
        """Run one recipe.

        Args:
            recipe: names no alternatives.
            name: of an entrant of a race; None where there is no race.
        """
        from planish.passes.debug.reproduce import Reproduce
        from planish.passes.instruments import CompareEach, default_instruments

        dump_dir = self.dump_dir
        if dump_dir is not None and name is not None:
            dump_dir = Path(dump_dir) / name.replace(", ", "-")
        watchers = default_instruments(verify=self.verify, dump_dir=dump_dir, seed=self.seed)
        compare = next((w for w in watchers if isinstance(w, CompareEach)), None)
        # First, so that it sees what all others raise.
        reproduce = Reproduce(dump_dir, verify=self.verify, seed=self.seed, compare=compare)
        finished = run_pipeline(
            self.program, recipe, self.context, (reproduce, *self.instruments, *watchers)
        )
        if compare is not None:
            self._compares[id(finished)] = compare
        return finished

    def _ended(self, recipe: Recipe, finished: Run, padding: Padding) -> Ended:
        compare = self._compares.get(id(finished))
        answers = compare.answers if compare is not None else None
        return Ended(
            recipe,
            finished,
            answers or _answers(self.program, finished.program),
            self._held_out(finished, padding),
        )

    def _held_out(self, finished: Run, padding: Padding) -> HeldOut | None:
        from planish.fastest import JUDGED

        lossy = any(r.changed and r.contract is Contract.LOSSY for r in finished.records)
        if not lossy or self.context.held_out is None:
            return None
        batches = list(islice(self.context.held_out, JUDGED))
        judge = Judge(self.program, batches, padding, self.context.metric, self.context.labeled)
        return HeldOut(judge.score(finished.program), len(batches))


def _answers(before: Program, after: Program) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Flat outputs of the captured and of the final program, over all samples."""
    reference: list[Any] = []
    outputs: list[Any] = []
    for sample in before.samples:
        answer = run(before, sample)
        reference.extend(answer)
        outputs.extend(answer if after is before else run(after, sample))
    return tuple(reference), tuple(outputs)
