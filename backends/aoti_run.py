"""Run a package of AOTInductor, and say what is in it.

Loading one runs the machine code that it holds: only for packages whose maker is trusted.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from planish.backends.base import RuntimeReport
from planish.backends.script_module import METADATA
from planish.ir.errors import ExportError, UnsupportedError, UsageError

_KERNEL = re.compile(r"\baoti_torch_cpu_+(\w+?)(?:_out)?\(")
_LOOPS = re.compile(r"\bcpp_fused_\w+(?=\()")


class CompiledSession:
    """A loaded package.

    Args:
        path: the file.
        threads: for one operator, in the whole process: torch has no other setting.

    Raises:
        UsageError: there is no such file.
        UnsupportedError: it is no package of AOTInductor, or torch cannot load it here.
    """

    def __init__(self, path: Path, *, threads: int | None = None):
        self.path = path
        if not path.is_file():
            raise UsageError(f"there is no file {str(path)!r}")
        if not is_package(path):
            raise UnsupportedError(
                f"{str(path)!r} is no package of AOTInductor",
                hint="write one with planish export MODEL --target aotinductor -o model.pt2",
            )
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self.model = torch._inductor.aoti_load_package(str(path))
        except RuntimeError as error:
            line = next((x for x in str(error).splitlines() if x.strip()), "")
            raise UnsupportedError(
                f"torch cannot load {str(path)!r}: {line}",
                hint="compile it on the kind of machine it is to run on, with this torch",
            ) from error
        text = self.model.get_metadata().get(METADATA)
        self.metadata: dict[str, Any] | None = json.loads(text) if text else None

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Run on flat inputs; flat outputs in order.

        Raises:
            ExportError: the file does not take them, or fails on them.
        """
        self._check(inputs)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        with torch.inference_mode():
            try:
                flat = self.model.loader.boxed_run(tensors)
            except RuntimeError as error:
                line = next((x for x in str(error).splitlines() if x.strip()), "")
                raise ExportError(
                    f"the file fails on these inputs: {line}", where=str(self.path)
                ) from error
        spec = pytree.treespec_loads(self.model.loader.get_call_spec()[1])
        outputs = list(pytree.tree_leaves(pytree.tree_unflatten(flat, spec)))
        for position in self.metadata["numbers"] if self.metadata is not None else ():
            outputs[position] = outputs[position].item()
        return tuple(outputs)

    def _check(self, inputs: Sequence[Any]) -> None:
        """Compiled code reads beyond the end of an input that is too small: look before."""
        if self.metadata is None:
            return
        for value, wanted in zip(inputs, self.metadata["inputs"], strict=True):
            sizes = list(value.shape)
            fits = len(sizes) == len(wanted["shape"]) and all(
                not isinstance(w, int) or w == s
                for w, s in zip(wanted["shape"], sizes, strict=True)
            )
            kind = str(value.dtype).removeprefix("torch.")
            if not fits or kind != wanted["dtype"]:
                raise ExportError(
                    f"the input {wanted['name']!r} is {kind} {sizes}; the file takes "
                    f"{wanted['dtype']} {wanted['shape']}",
                    where=str(self.path),
                )

    def operators(self) -> dict[str, int]:
        """Kernels of torch that it calls -> how often, and its own loops."""
        text = _wrapper(self.path)
        calls = Counter(name for name in _KERNEL.findall(text) if "delete" not in name)
        loops = len(set(_LOOPS.findall(text)))
        return dict(sorted({**calls, **({"fused loops": loops} if loops else {})}.items()))

    def report(self) -> RuntimeReport:
        """What runs the file."""
        return RuntimeReport(
            runtime=f"torch {torch.__version__} AOTInductor",
            providers=("CPU",),
            operators=self.operators(),
        )


def is_package(path: Path) -> bool:
    """Whether a file holds compiled code; it is not loaded to find out."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("data/aotinductor/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _wrapper(path: Path) -> str:
    """The source that calls the kernels; packages keep it beside the code."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".wrapper.cpp")]
        return "\n".join(archive.read(name).decode() for name in names)
