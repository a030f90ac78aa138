"""Instruments that decide what runs: which passes, and which rewrite sites within them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from planish.ir.errors import UsageError
from planish.passes.steps import Instrument, Run, Step


class _Range(Instrument):
    """Runs the steps on one side of a named pass.

    Args:
        name: the pass, as the recipe writes it, or its number in the recipe, from 1.
    """

    _option: str

    def __init__(self, name: str | int):
        self.name = str(name)
        self._index = 0

    def _find(self, run: Run) -> list[int]:
        return _matching(run, self.name, self._option)


class StopAfter(_Range):
    """Run nothing after the last step of this name or number."""

    _option = "stop after"

    def should_run(self, step: Step) -> bool:
        """Whether the step is not behind the named one."""
        return step.index <= self._find(step.run)[-1]


class StartFrom(_Range):
    """Run nothing before the first step of this name or number."""

    _option = "start from"

    def should_run(self, step: Step) -> bool:
        """Whether the step is not before the named one."""
        return step.index >= self._find(step.run)[0]


class DisablePass(Instrument):
    """Leave out every step of these names or numbers."""

    def __init__(self, names: Iterable[str | int]):
        self.names = tuple(str(name) for name in ([names] if isinstance(names, str) else names))

    def should_run(self, step: Step) -> bool:
        """Whether the step is not a named one."""
        return all(step.index not in _matching(step.run, n, "disable") for n in self.names)


class SiteLimit(Instrument):
    """Rewrite the first ``limit`` sites of the run and no more."""

    def __init__(self, limit: int):
        if limit < 0:
            raise UsageError(f"the limit of rewrite sites is {limit}", hint="0 rewrites nothing")
        self.limit = limit

    def before_pipeline(self, run: Run) -> None:
        """Set the limit."""
        run.context.sites.limit = self.limit


class ExcludeSites(Instrument):
    """Leave out single rewrite sites, named ``rule@node`` as reports and ``bisect`` name them."""

    def __init__(self, sites: Iterable[str]):
        self.sites = frozenset([sites] if isinstance(sites, str) else sites)
        for site in self.sites:
            rule, _, node = site.partition("@")
            if not rule or not node:
                raise UsageError(
                    f"{site!r} names no rewrite site",
                    hint="write RULE@NODE, for example fold-batch-norm@batch_norm_3",
                )

    def before_pipeline(self, run: Run) -> None:
        """Exclude the sites."""
        run.context.sites.excluded |= self.sites

    def after_pipeline(self, run: Run) -> None:
        """Say which of them never came up.

        Raises:
            UsageError: a site was excluded that no rule ever proposed, so that nothing was done.
        """
        unmet = sorted(self.sites - run.context.sites.denied)
        if unmet and run.failure is None:
            raise UsageError(
                f"no rule wanted to rewrite at {', '.join(unmet)}",
                hint="`planish run-pass` lists the sites of a pass",
            )


def _matching(run: Run, name: str, verb: str) -> list[int]:
    """The numbers of the steps of a name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    found = [
        step.index
        for step in run.steps
        if name in (step.name, step.text) or (name.isdigit() and int(name) == step.index)
    ]
    if not found:
        names = list(dict.fromkeys(step.name for step in run.steps))
        near = difflib.get_close_matches(name, names, n=1) or names[:1]
        raise UsageError(
            f"cannot {verb} {name!r}: the recipe has no such pass",
            hint=f"it has {len(run.steps)} steps; did you mean {near[0]!r}?" if near else None,
        )
    return found
