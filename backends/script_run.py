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
from planish.backends.script_module import METADATA, nodes_of, quiet
from planish.backends.torch_grids import expect_quantized_tensors
from planish.ir.errors import ExportError, UnsupportedError, UsageError
from planish.ir.trees import decode

_READS_ONLY = ("prim::", "aten::size", "aten::dim", "aten::eq", "aten::len", "aten::__")


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
        expect_quantized_tensors()
        if threads is not None:
            torch.set_num_threads(threads)
        extra = {METADATA: ""}
        with quiet():
            try:
                self.module: Any = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
            except (RuntimeError, UnicodeDecodeError) as error:  # the latter is its own message
                raise UnsupportedError(
                    f"torch cannot load {str(path)!r}: {str(error).strip().splitlines()[0]}",
                    hint="export the file again with this version of torch",
                ) from error
        self.metadata: dict[str, Any] | None = _metadata(path, extra[METADATA])

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
            UsageError: there are more or fewer of them than the file takes.
            ExportError: the file fails on them.
        """
        arguments = self._arguments(inputs)
        with torch.inference_mode():
            try:
                return tuple(pytree.tree_leaves(self.module(*arguments)))
            except (RuntimeError, torch.jit.Error) as error:
                lines = [line for line in str(error).strip().splitlines() if line.strip()]
                raise ExportError(
                    f"the file fails on these inputs: {lines[-1] if lines else 'no reason given'}",
                    where=self.path.name,
                    hint="pass inputs of the types, sizes and values that the model was made for",
                ) from error

    def _arguments(self, inputs: Sequence[Any]) -> list[Any]:
        """The arguments of ``forward``, in the structures that it takes."""
        if len(inputs) != len(self.input_names):
            raise UsageError(
                f"{self.path.name} takes {len(self.input_names)} inputs, got {len(inputs)}",
                hint="in this order: " + ", ".join(self.input_names),
            )
        if self.metadata is None:
            return list(inputs)
        return [_filled(tree, inputs) for tree in self.metadata["call"]["args"]]

    def operators(self) -> dict[str, int]:
        """Operator -> count, those within branches too, without what only reads sizes."""
        names = (node.kind() for node in nodes_of(self.module.inlined_graph))
        return dict(sorted(Counter(n for n in names if not n.startswith(_READS_ONLY)).items()))

    def report(self) -> RuntimeReport:
        """What runs the file."""
        return RuntimeReport(
            runtime=f"torch {torch.__version__} TorchScript",
            providers=("CPU",),
            operators=self.operators(),
        )


def _filled(tree: Any, inputs: Sequence[Any]) -> Any:  # noqa: ANN401 - the caller's structure
    """Flat inputs in the structure of one argument.

    Args:
        tree: a position in ``inputs``; None; ``{"value": a constant}``; or ``{"tuple": trees}``,
            ``{"list": trees}``, ``{"dict": {key: tree}}``.
        inputs: flat.
    """
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


def _metadata(path: Path, text: str | bytes) -> dict[str, Any] | None:
    """What planish wrote into the file; None for a file of somebody else.

    Raises:
        UnsupportedError: it is damaged.
    """
    if not text:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        assert found["call"]["args"] is not None
        assert all(isinstance(i["name"], str) for i in found["inputs"])
        assert isinstance(found["outputs"], list)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UnsupportedError(
            f"{METADATA} in {str(path)!r} is damaged",
            hint="export the file again, or load it with torch.jit.load, which does not read that",
        ) from error
    return found


def _check_archive(path: Path) -> None:
    """Look for TorchScript's code in the archive, before torch opens it."""
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile:
        names = []
    if not any("/code/" in name for name in names):
        raise UnsupportedError(
            f"{str(path)!r} is no TorchScript file, and other pickles are not opened",
            hint="save it with torch.jit.save, or export it with planish",
        )
