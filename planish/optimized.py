"""What ``optimize`` returns: the model, the program, the report, and the way to a file."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.errors import ExportError
from planish.ir.program import Program
from planish.model import OptimizedModule
from planish.report import Report

if TYPE_CHECKING:
    from planish.backends.base import Artifact
    from planish.passes.recipe import Recipe

# suffix -> targets that write it, the preferred one first
_SUFFIXES = {".onnx": ("onnxruntime-cpu", "onnx")}


class Optimized:
    """An optimized program with everything known about it.

    Attributes:
        program: the optimized program, before any target's legalization.
        recipe: fully resolved; replaying it on the same model gives the same program.
        report: what each pass did and what it cost; grows a ``runtime`` part by ``export``.
    """

    def __init__(self, program: Program, recipe: Recipe, report: Report):
        self.program = program
        self.recipe = recipe
        self.report = report

    @cached_property
    def model(self) -> OptimizedModule:
        """The program as an ``nn.Module`` with the caller's own signature and output structure."""
        return OptimizedModule(self.program)

    def export(
        self,
        path: str | Path,
        *,
        target: str | None = None,
        opset: int | None = None,
        verify: bool = True,
    ) -> Artifact:
        """Write the deployable file.

        A copy is legalized for the target, written beside ``path``, run and compared with
        ``self.model`` on the samples and on a second set of sizes, then moved into place.

        Args:
            path: where to; the suffix says which kind of file.
            target: None for the one optimized for.
            opset: ONNX operator set version; None for the target's default.
            verify: False leaves out running the file.

        Raises:
            ExportError: the file cannot be written or disagrees with the program.
            UnsupportedError: the target cannot represent an operator; names it.
        """
        from planish.backends.base import ExportOptions
        from planish.backends.registry import load_backend

        path = Path(path)
        remarks: list[str] = []
        target = self._target_for(path, target, remarks)
        start = time.perf_counter()
        options = ExportOptions(
            opset=opset,
            metadata=self._metadata(target),
            choices=dict(self.recipe.choices) if target == self.recipe.target else None,
            verify=verify,
            remark=remarks.append,
        )
        artifact = load_backend(target).export(self.program, path, options)
        self._take_over(artifact, remarks, time.perf_counter() - start)
        return artifact

    def _target_for(self, path: Path, target: str | None, remarks: list[str]) -> str:
        writers = _SUFFIXES.get(path.suffix)
        if writers is None:
            raise ExportError(
                f"no target writes {path.suffix or 'files without a suffix'!r}",
                where=str(path),
                hint="name the file " + " or ".join(f"*{s}" for s in _SUFFIXES),
            )
        wanted = target or self.report.target
        if target is None and wanted not in writers:
            remarks.append(f"{path.name} is written for {writers[0]}, not for {wanted}")
            wanted = writers[0]
        elif wanted != self.report.target:
            remarks.append(f"the program was optimized for {self.report.target}, not for {wanted}")
        return wanted

    def _metadata(self, target: str) -> dict[str, str]:
        """What the file says of its own making; nothing that differs between equal runs."""
        fidelity = self.report.fidelity
        return {
            "planish.version": self.report.versions["planish"],
            "planish.recipe": str(self.recipe),
            "planish.target": target,
            "planish.seed": str(self.recipe.seed),
            "planish.fidelity": json.dumps(fidelity.to_dict() if fidelity else None),
        }

    def _take_over(self, artifact: Artifact, remarks: list[str], seconds: float) -> None:
        runtime = None
        if artifact.runtime is not None:
            runtime = {
                **artifact.runtime.to_dict(),
                "bytes": artifact.bytes,
                "path": artifact.path.name,
            }
            if artifact.comparison is not None:
                runtime["max_abs"] = artifact.comparison.max_abs
        self.report = replace(
            self.report,
            runtime=runtime,
            seconds={**self.report.seconds, "export": seconds},
            remarks=tuple(dict.fromkeys((*self.report.remarks, *remarks))),
        )
        if artifact.target == self.recipe.target:
            self.recipe = replace(self.recipe, choices=dict(artifact.choices))
