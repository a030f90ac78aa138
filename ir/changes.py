"""What a rewrite leaves behind: its record, its number, and who is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch.fx import Node
from torch.fx.node import Argument


@dataclass(frozen=True)
class Change:
    """One applied rewrite.

    Attributes:
        number: the site's number in the whole pipeline run, from 1.
        rule: which rule.
        node: name of the node the rule matched at.
        removed: names of the nodes that went away.
        added: names of the nodes that came.
        source: the user's source line of the matched node, if known.
        detail: what a reader should know beyond that ("rank 64 of 384").
        error: measured error of this rewrite, for lossy passes.
        replaced: pairs (node before, node after) whose values stand for each other; a node that
            was edited in place is paired with itself.
    """

    number: int
    rule: str
    node: str
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    source: str | None = None
    detail: str = ""
    error: Mapping[str, float] | None = None
    replaced: tuple[tuple[str, str], ...] = ()


class Listener(Protocol):
    """Told about every edit, after it happened."""

    def inserted(self, node: Node) -> None:
        """A new node."""

    def replaced(self, old: Node, new: Argument) -> None:
        """All uses of ``old`` now read ``new``."""

    def modified(self, node: Node) -> None:
        """A node's arguments changed."""

    def erased(self, node: Node) -> None:
        """A node is about to leave the graph; its users are gone, its inputs still hang on it."""


def site_key(rule: str, node: str) -> str:
    """How one rewrite site is named where it is to be left out: ``rule@node``."""
    return f"{rule}@{node}"


@dataclass
class SiteCounter:
    """Numbers rewrite sites over a whole pipeline; denies those past a limit, or left out by name.

    The numbering is stable: sites up to N are the same whatever the limit beyond N is.

    Attributes:
        limit: the last number that is granted; None grants all.
        count: how many sites asked so far, denied ones included.
        excluded: sites to deny, as ``rule@node`` (see ``site_key``). A node that is looked at again
            asks again, hence names and not numbers.
        denied: which of ``excluded`` really asked.
    """

    limit: int | None = None
    count: int = 0
    excluded: frozenset[str] = frozenset()
    denied: set[str] = field(default_factory=set)

    def take(self, rule: str = "", node: str = "") -> int | None:
        """The number of the next site, or None where it may not be rewritten."""
        self.count += 1
        key = site_key(rule, node)
        if key in self.excluded:
            self.denied.add(key)
            return None
        return self.count if self.limit is None or self.count <= self.limit else None
