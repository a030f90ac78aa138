"""The folder that ``planish reduce`` writes: a bundle again, with a readable module in it."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from planish.ir.compare import bounds_of
from planish.ir.errors import ExportError, PlanishError, UnsupportedError, UsageError
from planish.ir.files import load
from planish.ir.program import Program
from planish.passes.debug.bundle import PROGRAM, Bundle, failure_of, load_bundle, replay
from planish.passes.debug.bundle_facts import NAME
from planish.passes.debug.bundle_readme import readme
from planish.passes.debug.bundle_writing import write_bundle
from planish.passes.debug.module_source import CONSTANTS, MODULE, write_module
from planish.passes.debug.reduce_check import module_problem

_WORD = re.compile(r"[A-Za-z_]\w*")


def check_folder(folder: Path) -> None:
    """Refuse to replace what is no bundle.

    Raises:
        UsageError: the folder exists and is none.
    """
    if folder.exists() and not (folder / NAME).is_file():
        raise UsageError(
            f"{folder} exists and is no bundle", hint="give a folder that does not exist yet"
        )


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder for what is not finished, on the same disk; gone in the end.

    Raises:
        ExportError: it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_reduced(bundle: Bundle, program: Program, scratch: Path, *, only: bool) -> Path:
    """Write a reduced program as a bundle, and replay that.

    Args:
        bundle: as the search replayed it.
        program: what it found.
        scratch: where to.
        only: whether the failing pass is enough.

    Raises:
        PlanishError: the bundle written does not fail in the same way.
    """
    recipe = bundle.recipe
    if only:
        recipe = replace(recipe, passes=recipe.passes[:1])
    error = replay(bundle, program, only_failing=only)
    if error is None:
        raise PlanishError("the reduced program fails only now and then", hint="reduce it again")
    names = program.signature.tensor_names
    probe: tuple[Any, ...] | None = None
    if bundle.probe is not None and bundle.probe.names == names:
        probe = next(iter(bundle.probe))
    batches = bundle.calibration
    facts = replace(
        bundle.facts,
        failure=failure_of(error),
        bounds=_bounds(bundle, program),
        sizes=bundle.facts.sizes if probe is not None else {},
        passes=bundle.facts.passes[: len(recipe.passes)],
    )
    written = write_bundle(
        scratch,
        facts,
        program,
        recipe,
        calibration=list(program.samples)
        if batches is not None and batches.names != names
        else batches,
        probe=probe,
        error=error,
    )
    again = replay(load_bundle(written))
    if again is None or failure_of(again).signature != bundle.failure.signature:
        happened = "nothing fails" if again is None else f"something else fails: {again}"
        raise PlanishError(
            f"the reduced program fails in memory, but not from its bundle: {happened}",
            hint=f"{bundle.folder} still reproduces; please report this",
        )
    return written


def _bounds(bundle: Bundle, program: Program) -> tuple[float, ...] | None:
    """What each output may differ by, as the search had it."""
    pinned, own = bundle.facts.bounds, bounds_of(program)
    if pinned is None:
        return None
    if program.signature == bundle.program.signature:
        return pinned
    return tuple(max(bound, *pinned) if bound and pinned else bound for bound in own)


def write_readable(written: Path, fails: Callable[[Program], bool]) -> tuple[bool, str | None]:
    """Write ``module.py`` into a bundle, and hold it to the program there.

    Returns:
        Whether it was written, and what keeps it from standing for the program.
    """
    program = load(written / PROGRAM)
    try:
        path = write_module(program, written)
    except UnsupportedError as error:
        return False, f"it cannot be written: {error.what}"
    problem = module_problem(path, program, fails)
    words = set(_WORD.findall(" ".join(load_bundle(written, program=False).facts.passes)))
    named = sorted(words & {n.name for n in program.operators})
    if problem is not None and named:
        problem += f" (the recipe names the node {named[0]}, and capture names nodes anew)"
    return True, problem


def describe(written: Path, final: Path, *, module: bool, problem: str | None) -> None:
    """Say in ``README.txt`` where the bundle will be, and what came to it."""
    facts = load_bundle(written, program=False).facts
    lines = ["", "It was reduced: the program holds only what the failure needs."]
    if module:
        beside = f", its larger tensors in {CONSTANTS}" if (written / CONSTANTS).exists() else ""
        lines.append(f"{MODULE} is that program as a PyTorch module{beside}; build() returns")
        lines.append("(module, example_inputs, dynamic_shapes).")
    if problem is not None:
        lines.append(f"Only {PROGRAM} reproduces the failure. {MODULE}: {problem}")
    text = readme(written, final, facts) + "\n".join(lines) + "\n"
    (written / "README.txt").write_text(text, encoding="utf-8")


def move(written: Path, folder: Path) -> None:
    """Put the new bundle into place; one that is there already steps aside first.

    Raises:
        ExportError: it cannot be moved.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        if folder.exists():
            folder.rename(aside)
        try:
            written.rename(folder)
        except OSError:
            if aside.exists():
                aside.rename(folder)
            raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    shutil.rmtree(aside, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> ExportError:
    return ExportError(
        f"{folder} could not be written: {error.strerror or error}",
        hint="check that the folder it lies in is writable and has room",
    )
