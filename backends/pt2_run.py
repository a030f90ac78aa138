"""Run a ``.pt2`` file of ``torch.export.save``, and say what is in it."""

from __future__ import annotations

import json
import logging
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from planish.backends.base import RuntimeReport
from planish.backends.script_module import METADATA
from planish.ir.archive import Archive
from planish.ir.errors import ExportError, UnsupportedError, UsageError
from planish.ir.ops import op_name

_EXTRA = f"extra/{METADATA}"


class ExportedSession:
    """A loaded ``.pt2`` file.

    A file of others is read by planish's checking loader: ``torch.export.load`` unpickles.

    Args:
        path: the file.
        own: whether this process wrote it; then torch itself opens it, as its users will.
        threads: for one operator, in the whole process: torch has no other setting.

    Raises:
        UsageError: there is no such file, or it is damaged.
        UnsupportedError: it could only be read by unpickling.
    """

    def __init__(self, path: Path, *, own: bool = False, threads: int | None = None):
        self.path = path
        if not path.is_file():
            raise UsageError(f"there is no file {str(path)!r}")
        if threads is not None:
            torch.set_num_threads(threads)
        self.metadata = file_metadata(path)
        self.exported = _written(path) if own else checked(path)
        self.module = self.exported.module()

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Run on flat inputs; flat outputs in order.

        Raises:
            ExportError: the file fails on them.
        """
        rest = iter(inputs)
        leaves = [
            spec.arg.value if isinstance(spec.arg, ConstantArgument) else next(rest)
            for spec in self.exported.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.exported.call_spec.in_spec)
        with torch.inference_mode():
            try:
                return tuple(pytree.tree_leaves(self.module(*args, **kwargs)))
            except (RuntimeError, ValueError, AssertionError) as error:
                line = next((x for x in str(error).splitlines() if x.strip()), "")
                raise ExportError(
                    f"the file fails on these inputs: {line}", where=str(self.path)
                ) from error

    def operators(self) -> dict[str, int]:
        """Operator -> count, in branches too."""
        return dict(sorted(Counter(_names(self.exported.graph_module)).items()))

    def described(self) -> dict[str, Any]:
        """Its inputs and outputs, as the metadata of planish's own files has them."""
        from planish.backends.torch_backend import description
        from planish.ir.capture import from_exported

        return description(from_exported(self.exported))

    def report(self) -> RuntimeReport:
        """What runs the file."""
        return RuntimeReport(
            runtime=f"torch {torch.__version__} export",
            providers=("CPU",),
            operators=self.operators(),
        )


def _written(path: Path) -> ExportedProgram:
    """A file that this process wrote, as torch reads it.

    Raises:
        UnsupportedError: torch cannot read what it wrote: a string among the outputs, for one.
    """
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    logger.disabled = True  # its own account of the error, over many lines
    try:
        return torch.export.load(path)  # noqa: TID251 - this process wrote it
    except RuntimeError as error:
        line = next((x for x in str(error.__cause__ or error).splitlines() if x.strip()), "")
        raise UnsupportedError(
            f"torch.export.load cannot read back this program: {line}",
            hint="return tensors and numbers only, or export to *.onnx or *.pt",
        ) from error
    finally:
        logger.disabled = before


def checked(path: Path) -> ExportedProgram:
    """A file as torch's own container, without unpickling.

    Raises:
        UsageError: it is damaged.
        UnsupportedError: it could only be read by unpickling.
    """
    from planish.ir.exported import to_exported_program
    from planish.ir.files import load

    return to_exported_program(load(path))


def is_exported(path: Path) -> bool:
    """Whether ``torch.export.save`` wrote a file; it is not loaded to find out."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.split("/", 1)[-1].startswith("models/") for n in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def file_metadata(path: Path) -> dict[str, Any] | None:
    """What planish wrote into a file; None for a file that it did not write."""
    with Archive(path) as archive:
        found = [n for n in archive.names if n == _EXTRA or n.endswith(f"/{_EXTRA}")]
        data: dict[str, Any] | None = json.loads(archive.read(found[0])) if found else None
    return data


def _names(module: GraphModule) -> Iterator[str]:
    graph: Graph = module.graph
    for node in graph.nodes:
        if node.op == "call_function":
            yield op_name(node.target).replace(".", "::", 1)
    for child in module.children():
        if isinstance(child, GraphModule):
            yield from _names(child)
