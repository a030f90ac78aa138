"""What is told of one value's life: its events, and those of what it came from and became."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

Kind = Literal[
    "captured",
    "made",
    "edited",
    "rewired",
    "revalued",
    "retyped",
    "replaced",
    "removed",
    "declined",
]


@dataclass(frozen=True)
class Event:
    """Something that happened to a value.

    Attributes:
        order: position among all events of the run.
        step: number of the pass in the recipe; 0 is the capture.
        pass_name: the pass, or ``"capture"``.
        kind: ``edited`` is the node itself, ``rewired`` that it reads something else, ``retyped``
            that only its type is another, ``revalued`` that a constant it reads has other values,
            ``replaced`` that its readers read another value now, ``removed`` that it went away
            without one.
        about: the node, or ``@name`` of a constant.
        number: of the rewrite site; None for a refusal and at capture.
        rule: which rule.
        site: name of the node the rule matched at.
        source: the user's source line.
        text: the reason of a refusal, the module at capture, or the detail of a rewrite.
        sources: what it was made from.
        replaces: what its readers read before.
        into: what stands for it, or what it went into.
        before: its line of text before, or the lines of what it replaced.
        after: its line after, or that of what replaced it.
        type: its type from then on, where that is told.
    """

    order: int
    step: int
    pass_name: str
    kind: Kind
    about: str
    number: int | None = None
    rule: str = ""
    site: str = ""
    source: str | None = None
    text: str = ""
    sources: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    into: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: str | None = None
    type: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "order"}


@dataclass(eq=False)
class Member:
    """A value between its making and its end; a later one may have the same name.

    Attributes:
        name: the node, or ``@name`` of a constant.
        born: the step that made it; 0 is the capture.
        died: the step after which it is gone; None while it lives.
        events: what happened to it.
        sources: what it was made from, or stands for.
        stands_for: those whose readers read it instead.
        successor: what its readers read instead.
        went_into: what the rewrite that removed it made, where nothing stands for it.
    """

    name: str
    born: int
    died: int | None = None
    events: list[Event] = field(default_factory=list)
    sources: list[Member] = field(default_factory=list)
    stands_for: list[Member] = field(default_factory=list)
    successor: Member | None = None
    went_into: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Story:
    """A value's whole life.

    Attributes:
        asked: what was asked for.
        name: the node, or ``@name`` of a constant.
        events: in order, of the value, of what it was made from and of what it became.
        alive: whether it is in the resulting program.
        now: what stands for it in the resulting program, as name and line of text; itself if it is
            alive, and nothing if it was dropped.
        same_value: whether ``now`` stands for the value, or only took it in.
        readers: what reads ``now`` in the resulting program.
        others: other values of the same name, as it would have to be asked for.
        end: what ``now`` is about: the result, or the program at which the run failed.
    """

    asked: str
    name: str
    events: tuple[Event, ...]
    alive: bool
    now: tuple[tuple[str, str], ...]
    same_value: bool
    readers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    end: str = "the result"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "asked": self.asked,
            "name": self.name,
            "events": [event.to_dict() for event in self.events],
            "alive": self.alive,
            "now": [{"name": name, "line": line} for name, line in self.now],
            "same_value": self.same_value,
            "readers": list(self.readers),
            "others": list(self.others),
            "end": self.end,
        }

    def text(self) -> str:
        """The story for people, pass by pass."""
        lines = [self.name if self.asked == self.name else f"{self.asked} is {self.name}"]
        for (step, pass_name), events in groupby(self.events, lambda e: (e.step, e.pass_name)):
            lines.append(pass_name if step == 0 else f"step {step}, {pass_name}")
            made = {(e.number, old) for e in self.events if e.step == step for old in e.replaces}
            for event in events:
                # The making of what took its place says the same.
                if event.kind != "replaced" or (event.number, event.about) not in made:
                    lines.extend("  " + line for line in _told(event))
        lines += [self.end, *("  " + line for line in self._ending())]
        lines += [
            f"{other.rpartition('@')[0]} was also another value: ask for {other}"
            for other in self.others
        ]
        return "\n".join(lines) + "\n"

    def _ending(self) -> list[str]:
        if not self.now:
            return [f"{self.name} is gone, and nothing stands for it"]
        if self.alive:
            told = [line for _, line in self.now]
        else:
            names = ", ".join(name for name, _ in self.now)
            verb = "stands for it" if self.same_value else "took it in"
            told = [f"{self.name} is gone; {names} {verb}", *(line for _, line in self.now)]
        if self.readers:
            told.append(f"read by {', '.join(self.readers)}")
        return told


def _told(event: Event) -> list[str]:
    if event.kind == "captured":
        notes = [note for note in (event.source, event.text) if note]
        return [f"{event.about}", *([f"  {event.after}"] if event.after else []), *_indent(notes)]
    if event.kind == "declined":
        return [f"{event.rule} declined at {event.about}: {event.text}"]
    sources, into = (", ".join(names) for names in (event.sources, event.into))
    what = {
        "made": f"made {event.about}"
        + (f" from {sources}" if sources else "")
        + (f", in place of {', '.join(event.replaces)}" if event.replaces else ""),
        "edited": f"edited {event.about}",
        "rewired": f"changed what {event.about} reads",
        "retyped": f"changed the type of {event.about}",
        "revalued": f"changed the values of {sources}, which {event.about} reads",
        "replaced": f"replaced {event.about} by {into}",
        "removed": f"removed {event.about}" + (f", which went into {into}" if into else ""),
    }[event.kind]
    by = f"{event.number} {event.rule} at {event.site}: " if event.number is not None else ""
    lines = [f"{by}{what}", *_indent([event.text] if event.text else [])]
    lines += [f"  - {line}" for line in event.before]
    return lines + ([f"  + {event.after}"] if event.after is not None else [])


def _indent(notes: Iterable[str]) -> list[str]:
    return [f"  {note}" for note in notes]
