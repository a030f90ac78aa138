"""The target ``onnxruntime-cpu``: the same program in the forms this runtime runs fastest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from planish.backends.base import ExportOptions, Target
from planish.backends.onnx_export import OnnxBackend
from planish.ir.program import Program

if TYPE_CHECKING:
    import onnx

    from planish.backends.onnx_view import Style


class OnnxRuntimeCpu(OnnxBackend):
    """ONNX Runtime on a CPU."""

    target: ClassVar[Target] = Target(
        name="onnxruntime-cpu",
        summary="an ONNX file in the forms that ONNX Runtime runs fastest on this kind of CPU",
        suffix=".onnx",
        opset=23,
        opsets=(18, 24),
    )

    def style(
        self, program: Program, opset: int, options: ExportOptions
    ) -> tuple[Style, Mapping[str, str]]:
        """The measured choices, or those to be replayed."""
        from planish.backends.ort_legalize import choose

        return choose(program, opset, options)

    def check(self, model: onnx.ModelProto, path: Path) -> None:
        """Loading it in the runtime is the check; it knows the operators of its own."""
