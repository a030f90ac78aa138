"""What ``optimize`` returns: the model, the program, the report, and the way to a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.errors import ExportError, UsageError
from planish.ir.program import Program
from planish.model import OptimizedModule
from planish.report import Report

if TYPE_CHECKING:
    from planish.backends.base import Artifact
    from planish.ir.compare import Fidelity
    from planish.passes.recipe import Recipe
    from planish.sparse_cuda import SparseModule

# suffix -> targets that write it, the preferred one first
_SUFFIXES = {
    ".onnx": ("onnxruntime-cpu", "onnx"),
    ".pt": ("torchscript",),
    ".pt2": ("torch-export", "aotinductor"),
}


class Optimized:
    """An optimized program with everything known about it.

    Attributes:
        program: the optimized program, before any target's legalization.
        recipe: fully resolved; replaying it on the same model gives the same program.
        report: what each pass did and what it cost; grows a ``runtime`` part by ``export``.

    Args:
        repro_dir: where the bundle of a failed export goes; None takes the folder that
            ``PLANISH_REPRO_DIR`` names, else the system's for temporary files.
    """

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        report: Report,
        *,
        repro_dir: str | Path | None = None,
    ):
        self.program = program
        self.recipe = recipe
        self.report = report
        self._repro_dir = repro_dir

    @cached_property
    def model(self) -> OptimizedModule:
        """The program as an ``nn.Module`` with the caller's own signature and output structure."""
        return OptimizedModule(self.program)

    def sparse_model(self, device: str = "cuda") -> SparseModule:
        """A copy of ``model`` on a GPU, whose 2:4 linears run through sparse tensor cores.

        Weights of f16 or bf16 (``sparsify, cast-half``) in multiples of 32 x 64 are packed; all
        else stays dense, and ``choice.dense`` of the result says why, by name.

        Args:
            device: "cuda" or "cuda:1", of compute capability 8.0 or later.

        Raises:
            UnsupportedError: the device cannot do it, or no weight can be packed.
        """
        from planish.sparse_cuda import sparse_module

        return sparse_module(self.program, device)

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
            UsageError: an argument is of the wrong kind.
            ExportError: the file cannot be written or disagrees with the program.
            UnsupportedError: the target cannot represent an operator; names it.
                Like every failure to emit it names the bundle that replays it.
        """
        from planish.backends.base import ExportOptions
        from planish.backends.registry import load_backend
        from planish.failed_exports import reproducible

        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"the path is {path!r}", hint="name a file: 'model.onnx'")
        if opset is not None and not isinstance(opset, int):
            raise UsageError(f"opset is {opset!r}", hint="give an integer, or None")
        path = Path(path)
        remarks: list[str] = []
        target = self._target_for(path, target, remarks)
        start = time.perf_counter()
        options = ExportOptions(
            opset=opset,
            metadata=partial(self._metadata, target),
            choices=dict(self.recipe.choices) if target == self.recipe.target else None,
            verify=verify,
            remark=remarks.append,
            quantization=self._quantization(),
        )
        backend = load_backend(target)
        if not backend.target.checks_sizes:
            remarks += [
                f"the file is right for {name} up to {high}, and no runtime checks that"
                for name, (_, high) in self._ranges().items()
                if high is not None
            ]
        backend.target.check_opset(opset)
        with reproducible(
            self.program, self.recipe, target, path, options, self._repro_dir
        ) as kept:
            artifact = backend.export(self.program, path, kept)
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

    def _metadata(self, target: str, choices: Mapping[str, str]) -> dict[str, str]:
        """What the file says of its own making; nothing that differs between equal runs.

        The recipe is the one that makes this file again, with the choices that were made for it:
        a file that replays them must not differ from the one they were measured for.
        """
        fidelity = self.report.fidelity
        recipe = replace(self.recipe, target=target, choices=dict(choices))
        return {
            "planish.version": self.report.versions["planish"],
            "planish.recipe": str(recipe),
            "planish.target": target,
            "planish.seed": str(self.recipe.seed),
            "planish.fidelity": json.dumps(fidelity.to_dict() if fidelity else None),
            "planish.ranges": json.dumps(self._ranges()),
            **({"planish.sparsity": json.dumps(layouts)} if (layouts := self._layouts()) else {}),
            **({"planish.instruction_sets": json.dumps(sets)} if (sets := self._sets()) else {}),
        }

    def _layouts(self) -> dict[str, str]:
        """Constant -> the sparse layout it claims."""
        return {name: str(layout) for name, layout in sorted(self.program.layouts.items())}

    def _sets(self) -> tuple[str, ...]:
        """The processors on which a quantized program's integer kernels give its answers."""
        from planish.backends.stepwise import is_quantized
        from planish.passes.quantize.saturation import instruction_sets

        return instruction_sets(self.program) if is_quantized(self.program) else ()

    def _quantization(self) -> Fidelity | None:
        """What the passes did to the outputs; None where the program came quantized already."""
        lossy = any(p.contract == "lossy" and p.changes for p in self.report.passes)
        return self.report.fidelity if lossy else None

    def _ranges(self) -> dict[str, tuple[int, int | None]]:
        """Dimension name -> smallest and largest legal size, None for no bound."""
        signature = self.program.signature
        return {
            signature.symbols.get(symbol, symbol): bounds
            for symbol, bounds in sorted(signature.ranges.items())
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
                steps = artifact.comparison.stepwise
                runtime["max_abs"] = artifact.comparison.max_abs
                runtime["fidelity"] = artifact.comparison.fidelity.to_dict()
                runtime["stepwise"] = steps.to_dict() if steps is not None else None
            runtime["kernels"] = [use.to_dict() for use in artifact.kernels]
            if artifact.sparsity:
                runtime["sparsity"] = [found.to_dict() for found in artifact.sparsity]
            runtime["instruction_sets"] = list(self._sets())
        self.report = replace(
            self.report,
            runtime=runtime,
            seconds={**self.report.seconds, "export": seconds},
            remarks=tuple(dict.fromkeys((*self.report.remarks, *remarks))),
        )
        if artifact.target == self.recipe.target:
            self.recipe = replace(self.recipe, choices=dict(artifact.choices))
            self.report = replace(
                self.report, recipe=str(self.recipe), recipe_yaml=self.recipe.to_yaml()
            )
