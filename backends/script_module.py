"""Compile TorchScript source and write the file: the one place that writes ``torch.jit``.

torch has announced that ``torch.jit`` will go and says so at every call; that is ours to handle and
not the user's, so these warnings end here and in ``script_run``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union  # noqa: UP035 - TorchScript's own

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from planish.backends.script_source import Source
from planish.ir.errors import ExportError, UnsupportedError
from planish.ir.ops import argument, op_name

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
    """Without torch's announcements that TorchScript is deprecated.

    For compiling, loading and saving; a loaded module that runs announces nothing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        yield


def compile_module(source: Source) -> torch.jit.ScriptModule:
    """The module of a file.

    It is compiled in a unit of its own: what else this process has compiled changes no name in it,
    and nothing of it outlives it.

    Raises:
        UnsupportedError: TorchScript's compiler refuses a line, or takes an operator in it for
            another one; names the node.
    """
    scope = {**_SCOPE, **source.classes}
    unit = torch._C.CompilationUnit()
    model = _holder("Model", unit, source.attributes)
    if source.setstate:
        packed = _holder("Packed", unit, {**source.raw, **source.packed})
        _define(packed, source.setstate, scope, {})
        model._register_attribute("packed", packed._type(), packed)
    _define(model, source.forward, scope, source.origins)
    _check_overloads(model, source.origins)
    with quiet():
        made: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(model)
        return made


def _holder(name: str, unit: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - torch._C
    """A module that holds tensors as plain attributes, as a frozen one does; without methods."""
    make: Any = torch._C.ScriptModule
    module = make(f"__torch__.planish_file.{name}", unit, False)
    module._register_attribute("training", torch._C.BoolType.get(), False)
    for key, tensor in tensors.items():
        module._register_attribute(key, torch._C.TensorType.get(), _own(tensor.detach()))
    return module


def _own(tensor: Tensor) -> Tensor:
    """A tensor without the rest of the memory that it is a view of: torch would store all of it."""
    if tensor.layout != torch.strided:
        return tensor
    needed = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() > needed else tensor


def _define(
    module: Any,  # noqa: ANN401 - torch._C
    text: str,
    scope: Mapping[str, Any],
    origins: Mapping[int, Node],
) -> None:
    concrete = torch._C.ConcreteModuleType.from_jit_type(module._type())
    try:
        module._define(concrete, text, scope.get)
    except RuntimeError as error:
        raise UnsupportedError(
            f"TorchScript does not take this program: {_told(str(error))}",
            where=origins.get(_line(str(error))),
            hint="export to another target, or report it with the model",
        ) from error


def _line(place: str) -> int:
    """The number of the line that a message or a source range speaks of; 0 where it names none."""
    found = re.search(r'File "<string>", line (\d+)', place)
    return int(found[1]) if found else 0


def _check_overloads(module: Any, origins: Mapping[int, Node]) -> None:  # noqa: ANN401 - torch._C
    """The compiler chooses an overload by its arguments; make sure that it chose the same one.

    ``view(x, dtype)`` and ``view(x, size)`` are one to it, for a dtype is a number there.
    """
    for made in nodes_of(module._get_method("forward").graph):
        node = origins.get(_line(made.sourceRange()))
        if node is None or not isinstance(node.target, OpOverload):
            continue
        wanted = node.target._schema
        if made.kind() != wanted.name:
            continue  # a conversion of an argument
        if not _same_meaning(node, torch._C.parse_schema(made.schema()), wanted):
            raise UnsupportedError(
                f"TorchScript has no way to say {op_name(node.target)}: it takes it for "
                f"{made.schema().split('(')[0]}",
                where=node,
                hint="rewrite this part of the model without it, or export to another target",
            )


def _same_meaning(node: Node, found: Any, wanted: Any) -> bool:  # noqa: ANN401 - torch._C
    """Whether two overloads mean the same by the arguments of a call: names say what they are.

    A tensor is what it is by any name, and None says nothing.
    """
    if len(found.arguments) != len(wanted.arguments):
        return False
    for mine, other in zip(found.arguments, wanted.arguments, strict=True):
        tensors = str(mine.type) == str(other.type) == "Tensor"
        if mine.name != other.name and not tensors and argument(node, other.name) is not None:
            return False
    return True


def nodes_of(block: Any) -> Iterator[Any]:  # noqa: ANN401 - torch._C
    """All nodes of a compiled graph, those within branches too."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes_of(inner)


def _told(message: str) -> str:
    """The lines of a compiler's message that say what and where."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    pointed = [k for k, line in enumerate(lines) if "<--- HERE" in line]
    where = lines[pointed[0] - 1] if pointed else ""
    return f"{lines[0] if lines else 'no reason given'} {where}".strip()[:400]


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
