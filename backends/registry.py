"""The literal table of targets. Nothing registers itself by being imported."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from planish.backends.base import Backend, Target
from planish.ir.errors import UsageError

BACKENDS: dict[str, str] = {
    "onnx": "planish.backends.onnx_export:PortableOnnx",
    "onnxruntime-cpu": "planish.backends.ort_export:OnnxRuntimeCpu",
    "torchscript": "planish.backends.script_export:TorchScript",
    "torch-export": "planish.backends.pt2_export:TorchExport",
    "aotinductor": "planish.backends.aoti_export:AotInductor",
}


def target_names() -> tuple[str, ...]:
    """All targets, in the order of the table."""
    return tuple(BACKENDS)


def load_backend(name: str) -> Backend:
    """The backend of a target.

    Raises:
        UsageError: there is no such target; names the nearest one.
    """
    if name not in BACKENDS:
        near = get_close_matches(name, BACKENDS, n=1)
        known = ", ".join(BACKENDS)
        raise UsageError(
            f"unknown target {name!r}",
            hint=f"did you mean {near[0]!r}? known: {known}" if near else f"known: {known}",
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


def load_target(name: str) -> Target:
    """What a target can do, by name."""
    return load_backend(name).target
