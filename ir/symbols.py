"""What was known of a program's dynamic sizes at some moment, to be known no better later.

All versions of a program share one table of symbols. A pass that asks whether a size is 3 makes
torch write down that it is: every program of the run, also the one before the pass, has a fixed
size from then on. Whoever needs the program as the pass met it (to probe it at other sizes, to save
it) looks at it within ``Symbols.restored``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from planish.ir.program import Program


class Symbols:
    """The table of a program, copied when this was made: a few entries."""

    def __init__(self, program: Program):
        self._table: Any = program.fake_mode.shape_env
        self._known = self._copy()

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

    def _copy(self) -> tuple[dict[Any, Any], dict[Any, Any]]:
        if self._table is None:
            return {}, {}
        return dict(self._table.replacements), dict(self._table.var_to_range)

    def _put(self, known: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
        table = self._table
        for held, values in zip((table.replacements, table.var_to_range), known, strict=True):
            held.clear()
            held.update(values)
        # Torch keeps what it derived from the table under these numbers.
        table._replacements_version_counter += 1
        table._version_counter += 1
