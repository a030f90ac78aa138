"""What happened to one value: which rule made it, from what, who declined, what it became.

``Life`` watches a run and keeps, per pass, the records of the rewrites and the lines of text of
the nodes that they touched; no program but the last is kept alive. Names are not enough to follow
a value, since a later pass may give a new node the name of one that is gone: each value is a
``Member`` from the step that made it to the one that removed it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.passes.base import PassResult
from planish.passes.debug.life_record import Record
from planish.passes.debug.story import Event, Member, Story
from planish.passes.steps import Instrument, Run, Step

# What is told of values that only took part in making the one asked for.
_ORIGINS = ("captured", "made", "edited")


def explain(life: Life, name: str) -> Story:
    """The story of a value, as ``Life.explain`` tells it."""
    return life.explain(name)


class Life(Instrument):
    """Keeps what ``explain`` tells, also of a pass whose result was rejected.

    Attributes:
        began: whether there is anything to tell.
    """

    began = False

    def before_pipeline(self, run: Run) -> None:
        """Take in what was captured."""
        self.began, self._end = True, "the result"
        self._record = Record(run.original)
        self._steps = len(run.steps)
        # After which step: what was printed under which number, and who lived under which name.
        self._after: dict[int, tuple[dict[str, str], dict[str, Member]]] = {}
        self._keep(0)

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Take in what a pass did and what it declined."""
        self._take(step, result.program)

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Take in what was rejected, if the pass returned anything."""
        if step.after is not None:
            self._take(step, step.after)
            self._end = f"after step {step.index}, {step.name}, which failed"
        else:
            self._end = f"before step {step.index}, {step.name}, which failed"

    def _take(self, step: Step, program: Program) -> None:
        self._record.enter(step.index, step.name)
        if step.record.changed:
            self._record.changed(program, step.record.changes)
            self._keep(step.index)
        self._record.declined(step.record.refusals)

    def _keep(self, step: int) -> None:
        self._after[step] = (self._record.state.printed, dict(self._record.live))

    def explain(self, name: str) -> Story:
        """The life of one value.

        Args:
            name: ``%5`` of the result's text, the name of a node in the graph, or a constant as
                ``@conv.weight``; ``NAME@2`` means what had this name after step 2, and ``NAME@0``
                at capture.

        Raises:
            UsageError: nothing had this name then; says what is near.
        """
        member = self._find(name)
        state = self._record.state
        chain = {member, *_closure([member], _successors), *_closure([member], _predecessors)}
        told = {*chain, *_closure([member], _ancestors)}
        events = [e for m in told for e in m.events if m in chain or e.kind in _ORIGINS]
        events += self._constants_beside(events, told)
        now, same = _now(member)
        return Story(
            asked=name,
            name=member.name,
            events=tuple(sorted(events, key=lambda e: e.order)),
            alive=member.died is None,
            now=tuple((m.name, state.line(m.name) or "") for m in now),
            same_value=same,
            readers=tuple(dict.fromkeys(r for m in now for r in state.readers(m.name))),
            others=self._others(name, member),
            end=self._end,
        )

    def _constants_beside(self, events: list[Event], told: set[Member]) -> list[Event]:
        """The constants that a rewrite made or changed together with a value."""
        sites = {e.number for e in events if e.number is not None and e.kind in _ORIGINS}
        return [
            event
            for member in self._record.members
            if member.name.startswith("@") and member not in told
            for event in member.events
            if event.number in sites and event.kind in _ORIGINS
        ]

    def _others(self, asked: str, member: Member) -> tuple[str, ...]:
        """What else the name could mean, as it would have to be asked for."""
        found = [
            f"{m.name}@{m.born}"
            for m in self._record.members
            if m.name == member.name and m is not member and m.born != m.died
        ]
        printed, live = self._after[0]
        if asked in printed and live[printed[asked]] is not member:
            found.append(f"{asked}@0")
        return tuple(found)

    def _find(self, asked: str) -> Member:
        name, _, digits = asked.rpartition("@")
        if not name or not digits.isdecimal():
            name, step = asked, None
        else:
            step = int(digits)
            if step > self._steps:
                raise UsageError(
                    f"{asked!r} asks for step {step}", hint=f"the recipe has {self._steps} steps"
                )
        last = max(s for s in self._after if step is None or s <= step)
        printed, live = self._after[last]
        key = printed.get(name, name)
        if key in live:
            return live[key]
        found = [m for m in self._record.members if m.name == name]
        if found and step is None:
            return found[-1]
        raise self._unknown(asked, name, printed, live, found)

    def _unknown(
        self,
        asked: str,
        name: str,
        printed: dict[str, str],
        live: Iterable[str],
        found: list[Member],
    ) -> UsageError:
        if found:
            spans = ", ".join(
                f"from step {m.born} " + ("on" if m.died is None else f"until step {m.died}")
                for m in found
            )
            return UsageError(f"{asked!r} was not there then", hint=f"{name} was there {spans}")
        if name[:1] == "%" and name[1:].isdecimal():
            count = sum(p[1:].isdecimal() for p in printed)
            hint = f"that text has %0 to %{count - 1}; %N@0 means the captured program's"
            return UsageError(f"the program's text has no {asked!r}", hint=hint)
        every = sorted({*live, *printed, *(m.name for m in self._record.members)})
        near = difflib.get_close_matches(name, every, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        return UsageError(
            f"there is and was nothing called {asked!r}",
            hint=hint + "NODE is %5 of the text, a node's name, or a constant's as @conv.weight",
        )


def _successors(member: Member) -> list[Member]:
    return [member.successor] if member.successor is not None else list(member.went_into)


def _predecessors(member: Member) -> list[Member]:
    return member.stands_for


def _ancestors(member: Member) -> list[Member]:
    return [*member.sources, *member.stands_for]


def _closure(
    members: list[Member], following: Callable[[Member], list[Member]]
) -> dict[Member, None]:
    """All that is reached, in order."""
    found: dict[Member, None] = {}
    pending = list(members)
    while pending:
        for after in following(pending.pop(0)):
            if after not in found:
                found[after] = None
                pending.append(after)
    return found


def _now(member: Member) -> tuple[list[Member], bool]:
    """What stands for a value at the end, and whether it computes the same."""
    same, current = True, [member]
    seen: set[Member] = set()
    found: dict[Member, None] = {}
    while current:
        at = current.pop(0)
        if at in seen:
            continue
        seen.add(at)
        if at.died is None:
            found[at] = None
            continue
        same = same and at.successor is not None
        current.extend(_successors(at))
    return list(found), same
