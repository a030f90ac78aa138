"""Compare a written file with the program it came from, before it is moved into place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.base import Comparison, RuntimeReport
from planish.backends.ort_run import Session
from planish.ir.compare import Fidelity, bounds_of, difference, measure, worst
from planish.ir.errors import ExportError
from planish.ir.execute import run
from planish.ir.probe import second_reference
from planish.ir.program import Program


def verify_artifact(
    program: Program, path: Path, remark: Callable[[str], None]
) -> tuple[Comparison, RuntimeReport]:
    """Run the file on every sample and on a second probe of other sizes.

    Args:
        program: what the file must compute.
        path: the file.
        remark: told what could not be checked.

    Raises:
        ExportError: an output differs by more than the bound of its dtype; names it.
    """
    bounds = bounds_of(program)
    with Session(path, read_back=True) as session:
        probes: list[str] = []
        found: list[Fidelity] = []
        for label, inputs, expected in _probes(program, remark):
            outputs = tensors(program, session.run(inputs))
            problem = difference(
                expected, outputs, names=program.signature.output_names, bounds=bounds
            )
            if problem:
                raise ExportError(
                    f"the file does not compute what the program does: {problem}",
                    where=f"{path.name}, {label}",
                    hint="this is a defect of planish or of the runtime: report it with the model",
                )
            probes.append(label)
            found.append(measure(expected, outputs))
        fidelity = worst(found) or measure((), ())  # a program built by hand has no samples
        return Comparison(probes=tuple(probes), fidelity=fidelity), session.report()


def _probes(
    program: Program, remark: Callable[[str], None]
) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
    """(label, inputs, what the program answers): the samples, then other sizes."""
    probes: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        (f"sample {i}", sample, run(program, sample)) for i, sample in enumerate(program.samples)
    ]
    second = second_reference(program)
    if not second.resized:
        for sentence in second.rejected:
            remark(f"the file was not compared at other sizes: {sentence}")
    if second.inputs is not None:
        sizes = ", ".join(f"{k}={v}" for k, v in (second.sizes or {}).items())
        probes.append((sizes or "other values", second.inputs, second.outputs))
    return probes


def tensors(program: Program, arrays: Sequence[np.ndarray]) -> list[Any]:
    """A file's outputs in the program's own form: constants put back, sizes as numbers."""
    rest = iter(arrays)
    outputs: list[Any] = []
    for result in program.results:
        if not isinstance(result, Node):
            outputs.append(result)
            continue
        array = next(rest)
        tensor = torch.from_numpy(np.array(array))  # a copy: the runtime owns its buffer
        outputs.append(tensor if isinstance(result.meta["val"], Tensor) else tensor.item())
    return outputs
