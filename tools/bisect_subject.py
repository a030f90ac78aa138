"""What ``planish bisect`` looks into: a model and a recipe, or a bundle that holds both."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from planish.ir.changes import SiteCounter
from planish.ir.errors import UsageError

if TYPE_CHECKING:
    from planish.ir.program import Program
    from planish.passes.base import PassContext
    from planish.passes.calibrate import Spool
    from planish.passes.debug.bundle import Bundle
    from planish.passes.recipe import Recipe
    from planish.tools.console import Stages


@dataclass(frozen=True)
class Subject:
    """A program, its recipe, and what its passes may look at.

    Attributes:
        program: the original.
        recipe: what runs on it.
        target: what for.
        batches: calibration inputs.
        sites: how the numbering of rewrite sites begins, and which are left out.
        bounds: what each output may differ by; None takes those of the program.
        remarks: sentences for the reader.
    """

    program: Program
    recipe: Recipe
    target: str
    batches: Spool | None
    sites: SiteCounter
    bounds: tuple[float, ...] | None = None
    remarks: tuple[str, ...] = ()

    def context(self) -> PassContext:
        """A fresh context, for one run."""
        import torch

        from planish.backends.timer import TargetTimer
        from planish.passes.base import PassContext

        sites = replace(self.sites, denied=set())
        shared, held_out = self.batches.split() if self.batches is not None else (None, None)
        return PassContext(
            target=self.target,
            calibration=shared,
            held_out=held_out,
            generator=torch.Generator().manual_seed(self.recipe.seed),
            sites=sites,
            timer=TargetTimer(self.target),
        )


@dataclass(frozen=True)
class Wish:
    """What the command line says about the subject; None where it says nothing."""

    model: str
    recipe: str | None = None
    target: str | None = None
    calibration: str | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()

    @property
    def is_bundle(self) -> bool:
        """Whether MODEL is a bundle of ``planish repro``."""
        return (Path(self.model) / "repro.json").is_file()

    def load(self, stack: ExitStack, stage: Stages, *, on_batches: bool) -> Subject:
        """Load it.

        Args:
            stack: closes what must be closed.
            stage: told what is being done.
            on_batches: whether the predicate looks at calibration inputs.

        Raises:
            UsageError: there is no such model, recipe, pass or bundle, or an option has no use.
        """
        if self.is_bundle:
            return self._bundle(stack, stage)
        return self._model(stack, stage, on_batches=on_batches)

    def _model(self, stack: ExitStack, stage: Stages, *, on_batches: bool) -> Subject:
        from planish.passes.calibrate import needs_calibration, spool
        from planish.passes.recipe import resolve
        from planish.passes.selecting import ExcludeSites, check_selection
        from planish.tools.calibration import load_calibration
        from planish.tools.loading import load_model
        from planish.tools.options import CALIBRATION_BATCH, check_target, optimize_loaded

        default = "onnxruntime-cpu"
        recipe = resolve(self.recipe or "exact", target=self.target or default, seed=self.seed)
        if recipe.alternatives:
            raise UsageError(
                "the recipe chooses among others by measurement, so there is nothing to bisect",
                hint=f"bisect one of them: {', '.join(recipe.alternatives)}",
            )
        target = check_target(recipe.target or default, None)
        check_selection(recipe, disable=self.disable)
        ExcludeSites(self.exclude)
        if self.calibration is not None and not on_batches and not needs_calibration(recipe):
            raise UsageError(
                "--calibration has no use: no pass of the recipe needs it, and neither does what "
                "is asked for",
                hint="leave it out, or ask with --min-sqnr, --max-abs or --non-finite",
            )
        stage("loading")
        loaded = load_model(self.model)
        program = optimize_loaded(loaded, stage, recipe="none", target=target).program
        batches = None
        remarks = [
            f"the recipe names its own {name}, {own!r}; it was taken instead of {given!r}"
            for name, own, given in (
                ("target", recipe.target, self.target or recipe.target),
                ("seed", recipe.seed, self.seed or recipe.seed),
            )
            if own != given
        ]
        if self.calibration is not None:
            stage("reading the calibration data")
            given = load_calibration(self.calibration, CALIBRATION_BATCH)
            batches = stack.enter_context(spool(given, program, remark=remarks.append))
        sites = SiteCounter(excluded=frozenset(self.exclude))
        return Subject(program, recipe, target, batches, sites, remarks=tuple(remarks))

    def _bundle(self, stack: ExitStack, stage: Stages) -> Subject:
        from planish.passes.selecting import ExcludeSites, check_selection
        from planish.tools.bundles import open_bundle

        for name in ("recipe", "target", "calibration", "seed"):
            if getattr(self, name) not in (None, 0):
                raise UsageError(
                    f"--{name} is given, and the bundle brings its own", hint="leave it out"
                )
        stage("loading")
        bundle = open_bundle(Path(self.model))
        if bundle.facts.stage == "export":
            raise UsageError(
                "the bundle is of a failed export, in which no pass of a recipe took part",
                hint=f"planish repro {self.model}",
            )
        check_selection(bundle.recipe, disable=self.disable)
        ExcludeSites(self.exclude)
        counted = bundle.facts.sites
        excluded = frozenset((*counted.excluded, *self.exclude))
        return Subject(
            bundle.program,
            bundle.recipe,
            bundle.recipe.target or "onnx",
            _spooled(stack, bundle),
            SiteCounter(counted.limit, counted.count, excluded),
            bundle.facts.bounds,
        )


def _spooled(stack: ExitStack, bundle: Bundle) -> Spool | None:
    from planish.passes.calibrate import Spool

    if bundle.calibration is None:
        return None
    held = stack.enter_context(Spool(bundle.program))
    for inputs in bundle.calibration:
        held.add(inputs, sum(v.nbytes for v in inputs if isinstance(v, Tensor)))
    return held
