"""A bundle: a folder that holds all it takes to make a failure happen again, elsewhere.

    program.pt2      the program right before it failed, with its sample inputs
    recipe.yaml      the passes from there on, with target, seed and choices
    probe.zip        the second inputs that programs were compared at, if they were
    calibration.zip  the calibration inputs, if there were any
    repro.json       the failure, the settings of the run, versions, what could not be bundled
    error.txt        the error as Python shows it
    README.txt       how to replay it

Nothing in it is pickled, and reading it runs no code but planish's own. Only replaying imports the
passes that the recipe names as ``module:Class``.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from planish.ir.archive import Archive
from planish.ir.errors import UnsupportedError, UsageError
from planish.ir.files import load
from planish.ir.program import Program
from planish.passes.debug.bundle_facts import Export, Facts, Sites, read_facts
from planish.passes.debug.bundle_failure import Failure, failure_of, is_failure
from planish.passes.debug.bundle_inputs import Inputs
from planish.passes.debug.bundle_replay import replay
from planish.passes.debug.bundle_writing import (
    CALIBRATION,
    PROBE,
    PROGRAM,
    RECIPE,
    command,
    is_bundle_name,
    write_bundle,
)
from planish.passes.recipe import Recipe

__all__ = [
    "CALIBRATION",
    "PROBE",
    "PROGRAM",
    "RECIPE",
    "Bundle",
    "Export",
    "Facts",
    "Failure",
    "Sites",
    "command",
    "failure_of",
    "is_bundle_name",
    "is_failure",
    "load_bundle",
    "replay",
    "write_bundle",
]


class Bundle:
    """A bundle on disk. ``load_bundle`` makes one.

    Attributes:
        folder: where it is.
        facts: what ``repro.json`` says.
    """

    def __init__(self, folder: Path, facts: Facts):
        self.folder = folder
        self.facts = facts

    @property
    def failure(self) -> Failure:
        """What went wrong."""
        return self.facts.failure

    @cached_property
    def program(self) -> Program:
        """The program right before it failed; for the stage ``"recipe"`` the original one.

        Raises:
            UsageError: the file is missing, damaged, or not in planish's own format.
        """
        path = self.folder / PROGRAM
        with Archive(path) as archive:
            if "planish.json" not in archive.names:
                raise UsageError(
                    f"{path} is not a program that planish saved",
                    hint="a bundle holds no other; it was exchanged, do not trust it",
                )
        try:
            return load(path)
        except UnsupportedError as error:
            raise UsageError(error.what, where=error.where, hint=error.hint) from error

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe from the failing pass on. Reading it imports passes named ``module:Class``.

        Raises:
            RecipeError: the file is damaged, or a pass cannot be imported.
        """
        return Recipe.load(self.folder / RECIPE)

    @property
    def calibration(self) -> Inputs | None:
        """The calibration inputs, read batch by batch."""
        path = self.folder / CALIBRATION
        return Inputs(path) if path.exists() else None

    @property
    def probe(self) -> Inputs | None:
        """The second probe, as the only batch; None where nothing was compared there."""
        path = self.folder / PROBE
        return Inputs(path) if path.exists() else None


def load_bundle(path: str | os.PathLike[str], *, program: bool = True) -> Bundle:
    """Open a bundle. Nothing in it is unpickled, and nothing is imported.

    Args:
        path: the folder.
        program: also read the program, which may be large.

    Raises:
        UsageError: it is no bundle, a file is missing or damaged, or the format is unknown.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(
            f"{folder} {what}", hint="give the folder planish-repro-... that the error named"
        )
    facts = read_facts(folder)
    for name in (PROGRAM, RECIPE):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}", hint="copy the whole bundle again")
    found = Bundle(folder, facts)
    for inputs in (found.probe, found.calibration):
        if inputs is not None:
            len(inputs)  # opening it has checked its index
    if program:
        _ = found.program
    return found
