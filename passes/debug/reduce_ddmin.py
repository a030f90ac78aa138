"""Delta debugging: the ``ddmin`` algorithm over any items, some of which need others.

Source: Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE
Transactions on Software Engineering 28(2), 2002, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from itertools import pairwise

Items = frozenset[str]


def ddmin(
    items: Sequence[str],
    fails: Callable[[Items], bool],
    *,
    grown: Callable[[Set[str]], Items] = frozenset,
    shrunk: Callable[[Set[str], Set[str]], Items] = lambda keep, drop: frozenset(keep - drop),
) -> list[str]:
    """A subset that still fails, and no longer does without any one of its items.

    Args:
        items: what fails together, in an order in which neighbors belong together.
        fails: whether a legal set fails. A set may be asked about twice.
        grown: the smallest legal set that holds these items.
        shrunk: the largest legal set within ``keep`` that holds nothing of ``drop``; "without an
            item" means without those that need it, too.

    Returns:
        The items left, in order; never none, so that there is something to look at.
    """
    current = list(items)
    parts = 2
    while len(current) > 1:
        parts = min(parts, len(current))
        chunks = _split(current, parts)
        smaller = _first((grown(set(c)) for c in chunks), len(current), fails)
        if smaller is not None:
            current = [i for i in current if i in smaller]
            parts = 2
            continue
        rest, removed = _thinned(current, chunks, fails, shrunk)
        if removed:
            current = rest
            parts = max(parts - removed, 2)
        elif parts == len(current):
            return current
        else:
            parts *= 2
    return current


def _split(items: list[str], parts: int) -> list[list[str]]:
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(bounds)]


def _first(sets: Iterable[Items], below: int, fails: Callable[[Items], bool]) -> Items | None:
    for found in sets:
        if 0 < len(found) < below and fails(found):
            return found
    return None


def _thinned(
    current: list[str],
    chunks: list[list[str]],
    fails: Callable[[Items], bool],
    shrunk: Callable[[Set[str], Set[str]], Items],
) -> tuple[list[str], int]:
    """Leave out chunk after chunk, as long as what is left fails.

    The original starts over after each success; going on with the next chunk asks fewer questions
    and ends at the same kind of set, since the caller starts over until no chunk can go.
    """
    keep = frozenset(current)
    removed = 0
    for chunk in chunks:
        rest = shrunk(keep, frozenset(chunk))
        if 0 < len(rest) < len(keep) and fails(rest):
            keep = rest
            removed += 1
    return [i for i in current if i in keep], removed
