"""Files of plain torch as things to compare: TorchScript, exported programs, compiled packages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planish.ir.errors import UnsupportedError, UsageError
from planish.tools.candidates import Candidate, Slot, Values

# How metadata calls an input that is a number, and its type in numpy.
_NUMBERS = {
    "SymInt": "int64",
    "SymFloat": "float64",
    "SymBool": "bool",
    "int": "int64",
    "float": "float64",
}
Run = Callable[[Sequence[Any]], Sequence[Any]]


def open_script(path: Path, threads: int) -> Candidate:
    """A TorchScript file; one that planish did not write takes what the others take."""
    from planish.backends.script_run import ScriptSession

    start = time.perf_counter()
    session = ScriptSession(path, threads=threads)
    load_ms = 1e3 * (time.perf_counter() - start)
    if session.metadata is None:
        return _foreign(path, load_ms, session.parameters, session.run)
    return _described(path, load_ms, session.metadata, session.run)


def open_pt2(path: Path, threads: int, *, trust_code: bool) -> Candidate | None:
    """A ``.pt2`` file as torch runs it; None for a program of ``planish.ir.save``: a model.

    Raises:
        UsageError: it holds compiled code, and the caller did not say that it may be run.
    """
    from planish.backends.aoti_run import CompiledSession, is_package
    from planish.backends.pt2_run import ExportedSession, is_exported

    start = time.perf_counter()
    session: CompiledSession | ExportedSession
    if is_package(path):
        if not trust_code:
            raise UsageError(
                f"{str(path)!r} holds machine code, and opening it would run that",
                hint="add --trust-code if you know where the file comes from",
            )
        session = CompiledSession(path, threads=threads)
    elif is_exported(path):
        session = ExportedSession(path, threads=threads)
    else:
        return None
    load_ms = 1e3 * (time.perf_counter() - start)
    if session.metadata is not None:
        return _described(path, load_ms, session.metadata, session.run)
    if isinstance(session, ExportedSession):
        return _described(path, load_ms, session.described(), session.run)
    return _foreign(path, load_ms, (), session.run)


def _described(path: Path, load_ms: float, metadata: dict[str, Any], run: Run) -> Candidate:
    """A file that says what its inputs look like."""
    inputs, outputs = metadata["inputs"], metadata["outputs"]
    slots = tuple(Slot(i["name"], _dtype(i, path), tuple(i["shape"])) for i in inputs)
    numbers = {i["name"] for i in inputs if i["dtype"] in _NUMBERS}

    def call(values: Values) -> Values:
        flat = [torch.from_numpy(values[slot.name]) for slot in slots]
        given = [t.item() if s.name in numbers else t for s, t in zip(slots, flat, strict=True)]
        made = [o for o in run(given) if o is not None]
        return {n: np.asarray(o) for n, o in zip(outputs, made, strict=False)}

    return Candidate(str(path), slots, call, load_ms, path.stat().st_size)


def _foreign(path: Path, load_ms: float, parameters: Sequence[str], run: Run) -> Candidate:
    """A file that does not: inputs by the names of its parameters, else in order."""

    def call(values: Values) -> Values:
        named = set(parameters) == set(values)
        if parameters and len(parameters) != len(values):
            raise UsageError(
                f"{path} takes {len(parameters)} inputs and the others {len(values)}",
                hint="compare artifacts of one model",
            )
        chosen = [values[n] for n in parameters] if named else list(values.values())
        made = [o for o in run([torch.from_numpy(v) for v in chosen]) if o is not None]
        return {f"output_{i}": np.asarray(o) for i, o in enumerate(made)}

    return Candidate(str(path), (), call, load_ms, path.stat().st_size)


def _dtype(described: dict[str, Any], path: Path) -> np.dtype:
    kind: str = _NUMBERS.get(described["dtype"], described["dtype"])
    try:
        return np.dtype(kind)
    except TypeError:
        raise UnsupportedError(
            f"{path}: inputs of type {kind} cannot be made with numpy", where=described["name"]
        ) from None
