"""Emit a program as an ONNX file: build, write aside, check, move into place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from planish.backends.base import (
    Artifact,
    Backend,
    ExportOptions,
    KernelUse,
    RuntimeReport,
    SparseInFile,
    Target,
)
from planish.backends.onnx_file import publish, staged, write_model
from planish.ir.errors import ExportError
from planish.ir.program import Program

if TYPE_CHECKING:
    import onnx

    from planish.backends.onnx_view import Style


class OnnxBackend(Backend):
    """What the ONNX targets share."""

    @abstractmethod
    def style(
        self, program: Program, opset: int, options: ExportOptions
    ) -> tuple[Style, Mapping[str, str]]:
        """How to write operators that have several forms, and the choices to record."""

    def check(self, model: onnx.ModelProto, path: Path) -> None:
        """What must hold of every file of this target before it is run."""

    def opset(self, program: Program, options: ExportOptions) -> int:
        """The operator set version to write: the target's own, or what the program needs.

        Raises:
            ExportError: a version was asked for that cannot say what the program does.
        """
        from planish.backends.onnx_quantize import opset_needed

        opset, needed = self.target.check_opset(options.opset), opset_needed(program)
        if needed <= opset:
            return opset
        if options.opset is not None:
            raise ExportError(
                f"opset {opset} cannot write this program's quantized values",
                hint=f"use opset {needed} or later, or none",
            )
        options.remark(f"opset {needed} instead of {opset}: the program's quantized values need it")
        return self.target.check_opset(needed)

    def export(
        self, program: Program, path: str | Path, options: ExportOptions | None = None
    ) -> Artifact:
        """Emit, write aside, run and compare, move into place."""
        from planish.backends.onnx_bfloat16 import in_float32
        from planish.backends.onnx_build import build, count_operators
        from planish.backends.onnx_translate import emit
        from planish.backends.sparse_files import sparse_in_file
        from planish.backends.stepwise import Emission
        from planish.backends.verify_artifact import verify_artifact

        options = options or ExportOptions()
        goal = Path(path)
        opset = self.opset(program, options)
        with staged(goal) as aside:
            style, choices = self.style(program, opset, options)
            metadata = options.metadata  # told of the choices before anything can fail by them
            facts = metadata(choices) if callable(metadata) else metadata
            emitter = emit(in_float32(program, options.remark), opset, style)
            model, initializers, outputs = build(emitter, facts)
            files = write_model(
                model, initializers, aside, external_data_bytes=options.external_data_bytes
            )
            self.check(model, aside)
            operators = count_operators(model)
            comparison, runtime = None, None
            kernels: tuple[KernelUse, ...] = ()
            sparsity: tuple[SparseInFile, ...] = ()
            if options.verify:
                sparsity = sparse_in_file(program, aside)
                comparison, runtime, kernels = verify_artifact(
                    program,
                    aside,
                    options.remark,
                    emission=Emission(emitter, model, initializers),
                    quantization=options.quantization,
                )
            final = publish(files, goal)
        return Artifact(
            path=goal,
            target=self.target.name,
            files=final,
            bytes=sum(f.stat().st_size for f in final),
            opset=opset,
            input_names=program.signature.tensor_names,
            output_names=outputs,
            choices=choices,
            operators=operators,
            comparison=comparison,
            runtime=runtime,
            kernels=kernels,
            sparsity=sparsity,
        )

    def run(self, path: str | Path, inputs: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
        """Run a file in ONNX Runtime on flat inputs."""
        from planish.backends.ort_run import Session

        return Session(Path(path)).run(inputs)

    def opened(self, path: str | Path) -> Callable[[Sequence[Tensor]], object]:
        """A file in an ONNX Runtime session of one thread."""
        from planish.backends.ort_run import Session

        return Session(Path(path), threads=1).run

    def read_back(self, path: str | Path) -> RuntimeReport:
        """Load a file in ONNX Runtime and read its optimized graph."""
        from planish.backends.ort_run import read_back

        return read_back(Path(path))


class PortableOnnx(OnnxBackend):
    """Standard operators only: loads in any ONNX runtime."""

    target: ClassVar[Target] = Target(
        name="onnx",
        summary="an ONNX file of standard operators, for any runtime",
        suffix=".onnx",
        opset=20,
        opsets=(18, 24),
    )

    def style(
        self, program: Program, opset: int, options: ExportOptions
    ) -> tuple[Style, Mapping[str, str]]:
        """Nothing to choose: what every runtime has, in the form that hurts none."""
        from planish.backends.onnx_view import Style

        return Style(), {}

    def check(self, model: onnx.ModelProto, path: Path) -> None:
        """Validate the file with ``onnx.checker``.

        Raises:
            ExportError: it is not a valid model.
        """
        import onnx.checker

        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise ExportError(
                f"the emitted file is not valid ONNX: {str(error).splitlines()[0]}",
                hint="this is a defect of planish: report it with the model",
            ) from error
