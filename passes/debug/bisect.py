"""``bisect``: find the pass, then the rewrite, that turns a good program into a bad one.

One run of the recipe keeps the program after every pass that changed something; the predicate
looks at those. Then only the guilty pass is run again, on the program before it, with a limit on
its rewrite sites. At last the whole recipe runs without the site that was found. Every level looks
at no more programs than ``ceil(log2(N)) + 1``, unless ``exhaustive`` is wished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from planish.ir.errors import PassError, UsageError, VerificationError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.debug.bisect_ledger import Ledger
from planish.passes.debug.bisect_predicate import Predicate, Verdict
from planish.passes.debug.bisect_result import Bisection, Evaluation, Tell
from planish.passes.debug.bisect_runs import Attempt, State
from planish.passes.debug.bisect_search import search
from planish.passes.debug.bisect_site import Culprit, site_level
from planish.passes.debug.bisect_task import Task
from planish.passes.debug.target_timer import target_timer
from planish.passes.recipe import Recipe

__all__ = ["Bisection", "Evaluation", "bisect"]


def bisect(
    program: Program,
    recipe: Recipe,
    predicate: Predicate,
    *,
    context_factory: Callable[[], PassContext] | None = None,
    tell: Tell | None = None,
    working: Callable[[str], None] = lambda what: None,
    exhaustive: bool = False,
    disabled: Sequence[str | int] = (),
) -> Bisection:
    """Find what makes a predicate fail.

    Args:
        program: the original, for which the predicate holds; it is not edited.
        recipe: what turns it bad.
        predicate: see ``planish.passes.debug.predicates``; it is prepared here.
        context_factory: makes the context of a run; called for every run. Sites that its counter
            excludes are left out of all runs. None makes one from the recipe.
        tell: told of every evaluation, after it.
        working: told what is about to be done, before anything slow.
        exhaustive: look at every pass and every site, whatever that costs.
        disabled: steps to leave out of every run, by name or number.

    Raises:
        UsageError: the original program is bad already, or has no sample inputs; or nothing is
            there to be left out where that was wished.
        RequirementError: a pass needs something that the context lacks.
        PlanishError: what the predicate itself raises: the original cannot be exported.
    """
    make = context_factory or (lambda: _context(recipe))
    task = Task(
        program,
        recipe,
        predicate,
        make,
        Ledger(tell, exhaustive=exhaustive),
        working,
        exhaustive,
        watching=predicate.watches,
        disabled=tuple(disabled),
    )
    return _Bisector(task).go()


def _context(recipe: Recipe) -> PassContext:
    target = recipe.target or "onnx"
    generator = torch.Generator().manual_seed(recipe.seed)
    return PassContext(target=target, generator=generator, timer=target_timer(target))


class _Bisector:
    def __init__(self, task: Task):
        self.task = task
        self.ends_bad = True  # whether the result of the whole recipe is

    def go(self) -> Bisection:
        task = self.task
        self.baseline()
        task.working("running the recipe")
        whole = task.run(task.recipe)
        self.check_excluded(whole)
        if whole.failed is not None and whole.failed.spoiled and not task.watching:
            task.watching = True
            task.ledger.remarks.append(
                f"pass {whole.failed.pass_.name} wrote into constants that the original program "
                "reads: outputs tell nothing any more, so its error is what was looked for"
            )
        guilty = self.pass_level(whole)
        if guilty is None:
            return self.answer(found=False)
        culprit = site_level(task, guilty)
        self.confirm(guilty, culprit)
        times = [pass_.name for pass_ in task.recipe.passes].count(guilty.pass_.name)
        name = guilty.pass_.name if times == 1 else str(guilty.step)
        options = [f"--exclude {culprit.key}"] if culprit.key else []
        return self.answer(
            found=True,
            step=guilty.step,
            pass_name=guilty.pass_.name,
            options=(*options, f"--disable-pass {name}"),
            **vars(culprit),
        )

    def answer(self, **fields: object) -> Bisection:
        return Bisection(
            predicate=self.task.predicate.text,
            evaluations=tuple(self.task.ledger.evaluations),
            monotone=self.task.ledger.monotone,
            remarks=tuple(self.task.ledger.remarks),
            **fields,  # type: ignore[arg-type]  # the fields of a Bisection
        )

    def baseline(self) -> None:
        task = self.task
        task.working("looking at the original program")
        try:
            verdict = task.predicate.prepare(task.program)
        except (PassError, VerificationError) as error:
            verdict = Verdict(True, error.what)
        text = f"the original program: {verdict.text}"
        total = len(task.recipe.passes)
        task.ledger.take(Evaluation("baseline", 0, total, verdict.bad, text, seen=verdict.text))
        if verdict.bad:
            raise UsageError(
                f"the original program is bad already: {verdict.text}",
                hint=f"ask for what it keeps; asked for was: {task.predicate.text}",
            )

    def check_excluded(self, whole: Attempt) -> None:
        """Refuse a site to leave out that never came up."""
        unmet = ", ".join(sorted(whole.sites.excluded - whole.sites.denied))
        if unmet and whole.error is not None:
            self.task.ledger.remarks.append(f"the run ended before a rule wanted to do {unmet}")
        elif unmet:
            raise UsageError(
                f"no rule wanted to rewrite at {unmet}",
                hint="`planish run-pass` lists the sites of a pass",
            )

    def pass_level(self, whole: Attempt) -> State | None:
        """The first step that turns good to bad."""
        task = self.task
        states, total = whole.states, len(task.recipe.passes)
        if not states:
            task.ledger.remarks.append("no pass of the recipe changed the program")
            return None

        def look(state: State, error: Exception | None, allowed: int) -> bool:
            what = f"after {state.step} of {total} passes ({state.pass_.name})"
            task.working(f"pass: {what}")
            verdict = task.verdict(error, state.program)
            task.ledger.add("pass", state.step, total, allowed, what, verdict)
            return verdict.bad

        if task.watching and (whole.failed is not None or whole.error is None):
            look(states[-1], whole.error, 1)
            return whole.failed
        task.watching = False  # no single step failed; now the sum of all is asked
        allowed = task.allowed(len(states))
        found = search(
            len(states),
            lambda point: look(states[point - 1], states[point - 1].error, allowed),
            known={0: False},
            exhaustive=task.exhaustive,
        )
        task.ledger.judge(found, "pass", {n: s.step for n, s in enumerate(states, 1)})
        self.ends_bad = (len(states), True) in found.asked
        if found.at is None and len(found.asked) < len(states):
            task.ledger.remarks.append(
                f"{len(found.asked)} of the {len(states)} programs after passes that changed "
                "something were looked at; exhaustive looks at all"
            )
        return states[found.at - 1] if found.at else None

    def confirm(self, state: State, culprit: Culprit) -> None:
        """Run the recipe without what was found."""
        task = self.task
        passes = task.recipe.passes if self.ends_bad else task.recipe.passes[: state.step]
        name = "recipe" if self.ends_bad else f"recipe up to step {state.step}"
        excluded: frozenset[str] = frozenset()
        if culprit.key is not None:
            excluded, without = frozenset([culprit.key]), culprit.key
        else:
            passes = (*passes[: state.step - 1], *passes[state.step :])
            without = f"pass {state.pass_.name}"
        what = f"the {name} without {without}"
        task.working(f"confirm: {what}")
        run = task.run(replace(task.recipe, passes=passes), excluded)
        verdict = task.verdict(run.error, run.program)
        number = culprit.site or state.step
        task.ledger.add("confirm", number, number, 1, what, verdict)
        if verdict.bad:
            task.ledger.remarks.append(
                f"without {without} the result is still bad: other rewrites do it too, or the "
                "predicate is not monotone"
            )
