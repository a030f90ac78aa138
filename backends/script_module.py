"""Compile TorchScript source and write the file: the one place that writes ``torch.jit``.

torch has announced that ``torch.jit`` will go and says so at every call; that is ours to handle and
not the user's, so these warnings end here and in ``script_run``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union  # noqa: UP035 - TorchScript's own names

import torch
from torch import Tensor

from planish.backends.script_source import Source
from planish.ir.errors import ExportError, UnsupportedError

METADATA = "planish.json"  # the extra file that every file of ours carries
_SCOPE: Mapping[str, Any] = {
    "torch": torch,
    "Tensor": Tensor,
    "Dict": Dict,  # noqa: UP006
    "List": List,  # noqa: UP006
    "Optional": Optional,
    "Number": Union[int, float, complex],  # noqa: UP007 - TorchScript's own way to say so
    "Tuple": Tuple,  # noqa: UP006
    "math": __import__("math"),
    "max": max,
    "min": min,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's announcements that TorchScript is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*[Qq]uantiz.*", category=UserWarning)
        yield


def compile_module(source: Source) -> torch.jit.ScriptModule:
    """The module of a file.

    Raises:
        UnsupportedError: TorchScript's compiler refuses a line; shows it.
    """
    scope = {**_SCOPE, **source.classes}
    with quiet():
        module = _holder("Model", source.attributes)
        if source.setstate:
            packed = _holder("Packed", {**source.raw, **source.packed})
            _define(packed, source.setstate, scope)
            module = _holder("Model", source.attributes, packed)
        _define(module, source.forward, scope)
        return module.eval()


def _holder(
    name: str, tensors: Mapping[str, Tensor], packed: torch.jit.ScriptModule | None = None
) -> torch.jit.ScriptModule:
    """A script module that holds tensors and has no methods yet."""

    def construct(self: torch.jit.ScriptModule) -> None:
        super(kind, self).__init__()
        for key, tensor in tensors.items():
            self.register_buffer(key, tensor.detach())
        if packed is not None:
            self.packed = packed

    meta: Any = type(torch.jit.ScriptModule)
    kind: Any = meta(
        name, (torch.jit.ScriptModule,), {"__init__": construct, "__module__": "planish_file"}
    )
    made: torch.jit.ScriptModule = kind()
    return made


def _define(module: torch.jit.ScriptModule, text: str, scope: Mapping[str, Any]) -> None:
    inner: Any = module._actual_script_module
    try:
        inner._c._define(inner._concrete_type, text, scope.get)
    except RuntimeError as error:
        raise UnsupportedError(
            f"TorchScript does not take this program: {_told(str(error))}",
            hint="export to ONNX instead, or report it with the model",
        ) from error


def _told(message: str) -> str:
    """The lines of a compiler's message that say what and where."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    pointed = [k for k, line in enumerate(lines) if "<--- HERE" in line]
    where = lines[pointed[0] - 1] if pointed else ""
    return f"{lines[0]} {where}".strip()[:400]


def write_module(module: torch.jit.ScriptModule, path: Path, metadata: str) -> None:
    """Save a module.

    Raises:
        ExportError: torch cannot write it.
    """
    with quiet():
        try:
            torch.jit.save(module, str(path), _extra_files={METADATA: metadata})
        except RuntimeError as error:
            raise ExportError(
                f"torch cannot write the file: {str(error).splitlines()[0]}", where=str(path)
            ) from error
