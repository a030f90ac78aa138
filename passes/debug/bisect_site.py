"""The second level of a bisection: the first rewrite site of a pass that turns good to bad."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planish.ir.changes import site_key
from planish.ir.errors import PlanishError, source_line
from planish.ir.program import Program
from planish.passes.debug.bisect_runs import Attempt, State, outcome, same_outcome
from planish.passes.debug.bisect_search import search
from planish.passes.debug.bisect_task import Task
from planish.passes.pipeline import OUTSIDE

_RULE = re.compile(r"\brule (?P<rule>[^\s:]+)( failed)?:")


@dataclass(frozen=True)
class Culprit:
    """What is to blame within a step; without a site, the step as a whole."""

    symptom: str
    before: Program | None
    after: Program | None
    site: int | None = None
    rule: str | None = None
    node: str | None = None
    source: str | None = None

    @property
    def key(self) -> str | None:
        """How to exclude it; None where it cannot be."""
        if self.site is None or not self.rule or not self.node or self.rule == OUTSIDE:
            return None
        return site_key(self.rule, self.node)


def site_level(task: Task, state: State) -> Culprit:
    """The first site of a step that turns good to bad; without one, what is known."""
    numbers, name = state.sites, state.pass_.name
    seen = str(state.error or task.ledger.seen("pass", state.step))
    whole = Culprit(seen, state.before, state.program, None, *_blamed(state.error, state.before))
    if not numbers:
        task.ledger.remarks.append(f"pass {name} is to blame as a whole: no site was rewritten")
        return whole
    task.working(f"site: all {len(numbers)} of {name}")
    again = task.rerun(state, numbers[-1], watched=False)
    repeats = same_outcome(state, again)
    if not repeats:
        task.ledger.remarks.append(f"pass {name} gave another result when it ran again")

    errors: dict[int, Exception | None] = {numbers[-1]: state.error}

    def is_bad(point: int) -> bool:
        number = numbers[point - 1] if point else state.first
        what = f"with {point} of {len(numbers)} sites of {name}"
        task.working(f"site: {what}")
        run = task.rerun(state, number)
        errors[number] = run.error
        if point:
            what += f", up to {number} ({_site_text(run, number)})"
        verdict = task.verdict(run.error, outcome(run, state.before))
        allowed = task.allowed(len(numbers))
        task.ledger.add("site", number, numbers[-1], allowed, what, verdict)
        return verdict.bad

    known = {len(numbers): True} if repeats else {0: False}
    found = search(len(numbers), is_bad, known=known, exhaustive=task.exhaustive)
    task.ledger.judge(found, "site", dict(enumerate(numbers, 1)))
    if found.at:
        number = numbers[found.at - 1]
        symptom = str(errors[number] or task.ledger.seen("site", number) or seen)
        return _culprit(task, state, number, symptom)
    task.ledger.remarks.append(
        f"pass {name} does it outside of its rewrite sites: it is bad without any of them"
        if found.at == 0
        else f"no site of pass {name} could be made to do it again"
    )
    return whole


def _site_text(run: Attempt, number: int) -> str:
    if number not in run.sites.log:
        return "it did not come up again"  # the pass is not deterministic
    rule, node = run.sites.log[number]
    return site_key(rule, node) if rule else OUTSIDE


def _culprit(task: Task, state: State, number: int, symptom: str) -> Culprit:
    """All about the site that was found."""
    below, run = (task.rerun(state, limit, watched=False) for limit in (number - 1, number))
    before = outcome(below, state.before)
    rule, node = run.sites.log.get(number, (None, None))
    made = run.states[-1].change(number) if run.states else None
    if made is not None:  # an edit outside of the rewriter asks for its number namelessly
        rule, node = made.rule, made.node
    source = made.source if made is not None else None
    if source is None and before is not None:
        source = next((source_line(n) for n in before.nodes if n.name == node), None)
    return Culprit(symptom, before, outcome(run, state.before), number, rule, node, source)


def _blamed(error: Exception | None, program: Program) -> tuple[str | None, str | None, str | None]:
    """The rule, the node and its source line that an error outside of any site names."""
    if not isinstance(error, PlanishError):
        return None, None, None
    rule = _RULE.search(error.what)
    name = (error.where or "").split(" ", 1)[0]
    node = next((n for n in program.nodes if n.name == name), None)
    return (
        rule["rule"] if rule else None,
        node.name if node is not None else None,
        source_line(node) if node is not None else None,
    )
