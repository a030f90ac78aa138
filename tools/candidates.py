"""Things that can be run and compared: files of each kind and models, behind one face."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from planish.ir.errors import UnsupportedError, UsageError
from planish.ir.program import Program

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Slot:
    """One input: its name, numpy dtype, and sizes (a name for a dynamic one)."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Candidate:
    """Something that maps named inputs to named outputs.

    Attributes:
        name: for tables.
        slots: its inputs; none for a file that does not say and takes what the others take.
        run: inputs by name -> outputs by name.
        load_ms: how long it took to load.
        bytes: size of its files; None for a model.
        samples: inputs it brings along, if any.
    """

    name: str
    slots: tuple[Slot, ...]
    run: Callable[[Values], Values]
    load_ms: float
    bytes: int | None = None
    samples: tuple[Values, ...] = field(default=())


def open_candidate(spec: str, *, threads: int = 1, trust_code: bool = False) -> Candidate:
    """Open an ``.onnx``, ``.pt`` or ``.pt2`` file or a ``MODEL``.

    Args:
        spec: what to open.
        threads: within an operator.
        trust_code: whether machine code in a file may be run.

    Raises:
        UsageError: there is no such file or model.
        UnsupportedError: the file cannot be run here.
    """
    from planish.tools.torch_candidates import open_pt2, open_script

    path = Path(spec)
    if path.suffix == ".onnx":
        return _open_onnx(path, threads)
    if path.suffix == ".pt":
        return open_script(path, threads)
    if path.suffix == ".pt2" and path.is_file():
        opened = open_pt2(path, threads, trust_code=trust_code)
        if opened is not None:
            return opened
    return _open_model(spec)


def _open_onnx(path: Path, threads: int) -> Candidate:
    import onnxruntime as ort

    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    start = time.perf_counter()
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own, undocumented kinds
        raise UnsupportedError(
            f"ONNX Runtime cannot load {str(path)!r}: {str(error).splitlines()[0]}",
            hint="check the file with onnx.checker, or export it again",
        ) from None
    load_ms = 1e3 * (time.perf_counter() - start)
    slots = tuple(
        Slot(i.name, _onnx_dtype(i.type), tuple(_dim(d, i.name, k) for k, d in enumerate(i.shape)))
        for i in session.get_inputs()
    )
    names = [o.name for o in session.get_outputs()]
    wanted = {slot.name for slot in slots}

    def run(values: Values) -> Values:
        given = {name: value for name, value in values.items() if name in wanted}
        return dict(zip(names, session.run(None, given), strict=True))

    size = sum(f.stat().st_size for f in path.parent.glob(path.name + "*") if f.is_file())
    return Candidate(str(path), slots, run, load_ms, size)


def _dim(value: object, name: str, axis: int) -> int | str:
    return value if isinstance(value, (int, str)) and value else f"{name}_dim_{axis}"


def _onnx_dtype(kind: str) -> np.dtype:
    names = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
    name = kind.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype(names.get(name, name))
    except TypeError:
        raise UnsupportedError(f"inputs of type {kind} cannot be made with numpy") from None


def _open_model(spec: str) -> Candidate:
    import planish
    from planish.ir.execute import run
    from planish.tools.loading import load_model

    start = time.perf_counter()
    loaded = load_model(spec)
    program = planish.optimize(
        loaded.model,
        loaded.example_inputs,
        dynamic_shapes=loaded.dynamic_shapes,
        recipe="none",
        target="onnx",
        verify="off",
    ).program
    signature = program.signature

    def call(values: Values) -> Values:
        flat = [torch.from_numpy(values[name]) for name in signature.tensor_names]
        outputs = run(program, flat)
        return {
            name: value.numpy()
            for name, value in zip(signature.output_names, outputs, strict=True)
            if isinstance(value, torch.Tensor)
        }

    samples = tuple(
        {n: v.numpy() for n, v in zip(signature.tensor_names, sample, strict=True)}
        for sample in program.samples
    )
    return Candidate(
        spec, _program_slots(program), call, 1e3 * (time.perf_counter() - start), samples=samples
    )


def _program_slots(program: Program) -> tuple[Slot, ...]:
    from planish.ir.tensortype import dim_text

    slots = []
    for node, name in zip(program.placeholders, program.signature.tensor_names, strict=True):
        value = node.meta["val"]
        shape = tuple(dim_text(d, program.signature.symbols) for d in value.shape)
        slots.append(Slot(name, torch.empty(0, dtype=value.dtype).numpy().dtype, shape))
    return tuple(slots)


def make_inputs(
    candidates: Sequence[Candidate], sizes: Mapping[str, int], *, seed: int = 0
) -> Values:
    """Inputs that every candidate can take.

    Samples of a model are used as they are unless sizes are asked for. Otherwise floats are
    drawn from a normal distribution, integers from 1 to 99, and inputs called ``*mask*`` are ones.

    Args:
        candidates: what must take them.
        sizes: dimension name -> size; unnamed ones default to batch 1 and 128 elsewhere.
        seed: of the values.

    Raises:
        UsageError: the candidates' inputs do not fit together, or a size is for no dimension.
    """
    if not sizes:
        for candidate in candidates:
            if candidate.samples:
                _check_names(candidates, set(candidate.samples[0]))
                return candidate.samples[0]
    known = {d for c in candidates for s in c.slots for d in s.shape if isinstance(d, str)}
    for name in sizes:
        if name not in known:
            raise UsageError(
                f"no input has a dynamic dimension {name!r}",
                hint="there are: " + (", ".join(sorted(known)) or "none, all sizes are fixed"),
            )
    generator = np.random.default_rng(seed)
    described = [candidate for candidate in candidates if candidate.slots]
    if not described:
        raise UsageError(
            f"{candidates[0].name} does not say what its inputs look like",
            hint="give the model or another artifact of it beside the file",
        )
    reference = described[0]
    _check_names(candidates, {slot.name for slot in reference.slots})
    named = {
        (slot.name, axis): sizes[dim]
        for candidate in candidates
        for slot in candidate.slots
        for axis, dim in enumerate(slot.shape)
        if isinstance(dim, str) and dim in sizes
    }
    return {slot.name: _values(slot, named, generator) for slot in reference.slots}


def paired(reference: Values, other: Values) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Outputs that belong together: by name, or by position where no name is common."""
    common = [name for name in reference if name in other]
    if common:
        return [(name, reference[name], other[name]) for name in common]
    if len(reference) != len(other):
        return []
    return [(n, a, b) for (n, a), b in zip(reference.items(), other.values(), strict=True)]


def _check_names(candidates: Sequence[Candidate], names: set[str]) -> None:
    for candidate in candidates:
        missing = {slot.name for slot in candidate.slots} - names
        if missing:
            raise UsageError(
                f"{candidate.name} takes an input {sorted(missing)[0]!r} that the others lack",
                hint="compare artifacts of one model, with the same input names",
            )


def _values(
    slot: Slot, sizes: Mapping[tuple[str, int], int], generator: np.random.Generator
) -> np.ndarray:
    # Candidates may call one dimension by different names; one of them knows the asked-for name.
    shape = tuple(
        d if isinstance(d, int) else sizes.get((slot.name, axis), 1 if axis == 0 else 128)
        for axis, d in enumerate(slot.shape)
    )
    if slot.dtype.kind == "f":
        return generator.standard_normal(shape).astype(slot.dtype)
    if slot.dtype.kind == "b" or "mask" in slot.name:
        return np.ones(shape, dtype=slot.dtype)
    return generator.integers(1, 100, shape).astype(slot.dtype)
