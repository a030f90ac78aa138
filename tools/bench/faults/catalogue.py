"""All seeded faults, by name."""

from __future__ import annotations

from collections.abc import Mapping

from planish.tools.bench.faults import (
    catalogue_cleanup,
    catalogue_fold,
    catalogue_fuse,
    catalogue_layout,
    catalogue_structure,
)
from planish.tools.bench.faults.spec import Fault


def _gathered(*parts: tuple[Fault, ...]) -> dict[str, Fault]:
    found: dict[str, Fault] = {}
    for fault in (fault for part in parts for fault in part):
        if fault.name in found:
            raise ValueError(f"two faults are called {fault.name}")
        found[fault.name] = fault
    return found


FAULTS: Mapping[str, Fault] = _gathered(
    catalogue_fold.FAULTS,
    catalogue_cleanup.FAULTS,
    catalogue_layout.FAULTS,
    catalogue_fuse.FAULTS,
    catalogue_structure.FAULTS,
)
