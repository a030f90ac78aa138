"""How the records of rewrites become events in the lives of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from planish.ir.errors import source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Change
from planish.passes.debug.life_state import State, module_of
from planish.passes.debug.story import Event, Kind, Member


class Record:
    """All values of a run, and what happened to each.

    Attributes:
        state: the current program.
        live: the values in it, by name.
        members: all values there ever were, in the order in which they came.
    """

    def __init__(self, original: Program):
        self.step, self.pass_name = 0, "capture"
        self.state = State(original)
        self.live: dict[str, Member] = {}
        self.members: list[Member] = []
        self._count = 0
        for name in self.state.names():
            node = self.state.nodes.get(name)
            self.tell(
                self._born(name),
                "captured",
                source=source_line(node) if node is not None else None,
                text=module_of(node) if node is not None else "",
                after=self.state.line(name),
                type=self.state.type(name),
            )

    def enter(self, step: int, pass_name: str) -> None:
        """Say which pass the following is about."""
        self.step, self.pass_name = step, pass_name

    def changed(self, after: Program, changes: Sequence[Change]) -> None:
        """Take in what a pass did."""
        old, self.state = self.state, State(after)
        _Pass(self, old, self.state).tell(changes)
        old.forget()

    def declined(self, refusals: Iterable[Refusal]) -> None:
        """Take in what a pass did not do."""
        for refusal in refusals:
            if (member := self.live.get(refusal.node)) is not None:
                rule, site, source = refusal.rule, refusal.node, refusal.source
                text = refusal.reason
                self.tell(member, "declined", rule=rule, site=site, source=source, text=text)

    def _born(self, name: str) -> Member:
        member = self.passing(name)
        self.live[name] = member
        return member

    def passing(self, name: str) -> Member:
        """A value that the same pass removes again."""
        member = Member(name, self.step)
        self.members.append(member)
        return member

    def born(self, name: str) -> Member:
        """A value of the current program; one that lives under this name goes on."""
        return self.live.get(name) or self._born(name)

    def dies(self, member: Member) -> None:
        """A value is gone."""
        member.died = self.step
        if self.live.get(member.name) is member:
            del self.live[member.name]

    def tell(self, member: Member, kind: Kind, change: Change | None = None, **more: Any) -> None:  # noqa: ANN401 - fields of an event
        """Add an event to a value's life."""
        if change is not None:
            more = {"number": change.number, "rule": change.rule, "site": change.node, **more}
            more = {"source": change.source, "text": change.detail, **more}
        self._count += 1
        event = Event(self._count, self.step, self.pass_name, kind, member.name, **more)
        member.events.append(event)


class _Pass:
    """Tells what one pass did, rewrite by rewrite."""

    def __init__(self, record: Record, old: State, new: State):
        self.record, self.old, self.new = record, old, new
        self.here: dict[str, Member] = dict(record.live)
        for node, constant in old.readers_of.items():
            self.here[node] = record.live[constant]
        self.told: set[Member] = set()  # whose making, edit or end has been told
        self.edited: dict[str, Change | None] = {}  # constants of other values

    def tell(self, changes: Sequence[Change]) -> None:
        constants = (self.old.constants, self.new.constants)
        ends = {self.old.readers_of.get(name): c for c in changes for name in c.removed}
        for change in changes:
            made = [self._made(name, change) for name in change.added]
            self._replaced(change)
            for name, member in zip(change.added, made, strict=True):
                self._tell_made(name, member, change)
            for name in change.removed:
                constant = self.old.readers_of.get(name)
                if constant is None:
                    self._removed(self.here.get(name), change)
                elif constant not in constants[1] and ends[constant] is change:
                    self._removed(self.here.get(name), change)
        self._unrecorded()
        self._rewired(changes)
        self._revalued()

    def _made(self, name: str, change: Change) -> Member:
        record = self.record
        constant = self.new.readers_of.get(name)
        if constant is not None:
            member = record.born(constant)
        elif name in self.new.nodes:
            if name in record.live and name in self.old.nodes:  # a name taken over in one pass
                self._removed(record.live[name], change)
            member = record.born(name)
        else:
            member = record.passing(name)
            member.died = record.step
        sources = self.new.sources(name) or (change.node,)
        found = [self.here[s] for s in sources if s in self.here]
        member.sources += [s for s in found if s is not member and s not in member.sources]
        self.here[name] = member
        return member

    def _replaced(self, change: Change) -> None:
        for before, after in change.replaced:
            old, new = self.here.get(before), self.here.get(after)
            if after in self.new.readers_of:
                new = self.record.live.get(self.new.readers_of[after])
            if old is None or new is None:
                continue
            if old is not new:
                old.successor = new
                new.stands_for.append(old)
                if before not in change.removed:
                    self._tell_replaced(old, change)
            elif before == after and new not in self.told:
                self.told.add(new)
                self._change(new, "edited", change)

    def _change(self, member: Member, kind: Kind, change: Change | None) -> None:
        """Tell of a value that is another one under the same name."""
        lines = self.old.line(member.name), self.new.line(member.name)
        self.record.tell(
            member,
            kind,
            change,
            before=_those(lines[0]),
            after=lines[1],
            type=self.new.type(member.name),
        )

    def _tell_made(self, name: str, member: Member, change: Change | None) -> None:
        if member in self.told:
            return
        if member.name in self.old.constants:
            if self.old.constants[member.name] is not self.new.constants.get(member.name):
                self.told.add(member)
                self.edited[member.name] = change
                self._change(member, "edited", change)
            return
        self.told.add(member)
        olds = [m for m in member.stands_for if change and m.name in dict(change.replaced)]
        self.record.tell(
            member,
            "made",
            change,
            sources=tuple(m.name for m in member.sources),
            replaces=tuple(m.name for m in olds),
            before=_those(*(self.old.line(m.name) for m in olds)),
            after=self.new.line(member.name) if member.died is None else None,
            type=self.new.type(member.name) if member.died is None else None,
        )

    def _removed(self, member: Member | None, change: Change | None) -> None:
        if member is None:
            return
        self.record.dies(member)
        if member.successor is not None:
            self._tell_replaced(member, change)
            return
        if change is not None:
            names = [after for _, after in change.replaced] or list(change.added)
            into = [self.here[n] for n in names if n in self.here and self.here[n] is not member]
            member.went_into = tuple(dict.fromkeys(into))
        self.record.tell(
            member,
            "removed",
            change,
            into=tuple(m.name for m in member.went_into),
            before=_those(self.old.line(member.name)),
        )

    def _tell_replaced(self, member: Member, change: Change | None) -> None:
        assert member.successor is not None
        new = member.successor.name
        before, after = _those(self.old.line(member.name)), self.new.line(new)
        self.record.tell(member, "replaced", change, into=(new,), before=before, after=after)

    def _unrecorded(self) -> None:
        """Tell what came, went or changed and no rewrite owned up to."""
        for name in sorted(self.record.live.keys() - set(self.new.names())):
            self._removed(self.record.live[name], None)
        for name in self.new.names():
            if name not in self.record.live:
                self._tell_made(name, self.record.born(name), None)
            elif name in self.new.constants and name in self.old.constants:
                self._tell_made(name, self.record.live[name], None)

    def _rewired(self, changes: Sequence[Change]) -> None:
        """Tell of operators whose line is another one, since what they read was replaced."""
        for name, line in self.new.lines_by_name.items():
            member = self.record.live[name]
            if member in self.told or self.old.lines_by_name.get(name, line) == line:
                continue
            read = set(self.old.operands(name))
            causes = [c for c in changes if any(before in read for before, _ in c.replaced)]
            kind: Kind = "retyped" if read == set(self.new.operands(name)) else "rewired"
            self._change(member, kind, causes[-1] if causes else None)

    def _revalued(self) -> None:
        """Tell the readers of constants that have other values now."""
        for name in self.new.lines_by_name if self.edited else ():
            member = self.record.live[name]
            read = (self.new.readers_of.get(operand, "") for operand in self.new.operands(name))
            for constant in dict.fromkeys(read):
                if constant not in self.edited or member in self.told:
                    continue
                more: dict[str, Any] = {"sources": (constant,), "after": self.new.line(constant)}
                more["before"] = _those(self.old.line(constant))
                self.record.tell(member, "revalued", self.edited[constant], **more)


def _those(*lines: str | None) -> tuple[str, ...]:
    return tuple(filter(None, lines))
