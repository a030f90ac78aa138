"""The ``MODEL`` argument of every command: what it may be, and how it becomes a program.

package.module:callable     called without arguments; returns a module, or
                            (module, example_inputs), or (module, example_inputs, dynamic_shapes)
model.pt2                   a program saved by planish, or by torch.export.save
path/to/folder              a local Hugging Face folder (config.json beside its weights)
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from planish.ir.errors import PlanishError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram

    from planish.ir.program import Program


@dataclass(frozen=True)
class Loaded:
    """A model and how to call it.

    Attributes:
        model: a module, an exported program or a program.
        example_inputs: as ``planish.optimize`` takes them; None where the model knows.
        dynamic_shapes: likewise.
        name: a short name for tables and file names.
    """

    model: nn.Module | ExportedProgram | Program
    example_inputs: Any = None
    dynamic_shapes: Any = None
    name: str = "model"


def load_model(spec: str) -> Loaded:
    """Load what a ``MODEL`` argument names.

    Raises:
        UsageError: there is no such file, module or attribute.
    """
    path = Path(spec)
    if not spec:
        raise UsageError("MODEL is empty", hint="give package.module:callable, a file or a folder")
    if path.is_dir():
        return _hugging_face(path)
    if path.suffix == ".pt2":
        from planish.ir.files import load

        return Loaded(load(path), name=path.stem)
    if path.suffix in (".onnx", ".pt", ".pth", ".bin", ".safetensors"):
        raise UsageError(
            f"{spec} is a {path.suffix} file; a model is needed, not weights or an artifact",
            hint="write a function that builds the model and pass it as package.module:function",
        )
    if ":" in spec:
        return _from_callable(spec)
    raise UsageError(
        f"no model at {spec!r}",
        hint="MODEL is package.module:callable, a .pt2 file, or a local Hugging Face folder",
    )


def import_callable(spec: str) -> Callable[..., Any]:
    """Import ``package.module:name``; the current folder is searched too.

    Raises:
        UsageError: no such module or attribute, or it cannot be called.
    """
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise UsageError(
                f"there is no module {error.name!r}",
                hint="give package.module:callable, importable from the current folder",
            ) from None
        raise UsageError(f"importing {module_name!r} failed: {error}") from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise UsageError(f"module {module_name!r} has no {attribute!r}")
        value = getattr(value, part)
    if not callable(value):
        raise UsageError(f"{spec} is a {type(value).__name__}, which cannot be called")
    return value  # type: ignore[no-any-return]


def _from_callable(spec: str) -> Loaded:
    value = import_callable(spec)
    name = spec.partition(":")[2].rpartition(".")[2]
    if isinstance(value, nn.Module):
        return Loaded(value, name=name)
    try:
        made = value()
    except PlanishError:
        raise
    except Exception as error:  # the user's own code
        raise UsageError(f"{spec}() raised {type(error).__name__}: {error}") from error
    parts = made if isinstance(made, tuple) else (made,)
    if not isinstance(parts[0], nn.Module) or len(parts) > 3:
        raise UsageError(
            f"{spec}() returned a {type(parts[0]).__name__}",
            hint="return a module, (module, example_inputs) or "
            "(module, example_inputs, dynamic_shapes)",
        )
    model, example_inputs, dynamic_shapes = (*parts, None, None)[:3]
    return Loaded(model, example_inputs, dynamic_shapes, name)


def _hugging_face(folder: Path) -> Loaded:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UsageError(
            f"{folder} has no config.json",
            hint=f"{folder} is the bundle of a failure: give {folder / 'program.pt2'}, or use "
            "`planish repro` or `planish bisect`"
            if (folder / "repro.json").is_file()
            else "give the folder that save_pretrained wrote",
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{config_path} is not JSON: {error}") from None
    with _offline():
        try:
            import transformers
        except ImportError:
            raise UnsupportedError(
                "a Hugging Face folder needs the package transformers",
                hint="pip install transformers",
            ) from None
        architectures = config.get("architectures") or []
        kind = getattr(transformers, architectures[0], None) if architectures else None
        kind = kind or transformers.AutoModel
        try:
            model = kind.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ...
            raise UsageError(f"{folder} could not be loaded: {error}") from error
    return Loaded(model.eval(), name=folder.resolve().name)


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from the network and from its own progress bars."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = {n: os.environ.get(n) for n in names}
    os.environ.update(zip(names, ("1", "error", "1"), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
