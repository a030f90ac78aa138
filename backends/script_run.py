"""Run a TorchScript file, and say what is in it: the one place that loads ``torch.jit``."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from planish.backends.base import RuntimeReport
from planish.backends.script_module import METADATA, quiet
from planish.ir.errors import ExportError, UnsupportedError, UsageError
from planish.ir.trees import decode

_MOVES_NOTHING = ("prim::", "aten::size", "aten::dim", "aten::eq", "aten::len", "aten::__")


class ScriptSession:
    """A loaded TorchScript file.

    Args:
        path: the file.
        threads: for one operator, in the whole process: torch has no other setting.

    Raises:
        UsageError: there is no such file.
        UnsupportedError: the file is no TorchScript. It is not unpickled to find out.
    """

    def __init__(self, path: Path, *, threads: int | None = None):
        self.path = path
        _check_archive(path)
        if threads is not None:
            torch.set_num_threads(threads)
        extra = {METADATA: ""}
        with quiet():
            try:
                self.module: Any = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
            except RuntimeError as error:
                raise UnsupportedError(
                    f"torch cannot load {str(path)!r}: {str(error).strip().splitlines()[0]}",
                    hint="export the file again with this version of torch",
                ) from error
        text: str | bytes = extra[METADATA]
        self.metadata: dict[str, Any] | None = json.loads(text) if text else None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Flat inputs by name, as planish wrote them; the parameters of any other file."""
        if self.metadata is not None:
            return tuple(i["name"] for i in self.metadata["inputs"])
        return self.parameters

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments of ``forward``."""
        return tuple(a.name for a in self.module.forward.schema.arguments[1:])

    @property
    def output_names(self) -> tuple[str, ...]:
        """Flat outputs by name; empty for a file that does not say."""
        return tuple(self.metadata["outputs"]) if self.metadata is not None else ()

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Run on flat inputs; flat outputs in order.

        Raises:
            ExportError: the file fails on them.
        """
        with quiet(), torch.inference_mode():
            try:
                return tuple(pytree.tree_leaves(self.module(*self._arguments(inputs))))
            except (RuntimeError, torch.jit.Error) as error:
                lines = [line for line in str(error).strip().splitlines() if line.strip()]
                raise ExportError(
                    f"the file fails on these inputs: {lines[-1]}", where=str(self.path)
                ) from error

    def _arguments(self, inputs: Sequence[Any]) -> list[Any]:
        if self.metadata is None:
            return list(inputs)
        return [_filled(tree, inputs) for tree in self.metadata["call"]["args"]]

    def operators(self) -> dict[str, int]:
        """Operator -> count, without what only reads sizes."""
        names = (node.kind() for node in self.module.inlined_graph.nodes())
        return dict(sorted(Counter(n for n in names if not n.startswith(_MOVES_NOTHING)).items()))

    def report(self) -> RuntimeReport:
        """What runs the file."""
        return RuntimeReport(
            runtime=f"torch {torch.__version__} TorchScript",
            providers=("CPU",),
            operators=self.operators(),
        )


def _filled(tree: Any, inputs: Sequence[Any]) -> Any:  # noqa: ANN401 - the caller's structure
    """Flat inputs in the structure of one argument."""
    if tree is None:
        return None
    if isinstance(tree, int):
        return inputs[tree]
    ((kind, content),) = tree.items()
    if kind == "value":
        return decode(content)
    if kind == "dict":
        return {key: _filled(t, inputs) for key, t in content.items()}
    parts = [_filled(t, inputs) for t in content]
    return tuple(parts) if kind == "tuple" else parts


def _check_archive(path: Path) -> None:
    """Look for TorchScript's code in the archive, before torch opens it."""
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        names = []
    if not any("/code/" in name for name in names):
        raise UnsupportedError(
            f"{str(path)!r} is no TorchScript file, and other pickles are not opened",
            hint="save it with torch.jit.save, or export it with planish",
        )
