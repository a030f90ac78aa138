"""What was known of a program's dynamic sizes at some moment, to be known no better later.

All versions of a program share one table of symbols. A pass that asks whether a size is 3 makes
torch write down that it is: every program of the run, also the one before the pass, has a fixed
size from then on. Whoever needs the program as the pass met it (to probe it at other sizes, to save
it) looks at it within ``Symbols.restored``. Symbols that came later stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from planish.ir.program import Program

_DICTS = ("replacements", "var_to_range", "axioms")


class Symbols:
    """The table of a program, copied when this was made: a few entries."""

    def __init__(self, program: Program):
        self._table: Any = program.fake_mode.shape_env
        self._known = self._copy()

    def restore(self) -> bool:
        """Forget for good what was learned since.

        Returns:
            Whether a size had become fixed, or equal to another.
        """
        later, new = self._copy(), self._new()
        if later == self._known:
            return False
        self._put(self._known)
        was, now = self._known[0], later[0]
        return any(now[symbol] != was.get(symbol) for symbol in now.keys() - new)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within, programs print and are saved as they were then."""
        later = self._copy()
        if later == self._known:
            yield
            return
        self._put(self._known)
        try:
            yield
        finally:
            self._put(later)

    def _new(self) -> frozenset[Any]:
        """Symbols that came since this was made; every symbol has a range."""
        if self._table is None:
            return frozenset()
        return frozenset(self._table.var_to_range.keys() - self._known[1].keys())

    def _copy(self) -> tuple[Any, ...]:
        table = self._table
        if table is None:
            return ()
        held = (dict(getattr(table, name)) for name in _DICTS)
        return (*held, set(table.divisible), list(table.guards))

    def _put(self, known: tuple[Any, ...]) -> None:
        table = self._table
        *dicts, divisible, guards = known
        new = self._new()
        for name, values in zip(_DICTS, dicts, strict=True):
            held = getattr(table, name)
            # What was not there then (the count that a new nonzero gives) is no news of what was.
            later = {key: value for key, value in held.items() if key in new}
            held.clear()
            held.update({**values, **later})
        table.divisible = set(divisible)
        table.guards[:] = guards
        # Torch keeps what it derived from the table under these numbers.
        table._replacements_version_counter += 1
        table._update_version_counter()
        table._version_counter += 1
        for method in (type(table)._inner_evaluate_expr, type(table)._maybe_guard_rel):
            method.cache_clear()  # what it remembers, it would not note again
