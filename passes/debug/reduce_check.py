"""Whether a written module is the program it was written from, and fails as that does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.ir.archive import raw_bytes
from planish.ir.capture import capture
from planish.ir.errors import PlanishError
from planish.ir.execute import run
from planish.ir.program import Program


def module_problem(path: Path, program: Program, fails: Callable[[Program], bool]) -> str | None:
    """Execute a written module, compare it bit for bit, capture it again and let it fail.

    Args:
        path: ``module.py``, which planish itself has written.
        program: what it was written from; its first sample is what both compute on.
        fails: whether a program fails in the way that was reduced.

    Returns:
        A sentence on what does not hold, or None.
    """
    try:
        model, inputs, shapes = build(path)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            expected = run(program, inputs)
            torch.manual_seed(0)
            outputs = model(*inputs)
    except Exception as error:  # torch's operators raise in their own ways
        return f"it does not run: {type(error).__name__}: {error}"
    if len(outputs) != len(expected) or not all(map(_same, expected, outputs)):
        return "it does not give the bits that the program gives"
    try:
        captured = capture(model, inputs, dynamic_shapes=shapes)
    except PlanishError as error:
        return f"it cannot be captured: {error.what}"
    if not fails(captured):
        return "captured again, it does not fail in the same way"
    return None


def build(path: Path) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """Execute a module that planish wrote and call its ``build()``."""
    spec = importlib.util.spec_from_file_location(f"planish_reduced_{id(path)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: tuple[nn.Module, tuple[Any, ...], Any] = module.build()
    return made


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and bool(raw_bytes(a).tobytes() == raw_bytes(b).tobytes())
    return type(a) is type(b) and a == b
