"""Replay a bundle: the same passes, watched by the same instruments, under the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from planish.ir.compare import bounds_of
from planish.ir.errors import PlanishError
from planish.ir.probe import Reference
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.checking import CompareEach, run_seeded
from planish.passes.debug.bundle_facts import machine, versions
from planish.passes.debug.bundle_failure import name_step
from planish.passes.debug.target_timer import target_timer
from planish.passes.steps import Instrument, Step

if TYPE_CHECKING:
    from planish.ir.changes import SiteCounter
    from planish.passes.calibrate import Spool
    from planish.passes.debug.bundle import Bundle


def replay(
    bundle: Bundle,
    program: Program | None = None,
    *,
    only_failing: bool = False,
    loss: Callable[[Any, Any], Tensor] | None = None,
    labeled: Iterable[Any] | None = None,
) -> BaseException | None:
    """Let a failure happen again; imports the passes that the recipe names as ``module:Class``.

    Args:
        bundle: what to replay.
        program: runs in place of the bundle's own; it is not edited. Where its inputs have other
            names, its own second probe is taken, and its samples take the place of calibration.
        only_failing: stop after the pass that failed; without effect where no single one did.
        loss: for a pass that needs it, since no bundle can hold a function.
        labeled: likewise, batches for ``loss``.

    Returns:
        The error, or None where none was raised. Compare ``failure_of(error).signature``.

    Raises:
        UsageError: the bundle is damaged, or a pass of its recipe cannot be imported.
    """
    subject = bundle.program if program is None else program
    if bundle.facts.stage == "export":
        return _replay_export(bundle, subject)
    from planish.passes.pipeline import run_pipeline
    from planish.passes.selecting import StopAfter

    recipe = bundle.recipe
    instruments = [_Naming(), *_instruments(bundle)]
    if only_failing and bundle.facts.stage == "pass":
        instruments.append(StopAfter(1))
    with ExitStack() as stack:
        calibration = _calibration(bundle, subject)
        if calibration is not None:
            stack.enter_context(calibration)
        context = PassContext(
            target=recipe.target or "onnx",
            calibration=calibration,
            labeled=labeled,
            loss=loss,
            generator=torch.Generator().manual_seed(recipe.seed),
            sites=_sites(bundle),
            timer=target_timer(recipe.target or "onnx"),
        )
        try:
            run_pipeline(subject, recipe, context, instruments)
        except Exception as error:  # whatever it is: it is what the caller asks for
            return error
    return None


def drift(bundle: Bundle) -> dict[str, tuple[str, str]]:
    """What differs between the machine of a bundle and this one: name -> (there, here)."""
    there = {**bundle.facts.versions, **bundle.facts.platform}
    here = {**versions(), **machine()}
    names = dict.fromkeys((*there, *here))
    pairs = {name: (there.get(name, "unknown"), here.get(name, "unknown")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


class PinnedCompare(CompareEach):
    """Compares as the run of a bundle did.

    In a replay the run begins with the program before the failing pass. The bounds, and the second
    probe, were those of the original program, which may be of another precision, or may refuse
    other sizes.
    """

    def __init__(self, bundle: Bundle):
        super().__init__(at_end=bundle.facts.verify == "end", seed=bundle.facts.seed)
        self._facts = bundle.facts
        probe = bundle.probe
        self._names = probe.names if probe is not None else ()
        self._inputs = next(iter(probe)) if probe is not None else None
        self._same = bundle.program

    def bounds(self, program: Program) -> tuple[float, ...]:
        """The bounds of the bundle; for another program none that is smaller than they allow."""
        pinned, own = self._facts.bounds, bounds_of(program)
        if pinned is None:
            return own
        if len(pinned) == len(own) and program.signature == self._same.signature:
            return pinned
        return tuple(max(bound, *pinned) if bound else 0.0 for bound in own) if pinned else own

    def second(self, program: Program) -> Reference:
        """The second probe of the bundle, where the program takes it."""
        if self._inputs is None or program.signature.tensor_names != self._names:
            return super().second(program)
        try:
            outputs = run_seeded(program, self._inputs, self.seed)
        except PlanishError:  # a reduced program may take other sizes under the same names
            return super().second(program)
        return Reference(self._inputs, outputs, self._facts.sizes, resized=True)


class _Naming(Instrument):
    """Writes on foreign errors in which pass they arose, as the run of the bundle did."""

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Write it."""
        name_step(error, step.label)


def _instruments(bundle: Bundle) -> list[Instrument]:
    from planish.passes.instruments import default_instruments

    facts = bundle.facts
    usual = default_instruments(verify=facts.verify, seed=facts.seed)
    return [PinnedCompare(bundle) if type(i) is CompareEach else i for i in usual]


def _sites(bundle: Bundle) -> SiteCounter:
    from planish.ir.changes import SiteCounter

    sites = bundle.facts.sites
    return SiteCounter(sites.limit, sites.count, frozenset(sites.excluded))


def _calibration(bundle: Bundle, program: Program) -> Spool | None:
    from planish.passes.calibrate import Spool

    batches = bundle.calibration
    if batches is None:
        return None
    held = Spool(program)
    fits = batches.names == program.signature.tensor_names
    for inputs in batches if fits else program.samples:
        held.add(inputs, sum(v.nbytes for v in inputs if isinstance(v, Tensor)))
    return held


def _replay_export(bundle: Bundle, program: Program) -> BaseException | None:
    """Emission lives in a layer above this one, which is looked up only here."""
    import importlib

    function = importlib.import_module("planish.failed_exports").replay_export
    found: BaseException | None = function(bundle, program)
    return found
