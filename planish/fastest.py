"""Choose among recipes by measurement, and hand over nothing slower than floating point.

A recipe with ``alternatives`` (``int8``) is a question: which of them is fastest here, and is it
faster than the recipe's own passes, which keep the model in floating point? It is answered so:

1. The recipe's own passes run and give the float file, which all others are compared with. Every
   alternative runs, is exported for the target, and has to keep its own bound (``keep-float``) on
   inputs that nothing was calibrated with; what fails is out, with the reason.
2. The files run in alternation, on one thread, on one calibration sample; the ratio of the fastest
   runs decides, and among files within a quarter of the fastest the fidelity. A few seconds.
3. Where the winner is not clearly faster than float, regions of it go back to floating point where
   that is faster: a region is a set of operators that hand each other integers, and regions of the
   same operators and shapes are tried together. First those that the runtime computes in float
   anyway, then the smallest. Each trial is a file, measured against the best so far.
4. What is still slower than float is not handed over: the float program is, and a remark says so.

The answer is a plain recipe without alternatives: that of the winner, where regions went back with
``keep-float{operators=[...]}`` behind it. Replaying it measures nothing and gives the same program.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from planish.ir.errors import (
    BoundError,
    NothingToDoError,
    PlanishError,
    RecipeError,
    RequirementError,
    UsageError,
)
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.quantize.islands import alike, islands
from planish.passes.quantize.keep_float import KeepFloat, kept_in_float
from planish.passes.quantize.outputs import Judge, Padding, Score
from planish.passes.quantize.restore import quantized_operators
from planish.passes.quantize.where import NoSuchOperatorError
from planish.passes.recipe import Recipe
from planish.passes.recipe_table import FLOOR
from planish.passes.steps import Run
from planish.race import Entrant, Race

if TYPE_CHECKING:
    from planish.backends.base import Artifact, Backend
    from planish.backends.ort_race import Speed

FLOAT = "float"
CLEAR = 1.15  # a winner faster than float by this is taken as it is
GAIN = 1.02  # a trial must be faster by this: less is noise
NEAR = 1.25  # of files within this of the fastest, the most exact is taken
_TRIALS = 10
_TRIAL_SECONDS = 90.0  # for all of them together
_RACE_SECONDS, _TRIAL_RACE_SECONDS = 4.0, 1.5
JUDGED = 16  # held-out batches that decide

_CALLERS = (RequirementError, UsageError, RecipeError, NoSuchOperatorError)  # theirs to mend

Start = Callable[[Recipe, str], Run]  # runs a recipe under a name and returns the run


@dataclass(frozen=True)
class Outcome:
    """What is handed over.

    Attributes:
        recipe: a plain one.
        run: of that recipe.
        race: for the report.
        remarks: sentences for the reader.
    """

    recipe: Recipe
    run: Run
    race: Race
    remarks: tuple[str, ...]


@dataclass
class _Candidate:
    entrant: Entrant
    recipe: Recipe
    run: Run
    artifact: Artifact


class Fastest:
    """One race.

    Args:
        program: as captured.
        recipe: with alternatives.
        start: runs a recipe.
        backend: writes the files.
        context: calibration, held-out inputs and metric.
        padding: what does not count in the outputs.
    """

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        start: Start,
        backend: Backend,
        context: PassContext,
        padding: Padding,
    ):
        self.program = program
        self.recipe = recipe
        self.start = start
        self.backend = backend
        self.context = context
        self.padding = padding
        self.remarks: list[str] = []
        self.inputs = _inputs(program, context)
        self._judge: Judge | None = None
        self._files = 0
        self._answers: dict[str, PlanishError] = {}  # of alternatives that can give no file

    def run(self) -> Outcome:
        """Run everybody and choose.

        Raises:
            RequirementError: an alternative needs data that was not given.
            NothingToDoError: no alternative finds anything to quantize.
            BoundError: none keeps the bound that the caller asks for.
        """
        with tempfile.TemporaryDirectory(prefix="planish-race-") as name:
            self.folder = Path(name)
            base = self._entered(replace(self.recipe, alternatives={}), FLOAT)
            assert isinstance(base, _Candidate)  # errors of the float file are everybody's
            found = [self._entered(recipe, name) for recipe, name in self._alternatives()]
            racing = [c for c in found if isinstance(c, _Candidate)]
            if found and len(self._answers) == len(found):
                raise self._all_out()
            speeds = self._speeds([base, *racing], _RACE_SECONDS)
            for candidate, speed in zip((base, *racing), speeds, strict=True):
                candidate.entrant = replace(candidate.entrant, speed=speed)
            winner, tried = self._chosen(base, racing)
        losers = [c.entrant if isinstance(c, _Candidate) else c for c in (base, *found)]
        return self._outcome(winner, [*losers, *tried])

    # -- entering -----------------------------------------------------------------------------

    def _alternatives(self) -> Iterator[tuple[Recipe, str]]:
        for name, text in self.recipe.alternatives.items():
            own = Recipe.parse(text)
            if own.alternatives:
                raise RecipeError(f"the alternative {name!r} has alternatives itself")
            yield replace(own, target=self.recipe.target, seed=self.recipe.seed), name

    def _entered(self, recipe: Recipe, name: str) -> _Candidate | Entrant:
        """Run and export a recipe, and judge its outputs; an entrant alone is out."""
        try:
            run = self.start(recipe, name)
            score = self._score(run.program) if name != FLOAT else None
            artifact = self._exported(run.program, verify=name != FLOAT)
        except PlanishError as error:
            # Missing data is the caller's to add, and what the float file fails by is no choice.
            if name == FLOAT or isinstance(error, _CALLERS):
                raise
            if isinstance(error, NothingToDoError) or (
                isinstance(error, BoundError) and _asked_for(recipe)
            ):
                self._answers[name] = error
            failed = "" if isinstance(error, BoundError) else "failed: "
            self.remarks.append(f"{name} is out of the race: {failed}{error.what}")
            return Entrant(name=name, verdict=f"{failed}{error.what}")
        entrant = Entrant(name=name, score=score, bytes=artifact.bytes)
        bounds = [p for p in recipe.passes if isinstance(p, KeepFloat) and p.bounded]
        missed = [p for p in bounds if score is not None and not p.holds(score)]
        if missed:
            verdict = f"its outputs keep only {score}; asked for: {missed[0].bounds}"
            if _asked_for(recipe):
                self._answers[name] = BoundError(verdict, hint="ask for less")
            self.remarks.append(f"{name} is out of the race: {verdict}")
            return replace(entrant, verdict=verdict)
        return _Candidate(entrant, recipe, run, artifact)

    def _all_out(self) -> PlanishError:
        """The error that no alternative can do what was asked for."""
        texts = "; ".join(f"{name}: {error.what}" for name, error in self._answers.items())
        missed = [e for e in self._answers.values() if isinstance(e, BoundError)]
        if missed:
            return BoundError(f"no alternative keeps the bound: {texts}", hint=missed[0].hint)
        hint = next(iter(self._answers.values())).hint
        return NothingToDoError(f"no alternative quantizes anything: {texts}", hint=hint)

    def _score(self, program: Program) -> Score:
        if self._judge is None:
            batches = self.context.held_out or self.context.calibration
            if batches is None:
                raise RequirementError(
                    "choosing by measurement requires calibrated",
                    hint="pass calibration=... : an iterable of inputs that look like real ones",
                )
            held = list(islice(batches, JUDGED))
            own = (self.context.metric, self.context.labeled)
            self._judge = Judge(self.program, held, self.padding, *own)
        return self._judge.score(program)

    def _exported(self, program: Program, *, verify: bool) -> Artifact:
        from planish.backends.base import ExportOptions

        self._files += 1
        path = self.folder / f"{self._files}{self.backend.target.suffix}"
        options = ExportOptions(verify=verify, choices=dict(self.recipe.choices) or None)
        return self.backend.export(program, path, options)

    # -- choosing -----------------------------------------------------------------------------

    def _speeds(self, candidates: Sequence[_Candidate], seconds: float) -> list[Speed]:
        from planish.backends.ort_race import race

        paths = [c.artifact.path for c in candidates]
        return race(paths, self.inputs, seconds=seconds, target=self.backend.target.name)

    def _chosen(
        self, base: _Candidate, racing: list[_Candidate]
    ) -> tuple[_Candidate, list[Entrant]]:
        """The one to hand over, and the variations that were tried."""
        if not racing:
            return base, []
        fastest = max(_ratio(c.entrant) for c in racing)
        # More exact, and slower than float, is no choice where something faster than float is.
        least = max(fastest / NEAR, min(fastest, 1.0))
        near = [c for c in racing if _ratio(c.entrant) >= least]
        best = max(near, key=_sqnr)
        tried: list[Entrant] = []
        if _ratio(best.entrant) < CLEAR:
            mixed = self._mixed(base, best)
            if mixed is not None:
                tried.append(mixed.entrant)
                best = mixed
        return (best if _ratio(best.entrant) >= 1.0 else base), tried

    def _mixed(self, base: _Candidate, best: _Candidate) -> _Candidate | None:
        """A variation with regions in floating point, if that is faster."""
        floating = best.run.floating
        if floating is None:
            return None
        program, path = best.run.program, best.artifact.path
        kept: frozenset[str] = frozenset()
        deadline = time.perf_counter() + _TRIAL_SECONDS
        for names in islice(self._regions(best), _TRIALS):
            if time.perf_counter() > deadline:
                self.remarks.append("not all regions were tried in floating point: out of time")
                break
            other = kept - names if names <= kept else kept | names
            trial = kept_in_float(program, floating, sorted(other))
            artifact = self._exported(trial, verify=False)
            if self._ratio_of(path, artifact.path) >= GAIN:
                kept, path = other, artifact.path
        order = [n.name for n in quantized_operators(program) if n.name in kept]
        if len(order) in (0, len(quantized_operators(program))):
            return None  # as it was, or nothing is left of it: that is the float file
        recipe = replace(
            best.recipe, passes=(*best.recipe.passes, KeepFloat(operators=tuple(order)))
        )
        name = f"{best.entrant.name}, mixed"
        mixed = self._entered(recipe, name)
        if not isinstance(mixed, _Candidate):
            return None
        _, speed = self._speeds([base, mixed], _RACE_SECONDS)
        mixed.entrant = replace(mixed.entrant, speed=speed, kept_float=tuple(order))
        return mixed

    def _regions(self, best: _Candidate) -> list[frozenset[str]]:
        """What to try: what runs in float anyway, whole regions, then operators of one kind."""
        program = best.run.program
        quantized = {n.name for n in quantized_operators(program)}
        floats = {use.node for use in best.artifact.kernels if use.kernel is None}
        found = [floats & quantized, *islands(program), *alike(program)]
        return [names for names in dict.fromkeys(map(frozenset, found)) if names]

    def _ratio_of(self, path: Path, other: Path) -> float:
        from planish.backends.ort_race import race

        name = self.backend.target.name
        speed = race([path, other], self.inputs, seconds=_TRIAL_RACE_SECONDS, target=name)[1]
        return min(speed.ratio, speed.median_ratio)

    def _outcome(self, winner: _Candidate, entrants: list[Entrant]) -> Outcome:
        """The verdicts in words."""
        taken = winner.entrant.name
        told = []
        for entrant in entrants:
            verdict = entrant.verdict
            if entrant.name == taken:
                verdict = "taken"
            elif not verdict and entrant.name != FLOAT:
                verdict = _lost(entrant, winner.entrant)
            told.append(replace(entrant, verdict=verdict))
        if taken == FLOAT:
            self.remarks.append(
                "NOTHING IS QUANTIZED: no file in integers was good enough and faster than the "
                "one in floating point here; "
                + "; ".join(f"{e.name}: {_result(e)}" for e in told if e.name != FLOAT)
            )
        elif winner.entrant.kept_float:
            count = len(winner.entrant.kept_float)
            self.remarks.append(
                f"{count} quantized operators went back to floating point, because that is faster "
                f"here: {', '.join(winner.entrant.kept_float[:8])}" + (", ..." * (count > 8))
            )
        race = Race(entrants=tuple(told), taken=taken)
        return Outcome(winner.recipe, winner.run, race, tuple(self.remarks))


def _asked_for(recipe: Recipe) -> bool:
    """Whether a bound of a recipe is the caller's, and not the one that ``int8`` has of itself."""
    floor = [p.bounds for p in Recipe.parse(FLOOR).passes if isinstance(p, KeepFloat)]
    return any(
        isinstance(p, KeepFloat) and p.bounded and p.bounds not in floor for p in recipe.passes
    )


def _ratio(entrant: Entrant) -> float:
    """How much faster than float."""
    assert entrant.speed is not None
    return entrant.speed.ratio


def _lost(entrant: Entrant, winner: Entrant) -> str:
    if _ratio(entrant) < 1.0:
        return "slower than float"
    if _ratio(entrant) > _ratio(winner):
        return f"little faster than {winner.name}, and less exact"
    return f"slower than {winner.name}"


def _sqnr(candidate: _Candidate) -> float:
    score = candidate.entrant.score
    assert score is not None  # every alternative was judged
    return score.fidelity.sqnr_db


def _result(entrant: Entrant) -> str:
    if entrant.speed is None:
        return entrant.verdict
    return f"{entrant.verdict} ({entrant.speed.ratio:.2f}x)"


def one_sample(program: Program, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Flat inputs cut to a batch of one, where the program takes batches of any size.

    The batch is the dynamic dimension that is the first axis of the first input that has one.
    Inputs without it stay whole; where it is an axis of anything else as well, all do.
    """
    sizes: list[list[str]] = [
        [str(size) for size in value.shape] if isinstance(value, Tensor) else []
        for value in (node.meta.get("val") for node in program.placeholders)
    ]
    ranges = program.signature.ranges
    first = next((dims[0] for dims in sizes if dims and not dims[0].isdecimal()), None)
    if first is None or any(first in dims[1:] for dims in sizes):
        return tuple(inputs)
    if ranges.get(first, (0, None))[0] > 1:
        return tuple(inputs)
    pairs = zip(sizes, inputs, strict=True)
    return tuple(value[:1] if dims and dims[0] == first else value for dims, value in pairs)


def _inputs(program: Program, context: PassContext) -> tuple[Any, ...]:
    """What the files are timed on: one real sample, where there are some."""
    if context.calibration is not None:
        return one_sample(program, next(iter(context.calibration)))
    if not program.samples:
        raise UsageError(
            "there are no inputs to measure speed with", hint="give example inputs or calibration"
        )
    return one_sample(program, program.samples[0])
