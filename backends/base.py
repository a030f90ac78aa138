"""What a target is, what a backend does for it, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from planish.ir.compare import Fidelity
from planish.ir.errors import ExportError
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout

# A protobuf message cannot exceed 2 GiB; the rest of the file needs room too.
PROTOBUF_LIMIT_BYTES = 2**31 - 2**24


@dataclass(frozen=True, kw_only=True)
class Target:
    """A place a program can be deployed to.

    Attributes:
        name: as users write it.
        summary: one sentence for ``--help``.
        suffix: of the artifact's file name.
        opset: default ONNX operator set version; 0 where the format has none.
        opsets: smallest and largest version it can be asked for; (0, 0) where it has none.
        checks_sizes: whether its files refuse sizes above those that the program is right for.
    """

    name: str
    summary: str
    suffix: str
    opset: int
    opsets: tuple[int, int]
    checks_sizes: bool = False

    def check_opset(self, opset: int | None) -> int:
        """The operator set version to emit.

        Raises:
            ExportError: the target does not know this version.
        """
        if opset is None:
            return self.opset
        smallest, largest = self.opsets
        if not largest:
            raise ExportError(
                f"target {self.name!r} has no opset: that is a thing of ONNX files",
                hint="leave opset out, or name the file *.onnx",
            )
        if not smallest <= opset <= largest:
            raise ExportError(
                f"target {self.name!r} cannot be written with opset {opset}",
                hint=f"use an opset from {smallest} to {largest}, or none for {self.opset}",
            )
        return opset


def _no_remark(sentence: str) -> None:
    """Drop a remark."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to write an artifact.

    Attributes:
        opset: ONNX operator set version; None for the target's default.
        metadata: written into the artifact (recipe, fidelity, version), in this order; or a
            function that makes it from the lowering choices.
        choices: lowering choices to replay; None to take them from measurements.
        external_data_bytes: constants go to a second file once all of them exceed this.
        verify: whether to run the artifact and compare it with the program.
        remark: takes a sentence for the report.
        quantization: how near a quantized program is to the float one it was made of, where that
            is known; the file must not be further from the program than that.
    """

    opset: int | None = None
    metadata: Mapping[str, str] | Callable[[Mapping[str, str]], Mapping[str, str]] = field(
        default_factory=dict
    )
    choices: Mapping[str, str] | None = None
    external_data_bytes: int = PROTOBUF_LIMIT_BYTES
    verify: bool = True
    remark: Callable[[str], None] = _no_remark
    quantization: Fidelity | None = None


@dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """What the runtime made of an artifact.

    Attributes:
        runtime: name and version, "onnxruntime 1.32.0".
        providers: execution providers in order of preference.
        operators: operator -> how many the runtime runs after its own optimization. Operators
            outside of the standard set carry their domain: ``com.microsoft.nchwc.Conv``.
        notes: sentences on what the runtime did that a reader would not expect.
    """

    runtime: str
    providers: tuple[str, ...]
    operators: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "runtime": self.runtime,
            "providers": list(self.providers),
            "operators": dict(self.operators),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """How near a quantized artifact is to its program, one operator at a time.

    Every operator was fed with the artifact's own values; the runtime's graph optimizations were
    off. What differed by more than is allowed is an error, so these are the differences within.

    Attributes:
        probes: what was compared.
        values: how many nodes of the program have a value of their own in the artifact and agree.
        unchecked: names of nodes whose value could not be judged: it depends on the last bit of
            numbers that the artifact does not show.
        max_steps: largest difference of integers, in quantization steps.
        max_relative: largest difference of real numbers, relative to the largest of the value.
    """

    probes: tuple[str, ...]
    values: int
    unchecked: tuple[str, ...]
    max_steps: int
    max_relative: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "probes": list(self.probes),
            "values": self.values,
            "unchecked": list(self.unchecked),
            "max_steps": self.max_steps,
            "max_relative": self.max_relative,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How near an artifact's outputs are to the program's.

    Attributes:
        probes: what was compared, "sample 0", "batch=3, sequence=129".
        fidelity: the worst of each metric over all probes, with all of the runtime's
            optimizations.
        stepwise: the comparison operator by operator; None for a float program, whose whole
            outputs must agree.
    """

    probes: tuple[str, ...]
    fidelity: Fidelity
    stepwise: Stepwise | None = None

    @property
    def max_abs(self) -> float:
        """Largest absolute difference."""
        return self.fidelity.max_abs


@dataclass(frozen=True, kw_only=True)
class KernelUse:
    """What runs one quantized operator.

    Attributes:
        node: name of the operator's node in the program.
        operator: as it is printed, "aten.linear".
        source: the user's source line, if known.
        kernel: the integer kernel, "QLinearConv"; None where it runs in float.
        reason: why it runs in float; empty where it does not.
    """

    node: str
    operator: str
    source: str | None
    kernel: str | None
    reason: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "node": self.node,
            "operator": self.operator,
            "source": self.source,
            "kernel": self.kernel,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class SparseInFile:
    """A sparse weight of the program, as the file was read back.

    Attributes:
        constant: of the program.
        layout: that it claims.
        stored: the constants of the file that hold it.
        exact: whether each of its rows was found there as it is; else the weight was rearranged,
            and the share of zeros was counted.
    """

    constant: str
    layout: SparseLayout
    stored: tuple[str, ...]
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "constant": self.constant,
            "layout": str(self.layout),
            "stored": list(self.stored),
            "exact": self.exact,
        }


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A written file.

    Attributes:
        path: the file.
        target: name of the target it was written for.
        files: all files that belong together, ``path`` first.
        bytes: their size together.
        opset: ONNX operator set version.
        input_names: in the order of the program's tensor inputs.
        output_names: in the order of the program's tensor outputs.
        choices: the lowering choices made; pass them to ``ExportOptions`` to get the same file.
        operators: operator -> count in the file, before any runtime touched it.
        comparison: how close it is to the program; None where not verified.
        runtime: what the runtime made of it; None where not verified.
        kernels: each operator that the program quantizes, as an integer kernel of the runtime or
            as a float fallback; empty for a float program, and where not verified.
        sparsity: each weight that the program types sparse, as it was found in the file; empty
            where none is, and where not verified.
    """

    path: Path
    target: str
    files: tuple[Path, ...]
    bytes: int
    opset: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    choices: Mapping[str, str]
    operators: Mapping[str, int]
    comparison: Comparison | None = None
    runtime: RuntimeReport | None = None
    kernels: tuple[KernelUse, ...] = ()
    sparsity: tuple[SparseInFile, ...] = ()


class Backend(ABC):
    """Lowers programs to one target, runs the artifacts and reads back what happened."""

    target: ClassVar[Target]

    @abstractmethod
    def export(
        self, program: Program, path: str | Path, options: ExportOptions | None = None
    ) -> Artifact:
        """Legalize a copy, write it, check it against the program, move it into place.

        Raises:
            UnsupportedError: an operator has no translation; names the node and source line.
            ExportError: the file cannot be written, or disagrees with the program.
        """

    @abstractmethod
    def run(self, path: str | Path, inputs: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
        """Run an artifact on flat inputs."""

    @abstractmethod
    def opened(self, path: str | Path) -> Callable[[Sequence[Tensor]], object]:
        """An artifact loaded on one thread, as a function of flat inputs: for timing."""

    @abstractmethod
    def read_back(self, path: str | Path) -> RuntimeReport:
        """Load an artifact and say what the runtime made of it."""
