"""The difference of two programs as text in which what did not change reads the same.

Operators are aligned first (``planish.ir.align``); then the second program is printed with the
numbers that values have in the first. An operator that came or went so changes its own line and
those of its readers, and does not renumber all that follow::

      %0: f32[B, 8] = aten.linear(%x, @fc.weight)
    - %1: f32[B, 8] = aten.relu(%0)
    + %1: f32[B, 8] = aten.clamp_min(%0, 0)
      %2: f32[B, 8] = aten.tanh(%1)

What is new is numbered from where the first program ends. A constant whose name and type stayed
but whose values did not is a change; both digests are shown.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from torch import Tensor
from torch.fx import Node

from planish.ir.align import align
from planish.ir.archive import raw_bytes
from planish.ir.program import Constant, Program
from planish.ir.tensortype import type_text
from planish.ir.text import constant_lines, format_value, node_text, value_names

Status = Literal["same", "changed", "added", "removed"]


@dataclass(frozen=True)
class Entry:
    """One line of a diff, or a line and the one that took its place.

    Attributes:
        status: ``changed`` has both lines, ``added`` and ``removed`` have one.
        before: the line of the first program.
        after: the line of the second, with the first one's numbers of values.
        nodes: names of the operators in the graphs, None where the line is of none.
        moved: the operator is in both programs, in another order; it is removed here and added
            there, or the reverse.
    """

    status: Status
    before: str | None
    after: str | None
    nodes: tuple[str | None, str | None] = (None, None)
    moved: bool = False


@dataclass(frozen=True)
class TextDiff:
    """Two programs, line by line."""

    entries: tuple[Entry, ...]

    @property
    def equal(self) -> bool:
        """Whether both print the same and hold the same constants, bit by bit."""
        return all(entry.status == "same" for entry in self.entries)

    def counts(self) -> dict[Status, int]:
        """How many lines are of which kind."""
        found: dict[Status, int] = {"same": 0, "changed": 0, "added": 0, "removed": 0}
        for entry in self.entries:
            found[entry.status] += 1
        return found

    def hunks(self, context: int | None = 3) -> Iterator[tuple[str, tuple[Entry, ...]]]:
        """What changed, with lines around it; None shows everything.

        Yields:
            ``@@ -12,7 +12,6 @@`` with line numbers of both canonical texts, and the entries.
        """
        if self.equal and context is not None:
            return
        old = [0, *accumulate(int(e.before is not None) for e in self.entries)]
        new = [0, *accumulate(int(e.after is not None) for e in self.entries)]
        for first, last in _ranges(self.entries, context):
            spans = [
                f"{lines[first] + (lines[last] > lines[first])},{lines[last] - lines[first]}"
                for lines in (old, new)
            ]
            yield f"@@ -{spans[0]} +{spans[1]} @@", self.entries[first:last]

    def unified(self, *, context: int | None = 3, names: tuple[str, str] = ("A", "B")) -> list[str]:
        """Lines that begin with a space, ``-`` or ``+``; none where nothing changed."""
        lines: list[str] = []
        for head, entries in self.hunks(context):
            lines.extend([head] if lines else [f"--- {names[0]}", f"+++ {names[1]}", head])
            lines.extend(_unified(entries))
        return lines

    def brief(self, limit: int, *, context: int = 2) -> list[str]:
        """At most ``limit`` lines and one that counts the rest, changed operators first."""

        def plain(hunk: tuple[str, tuple[Entry, ...]]) -> bool:
            return all(e.status == "same" or e.nodes == (None, None) for e in hunk[1])

        hunks = sorted(self.hunks(context), key=plain)
        lines = [line for head, entries in hunks for line in (head, *_unified(entries))]
        if len(lines) > limit:
            lines = [*lines[:limit], f"... {len(lines) - limit} more lines"]
        return lines


def _unified(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if entry.status == "same":
            yield f" {entry.after}"
            continue
        if entry.before is not None:
            yield f"-{entry.before}"
        if entry.after is not None:
            yield f"+{entry.after}"


def compare(before: Program, after: Program) -> TextDiff:
    """Align two programs and print both; takes time linear in operators and bytes of constants."""
    partner = align(before, after)
    old_names, new_names = value_names(before), value_names(after)
    fresh = len(before.operators)
    for node in after.operators:
        if (old := partner.get(node)) is not None:
            new_names[node] = old_names[old]
        else:
            new_names[node], fresh = f"%{fresh}", fresh + 1
    entries = [_entry(_head(before, old_names), _head(after, new_names))]
    entries.extend(_constants(before, after))
    old_lines = {n: "  " + node_text(before, n, old_names) for n in before.operators}
    new_lines = {n: "  " + node_text(after, n, new_names) for n in after.operators}
    entries.extend(_operators(before, after, partner, old_lines, new_lines))
    entries.append(_entry(_return(before, old_names), _return(after, new_names)))
    return TextDiff(tuple(entries))


def diff(before: Program, after: Program, *, context: int | None = 3) -> str:
    """The aligned diff as one text; empty where nothing changed."""
    return "".join(f"{line}\n" for line in compare(before, after).unified(context=context))


def _entry(before: str, after: str, nodes: tuple[str | None, str | None] = (None, None)) -> Entry:
    return Entry("same" if before == after else "changed", before, after, nodes)


def _head(program: Program, names: dict[Node, str]) -> str:
    symbols = program.signature.symbols
    inputs = (f"{names[n]}: {type_text(n.meta.get('val'), symbols)}" for n in program.placeholders)
    return f"program({', '.join(inputs)})"


def _return(program: Program, names: dict[Node, str]) -> str:
    symbols = program.signature.symbols
    return "  return " + ", ".join(format_value(v, names, symbols) for v in program.results)


def _constants(before: Program, after: Program) -> Iterator[Entry]:
    old, new = _live(before), _live(after)
    for name in sorted({*old, *new}):
        lines = [
            constant_lines(program, name, values=False) if name in live else []
            for program, live in ((before, old), (after, new))
        ]
        if lines[0] == lines[1] and not _same_values(old[name], new[name]):
            lines = [constant_lines(program, name, values=True) for program in (before, after)]
        yield from _plain(*lines)


def _live(program: Program) -> dict[str, Constant]:
    names = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
    return {name: program.constants[name] for name in names}


def _same_values(old: Constant, new: Constant) -> bool:
    """Whether two constants that print alike are the same bit by bit."""
    if old is new or not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return True  # the body of a branch has been printed
    return bool(np.array_equal(raw_bytes(old), raw_bytes(new)))


def _plain(old: Sequence[str], new: Sequence[str]) -> Iterator[Entry]:
    """Lines that are not of the program's own operators, aligned as text."""
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for _, first, last, start, end in matcher.get_opcodes():
        paired = min(last - first, end - start)
        for a, b in zip(old[first : first + paired], new[start : start + paired], strict=True):
            yield _entry(a, b)
        for a in old[first + paired : last]:
            yield Entry("removed", a, None)
        for b in new[start + paired : end]:
            yield Entry("added", None, b)


def _operators(
    before: Program,
    after: Program,
    partner: dict[Node, Node],
    old_lines: dict[Node, str],
    new_lines: dict[Node, str],
) -> Iterator[Entry]:
    old, new = before.operators, after.operators
    position = {node: i for i, node in enumerate(old)}
    pairs = [(position[partner[n]], j) for j, n in enumerate(new) if n in partner]
    found = set(partner.values())
    i = j = 0
    for a, b in [*_in_order(pairs), (len(old), len(new))]:
        for node in old[i:a]:
            yield Entry("removed", old_lines[node], None, (node.name, None), node in found)
        for node in new[j:b]:
            yield Entry("added", None, new_lines[node], (None, node.name), node in partner)
        if a < len(old):
            names = (old[a].name, new[b].name)
            yield _entry(old_lines[old[a]], new_lines[new[b]], names)
        i, j = a + 1, b + 1


def _in_order(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of pairs that ascends on both sides; they ascend on the second already."""
    tails: list[int] = []  # the smallest last value of an ascending run of each length
    ends: list[int] = []  # which pair that is
    previous: list[int] = []
    for k, (value, _) in enumerate(pairs):
        length = bisect_left(tails, value)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [value]
        ends[length : length + 1] = [k]
    chosen: list[tuple[int, int]] = []
    k = ends[-1] if ends else -1
    while k >= 0:
        chosen.append(pairs[k])
        k = previous[k]
    return chosen[::-1]


def _ranges(entries: Sequence[Entry], context: int | None) -> list[tuple[int, int]]:
    """Stretches of entries to show, first and one past the last."""
    if context is None:
        return [(0, len(entries))]
    found: list[tuple[int, int]] = []
    for i, entry in enumerate(entries):
        if entry.status == "same":
            continue
        first, last = max(0, i - context), min(len(entries), i + context + 1)
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found
