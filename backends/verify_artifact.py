"""Compare a written file with the program it came from, before it is moved into place.

A float program and its file agree in their whole outputs, within the bound of the dtype. A
quantized one agrees operator by operator (``planish.backends.stepwise``); its whole outputs drift
apart by roundings that fall the other way, and that drift is measured and reported. A small error
e of a value turns over a share e / step of its roundings, each by a whole step, so through many
layers the two end up with roundings that have nothing to do with one another: they are then 3 dB
further apart than each is from the float program. Twice that is an error: ``DRIFT_MARGIN_DB``
beyond what quantizing itself did on the samples. Where that is not known, and at inputs that are
no samples, the outputs must agree to ``DRIFT_FLOOR_DB``. A drift of at least ``DRIFT_FINE_DB`` is
fine in any case: a program that quantizing hardly moved still rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.base import Comparison, KernelUse, RuntimeReport, Stepwise
from planish.backends.kernels import kernel_uses
from planish.backends.ort_run import Session
from planish.backends.stepwise import Emission, is_quantized, stepwise
from planish.ir.compare import Fidelity, bounds_of, difference, measure, sqnr_db, worst
from planish.ir.errors import ExportError
from planish.ir.execute import run
from planish.ir.probe import second_reference
from planish.ir.program import Program

DRIFT_MARGIN_DB = 6.0
DRIFT_FLOOR_DB = 6.0  # half of the signal
DRIFT_FINE_DB = 30.0
SAMPLE = "sample"


def verify_artifact(
    program: Program,
    path: Path,
    remark: Callable[[str], None],
    *,
    emission: Emission | None = None,
    quantization: Fidelity | None = None,
) -> tuple[Comparison, RuntimeReport, tuple[KernelUse, ...]]:
    """Run the file on every sample and on a second probe of other sizes.

    Args:
        program: what the file must compute.
        path: the file.
        remark: told what could not be checked.
        emission: what was written; a quantized program needs it.
        quantization: how near a quantized program is to the float one; None where not known.

    Returns:
        How near the file is to the program, what the runtime made of it, and what runs each
        quantized operator.

    Raises:
        ExportError: an output of a float program differs by more than the bound of its dtype, an
            operator of a quantized one by more than a step, or its outputs by more than
            quantizing moved them; names it.
    """
    bounds = bounds_of(program)
    quantized = is_quantized(program)
    probes = probes_of(program, remark)
    steps: Stepwise | None = None
    if quantized:
        assert emission is not None
        steps = stepwise(emission, path, [(label, inputs) for label, inputs, _ in probes])
    with Session(path, read_back=True) as session:
        found: list[Fidelity] = []
        for label, inputs, expected in probes:
            outputs = tensors(program, session.run(inputs))
            names = program.signature.output_names
            known = quantization if label.startswith(SAMPLE) else None
            problem = (
                drift(expected, outputs, known)
                if quantized
                else difference(expected, outputs, names=names, bounds=bounds)
            )
            if problem:
                raise ExportError(
                    f"the file does not compute what the program does: {problem}",
                    where=f"{path.name}, {label}",
                    hint="this is a defect of planish or of the runtime: report it with the model",
                )
            found.append(measure(expected, outputs))
        fidelity = worst(found) or measure((), ())  # a program built by hand has no samples
        labels = tuple(label for label, _, _ in probes)
        kernels: tuple[KernelUse, ...] = ()
        if quantized:
            assert emission is not None
            # A file too large to be written out again runs in the kernels that it names itself.
            kernels = kernel_uses(emission.emitter, session.optimized() or emission.model)
        comparison = Comparison(probes=labels, fidelity=fidelity, stepwise=steps)
        return comparison, session.report(), kernels


def drift(
    expected: Sequence[Any], outputs: Sequence[Any], quantization: Fidelity | None
) -> str | None:
    """Say that roundings moved the outputs by more than quantizing did."""
    least = DRIFT_FLOOR_DB
    if quantization is not None:
        least = min(quantization.sqnr_db - DRIFT_MARGIN_DB, DRIFT_FINE_DB)
    for position, (b, a) in enumerate(zip(expected, outputs, strict=True)):
        problem = difference([b], [a])
        if problem is None:
            continue
        if not isinstance(b, Tensor) or not isinstance(a, Tensor) or a.shape != b.shape:
            return problem
        if not b.is_floating_point():
            continue  # an index of the largest number may change with its last bit
        found = sqnr_db(b, a)
        if found < least:
            reason = (
                f"quantizing itself left {quantization.sqnr_db:.1f} dB"
                if quantization is not None
                else f"at least {least:.0f} dB are asked of any quantized file"
            )
            return f"output {position} agrees to {found:.1f} dB SQNR only; {reason}"
    return None


def probes_of(
    program: Program, remark: Callable[[str], None]
) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
    """(label, inputs, what the program answers): the samples, then other sizes."""
    probes: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        (f"{SAMPLE} {i}", sample, run(program, sample)) for i, sample in enumerate(program.samples)
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
