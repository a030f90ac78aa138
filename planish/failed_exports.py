"""Bundles of failed exports: written by ``Optimized.export``, replayed by ``planish repro``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.errors import PlanishError
from planish.ir.program import Program

if TYPE_CHECKING:
    from planish.backends.base import ExportOptions
    from planish.passes.debug.bundle import Bundle
    from planish.passes.recipe import Recipe


@contextmanager
def reproducible(
    program: Program,
    recipe: Recipe,
    target: str,
    path: Path,
    options: ExportOptions,
    folder: str | Path | None,
) -> Iterator[ExportOptions]:
    """Write a bundle if the body, an export, fails for another reason than the path.

    Args:
        program: what is exported.
        recipe: what made it.
        target: what it is exported for.
        path: where to.
        options: how.
        folder: for the bundle.

    Yields:
        The options to export with: they tell which lowering choices were made before it failed.
    """
    from planish.passes.debug.bundle import is_failure

    made: dict[str, str] = dict(options.choices or {})
    known = [options.choices is not None]

    def noting(choices: Mapping[str, str]) -> Mapping[str, str]:
        made.update(choices)
        known[0] = True
        given = options.metadata
        return given(choices) if callable(given) else given

    try:
        yield replace(options, metadata=noting)
    except Exception as error:  # whatever an emitter or a runtime may raise
        # What the file system says of the path has nothing to do with the program.
        of_path = isinstance(error.__cause__ or error, OSError)
        if is_failure(error) and not of_path and path.parent.is_dir() and not path.is_dir():
            choices = made if known[0] else None
            _bundle(error, program, recipe, target, replace(options, choices=choices), folder)
        raise


def _bundle(
    error: Exception,
    program: Program,
    recipe: Recipe,
    target: str,
    options: ExportOptions,
    folder: str | Path | None,
) -> None:
    from planish.passes.debug.bundle import Export, Facts, failure_of, write_bundle
    from planish.passes.debug.reproduce import bundle_folder, tell

    facts = Facts(
        stage="export",
        failure=failure_of(error),
        seed=recipe.seed,
        export=Export(target, options.opset, options.choices, options.verify),
    )
    settings = replace(recipe, passes=(), target=target, choices=dict(options.choices or {}))
    try:
        found = write_bundle(bundle_folder(folder), facts, program, settings, error=error)
    except Exception as problem:  # the first error must show, whatever keeps us
        why = problem.what if isinstance(problem, PlanishError) else repr(problem)
        error.add_note(f"no bundle was written to replay this: {why}")
    else:
        tell(error, found)


def replay_export(bundle: Bundle, program: Program) -> BaseException | None:
    """Export a program as a bundle says, into a folder that goes away.

    Returns:
        The error, or None where none was raised.
    """
    from planish.backends.base import ExportOptions
    from planish.backends.registry import load_backend

    export = bundle.facts.export
    assert export is not None
    backend = load_backend(export.target)
    options = ExportOptions(opset=export.opset, choices=export.choices, verify=export.verify)
    with tempfile.TemporaryDirectory(prefix="planish-replay-") as folder:
        try:
            backend.export(program, Path(folder) / f"model{backend.target.suffix}", options)
        except Exception as error:  # whatever it is: it is what the caller asks for
            return error
    return None
