"""The fewest operators to leave in floating point, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence

RETRIES = 8  # kept operators that are tried in integers again


def fewest(
    order: Sequence[str], good: Callable[[Sequence[str]], bool], retries: int = RETRIES
) -> tuple[str, ...] | None:
    """The shortest beginning of a list that is good enough, with what it can spare left out.

    Args:
        order: the most important first.
        good: whether a choice is good enough; assumed to hold for longer beginnings too.
        retries: how many members are tried without.

    Returns:
        None where not even the whole list is good enough.
    """
    if good(()):
        return ()
    if not good(order):
        return None
    low, high = 0, len(order)  # not good, good
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(order[:middle]) else (middle, high)
    kept = tuple(order[:high])
    for name in kept[-2 : -2 - retries : -1]:  # without the last one it was not good enough
        fewer = tuple(n for n in kept if n != name)
        if good(fewer):
            kept = fewer
    return kept
