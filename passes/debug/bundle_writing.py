"""Write a bundle: under a temporary name first, then renamed to one that tells its content."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import Any

from torch import Tensor

from planish.ir.archive import json_bytes
from planish.ir.errors import ExportError
from planish.ir.files import save
from planish.ir.program import Program
from planish.passes.debug.bundle_facts import NAME, Facts
from planish.passes.debug.bundle_inputs import Batches, write_inputs
from planish.passes.debug.bundle_readme import readme
from planish.passes.recipe import Recipe

PROGRAM, RECIPE, PROBE, CALIBRATION = "program.pt2", "recipe.yaml", "probe.zip", "calibration.zip"

_PREFIX = "planish-repro-"
_MARGIN = 1.1  # of disk space over the constants


def write_bundle(
    parent: str | os.PathLike[str],
    facts: Facts,
    program: Program,
    recipe: Recipe,
    *,
    calibration: Batches | None = None,
    probe: tuple[Any, ...] | None = None,
    error: BaseException | None = None,
) -> Path:
    """Write a bundle; one with the same content replaces itself.

    Args:
        parent: the folder to write it into; made if it is missing.
        facts: what ``repro.json`` says.
        program: the program right before the failure.
        recipe: what is left to run.
        calibration: flat inputs; None where the run had none.
        probe: flat inputs that outputs were compared at besides the samples.
        error: shown in full in ``error.txt``.

    Returns:
        The folder ``planish-repro-<hash>``; the hash is that of all that decides the failure.

    Raises:
        ExportError: it cannot be written. Nothing is left behind.
        UnsupportedError: the program, or an input, is not what files can hold.
        RecipeError: the recipe holds an option that cannot be written.
    """
    folder = Path(parent)
    partial: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, program)
        # Private to the user: weights may be secret, and the system's folder is everybody's.
        partial = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", suffix=".partial", dir=folder))
        names = program.signature.tensor_names
        save(program, partial / PROGRAM)
        (partial / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        if probe is not None:
            write_inputs(partial / PROBE, names, (probe,))
        if calibration is not None and len(calibration):
            write_inputs(partial / CALIBRATION, names, calibration)
        final = folder / (_PREFIX + _digest(partial, facts))
        (partial / NAME).write_bytes(_pretty(facts))
        trace = "".join(traceback.format_exception(error)) if error else facts.failure.message
        (partial / "error.txt").write_text(trace + "\n", "utf-8", "backslashreplace")
        (partial / "README.txt").write_text(
            readme(partial, final, facts), "utf-8", "backslashreplace"
        )
        _move(partial, final)
    except OSError as problem:
        raise ExportError(
            f"the bundle could not be written into {folder}: {problem.strerror or problem}",
            hint="set PLANISH_REPRO_DIR to a folder with room",
        ) from problem
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well
    return final


def command(folder: Path) -> str:
    """The command that replays a bundle."""
    return f"planish repro {shlex.quote(str(folder))}"


def is_bundle_name(name: str) -> bool:
    """Whether a folder of this name was written, or begun, by ``write_bundle``."""
    return name.removeprefix(".").startswith(_PREFIX)


def _check_room(folder: Path, program: Program) -> None:
    needed = sum(c.nbytes for c in program.constants.values() if isinstance(c, Tensor))
    free = shutil.disk_usage(folder).free
    if free < _MARGIN * needed:
        raise ExportError(
            f"{folder} has {free / 2**20:.0f} MiB left, and the program takes "
            f"{needed / 2**20:.0f} MiB",
            hint="set PLANISH_REPRO_DIR to a folder with room",
        )


def _pretty(facts: Facts) -> bytes:
    return (json.dumps(facts.to_dict(), indent=2, allow_nan=False) + "\n").encode()


def _digest(folder: Path, facts: Facts) -> str:
    found = hashlib.sha256(json_bytes(facts.identity()))
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            found.update(path.name.encode())
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:12]


def _move(partial: Path, final: Path) -> None:
    """Put a folder into place; one that is there already steps aside first."""
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        final.rename(aside)
        try:
            partial.rename(final)
        except OSError:
            aside.rename(final)
            raise
        shutil.rmtree(aside, ignore_errors=True)
