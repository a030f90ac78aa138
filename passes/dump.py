"""The instrument that writes every state of a run into a folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from planish.ir.errors import UsageError
from planish.ir.files import save
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import PassResult
from planish.passes.debug.bundle_writing import is_bundle_name
from planish.passes.steps import Instrument, Run, Step

_MANIFEST = ".planish-dump.json"


class Dump(Instrument):
    """Write the program after every pass: numbered canonical text, and a program that reloads.

    ``000_capture.txt`` and ``.pt2``, then ``001_<pass>.txt`` and ``.pt2``, and so on; after a
    failure ``00N_<pass>.failed.txt``, if the pass returned anything. A program that did not change
    is a link to the file before it. Bundles of earlier failures in the folder stay.

    Args:
        folder: made if it is missing; files of an earlier dump in it are replaced.
        programs: also write the ``.pt2`` files.
    """

    def __init__(self, folder: str | Path, *, programs: bool = True):
        self.folder = Path(folder)
        self.programs = programs
        self._written: list[str] = []
        self._last: Path | None = None

    def before_pipeline(self, run: Run) -> None:
        """Clear the folder of an earlier dump and write the captured program.

        Raises:
            UsageError: the folder cannot be written, or holds files that no dump wrote.
        """
        self._written, self._last = [], None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = [e.name for e in self.folder.iterdir() if not is_bundle_name(e.name)]
            present = set(entries)  # what replays an earlier failure stays
        except OSError as error:
            raise UsageError(
                f"the dump folder cannot be written: {error.strerror}",
                where=str(self.folder),
                hint="name a folder of your own, and no file",
            ) from error
        foreign = sorted(present - self._earlier() - {_MANIFEST})
        if foreign:
            raise UsageError(
                f"the dump folder holds files that no dump wrote: {', '.join(foreign[:3])}",
                where=str(self.folder),
                hint="name an empty or new folder",
            )
        for name in present - {_MANIFEST}:
            (self.folder / name).unlink()
        self._write(0, "capture", run.original, changed=True)

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Write the program after a pass."""
        self._write(step.index, step.name, result.program, changed=step.record.changed)

    def after_failure(self, step: Step, error: BaseException) -> None:
        """Write the text of a program that was rejected."""
        if step.after is not None:
            self._text(f"{_stem(step.index, step.name)}.failed.txt", text(step.after))

    def _write(self, index: int, name: str, program: Program, *, changed: bool) -> None:
        stem = _stem(index, name)
        self._text(f"{stem}.txt", text(program))
        if not self.programs:
            return
        path = self.folder / f"{stem}.pt2"
        self._remember(path.name)
        if changed or self._last is None or not _linked(self._last, path):
            save(program, path)
        self._last = path

    def _text(self, name: str, content: str) -> None:
        self._remember(name)
        (self.folder / name).write_text(content, encoding="utf-8")

    def _remember(self, name: str) -> None:
        """Say that a file is ours before it exists, so that an interrupted dump can be replaced."""
        self._written.append(name)
        manifest = self.folder / _MANIFEST
        fresh = manifest.with_name(_MANIFEST + ".new")
        fresh.write_text(json.dumps(self._written), encoding="utf-8")
        fresh.replace(manifest)

    def _earlier(self) -> set[str]:
        """The names that an earlier dump into this folder wrote."""
        try:
            names = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return set()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the list of files in the dump folder cannot be read: {error}",
                where=str(self.folder / _MANIFEST),
                hint="name an empty or new folder",
            ) from error
        return {str(name) for name in names} | {_MANIFEST + ".new"}


def _stem(index: int, name: str) -> str:
    return f"{index:03}_" + re.sub(r"[^\w.-]", "_", name)


def _linked(old: Path, new: Path) -> bool:
    """Link ``new`` to ``old``; False where the file system has no links."""
    try:
        os.link(old, new)
    except OSError:
        return False
    return True
