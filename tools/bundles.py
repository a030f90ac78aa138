"""How every command opens a bundle of ``planish repro``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planish.passes.debug.bundle import Bundle


def open_bundle(folder: Path, *, program: bool = True) -> Bundle:
    """Read a bundle, which runs no code, and keep what follows from importing what lies in it.

    Args:
        folder: the bundle.
        program: also read its program.

    Raises:
        UsageError: it is none, or damaged.
    """
    from planish.passes.debug.bundle import load_bundle

    _import_nothing_from(folder)
    return load_bundle(folder, program=program)


def _import_nothing_from(bundle: Path) -> None:
    """Keep Python from importing files of a bundle, also where the current folder is within it.

    The recipe of a bundle names the modules of its passes; a stranger's may bring the module along.
    """
    folder = bundle.resolve()
    paths = {entry: Path(entry or ".").resolve() for entry in sys.path}
    sys.path[:] = [p for p in sys.path if folder not in (paths[p], *paths[p].parents)]
