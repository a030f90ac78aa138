"""Instruments that decide what runs: which passes, and which rewrite sites within them.

None of them may have no effect in silence: a name that the recipe lacks and a site that no rule
proposed are errors, a limit that denied nothing is a remark.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from planish.ir.changes import site_key
from planish.ir.errors import UsageError
from planish.passes.recipe import Recipe, step_text
from planish.passes.steps import Instrument, Run, Step

Named = tuple[int, str, str]  # number, name and recipe text of a step


def check_selection(
    recipe: Recipe,
    *,
    start_from: str | int | None = None,
    stop_after: str | int | None = None,
    disable: Sequence[str | int] = (),
) -> None:
    """Refuse names that cannot work with a recipe, before anything is run.

    Raises:
        UsageError: the recipe has no such pass, or the start lies behind the stop.
    """
    steps = [(i, p.name, step_text(p, i)) for i, p in enumerate(recipe.passes, 1)]
    for name in disable:
        _matching(steps, str(name), DisablePass.option)
    first = _matching(steps, str(start_from), StartFrom.option)[0] if start_from is not None else 1
    if stop_after is None:
        return
    last = _matching(steps, str(stop_after), StopAfter.option)[-1]
    if first > last:
        raise UsageError(
            f"cannot start from {start_from!r}, step {first}, and stop after {stop_after!r}, "
            f"step {last}: nothing would run",
            hint="the recipe runs " + ", ".join(f"{i} {name}" for i, name, _ in steps),
        )


class _Range(Instrument):
    """Runs the steps on one side of a named pass.

    Args:
        name: the pass, as the recipe writes it, or its number in the recipe, from 1.
    """

    option: str
    _pick: int  # which of several steps of the name

    def __init__(self, name: str | int):
        self.name = str(name)
        self._index = 0

    def before_pipeline(self, run: Run) -> None:
        """Find the step.

        Raises:
            UsageError: there is none; names the nearest.
        """
        found = _matching(_named(run), self.name, self.option)
        self._index = found[self._pick]
        if len(found) > 1:
            numbers = ", ".join(map(str, found))
            run.steps[self._index - 1].remark(
                f"it stands at steps {numbers}; {self.option} took step {self._index}"
            )

    def after_pipeline(self, run: Run) -> None:
        """Say that nothing ran, which nobody asks for.

        Raises:
            UsageError: the instruments together left out every pass.
        """
        if run.failure is None and not any(record.ran for record in run.records):
            raise UsageError(
                f"no pass was left to run: {self.option} chose step {self._index} of "
                f"{len(run.steps)}, and the rest was left out as well",
                hint="start before the step to stop after, and do not disable all between them",
            )


class StopAfter(_Range):
    """Run nothing after the last step of this name or number."""

    option = "stop-after"
    _pick = -1

    def should_run(self, step: Step) -> bool:
        """Whether the step is not behind the named one."""
        return step.index <= self._index


class StartFrom(_Range):
    """Run nothing before the first step of this name or number."""

    option = "start-from"
    _pick = 0

    def should_run(self, step: Step) -> bool:
        """Whether the step is not before the named one."""
        return step.index >= self._index


class DisablePass(Instrument):
    """Leave out every step of these names or numbers."""

    option = "disable-pass"

    def __init__(self, names: Iterable[str | int]):
        self.names = tuple(str(name) for name in ([names] if isinstance(names, str) else names))
        self._left_out: set[int] = set()

    def before_pipeline(self, run: Run) -> None:
        """Find the steps.

        Raises:
            UsageError: there is none of a name; names the nearest.
        """
        named = _named(run)
        self._left_out = {i for name in self.names for i in _matching(named, name, self.option)}

    def should_run(self, step: Step) -> bool:
        """Whether the step is not a named one."""
        return step.index not in self._left_out


class SiteLimit(Instrument):
    """Rewrite the first ``limit`` sites of the run and no more; remarks which was the last."""

    def __init__(self, limit: int):
        if limit < 0:
            raise UsageError(f"the limit of rewrite sites is {limit}", hint="0 rewrites nothing")
        self.limit = limit

    def before_pipeline(self, run: Run) -> None:
        """Set the limit."""
        run.context.sites.limit = self.limit

    def after_pipeline(self, run: Run) -> None:
        """Say where the limit cut, or that it did not."""
        ran = [step for step in run.steps if step.record.ran]
        if run.failure is not None or not ran:
            return
        count = run.context.sites.count
        if count <= self.limit:
            ran[-1].remark(f"the limit of {self.limit} rewrite sites denied none of {count}")
            return
        done = [(step, c) for step in ran for c in step.record.changes if c.number <= self.limit]
        if not done:
            ran[0].remark(f"the limit of rewrite sites is {self.limit}: all {count} were denied")
            return
        step, last = max(done, key=lambda pair: pair[1].number)
        step.remark(
            f"the limit of {self.limit} rewrite sites denied {count - self.limit}; the last done "
            f"is {last.number}, {site_key(last.rule, last.node)}"
        )


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
        if not unmet or run.failure is not None:
            return
        done = [site_key(c.rule, c.node) for record in run.records for c in record.changes]
        near = difflib.get_close_matches(unmet[0], done, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"no rule wanted to rewrite at {', '.join(unmet)}",
            hint=hint + "`planish run-pass` lists the sites of a pass",
        )


def _named(run: Run) -> list[Named]:
    return [(step.index, step.name, step.text) for step in run.steps]


def _matching(steps: Sequence[Named], name: str, option: str) -> list[int]:
    """The numbers of the steps of a name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    found = [
        index
        for index, own, text in steps
        if name in (own, text) or (name.isdecimal() and int(name) == index)
    ]
    if found:
        return found
    names = list(dict.fromkeys(own for _, own, _ in steps))
    near = difflib.get_close_matches(name, names, n=1)
    if not steps:
        hint = "it has no passes at all"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"it has steps 1 to {len(steps)}: {', '.join(names)}"
    raise UsageError(f"{option} names {name!r}, and the recipe has no such pass", hint=hint)
