"""The target ``torch-export``: a ``.pt2`` file as ``torch.export.save`` writes it.

Any process with plain torch loads it: ``torch.export.load(path).module()``. Quantized layers run
in oneDNN's integer kernels there. The format has no place for a weight in a kernel's layout, so
these are packed in every run; ``aotinductor`` packs them once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from planish.backends.base import Target
from planish.backends.script_module import METADATA
from planish.backends.torch_backend import TorchBackend, Writing, metadata
from planish.ir.errors import UnsupportedError

if TYPE_CHECKING:
    from planish.backends.pt2_run import ExportedSession


class TorchExport(TorchBackend):
    """An exported program, run by torch operator by operator."""

    target: ClassVar[Target] = Target(
        name="torch-export",
        summary="a .pt2 file that torch.export.load opens in any process with plain torch",
        suffix=".pt2",
        opset=0,
        opsets=(0, 0),
        checks_sizes=True,
    )
    exportable = True

    def _write(self, what: Writing, path: Path) -> None:
        from planish.backends.pt2_program import exported_program

        if any(node.target in _UNPACKED for node in what.lowered.packed):
            what.remark("weights in codes become real numbers in every run of a .pt2 file")
        exported = exported_program(what.lowered, what.remark)
        text = metadata(what.lowered.program, what.facts)
        with quiet_export():
            try:
                torch.export.save(exported, path, extra_files={METADATA: text})
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                # torch's serializer has no error of its own for what it cannot write
                cause = error.__cause__ or error
                line = next((x for x in str(cause).splitlines() if x.strip()), "")
                raise UnsupportedError(
                    f"torch.export.save cannot write this program: {line}",
                    hint="export to another target: *.onnx or *.pt",
                ) from error

    def _open(
        self, path: Path, *, own: bool = False, threads: int | None = None
    ) -> ExportedSession:
        from planish.backends.pt2_run import ExportedSession

        return ExportedSession(path, own=own, threads=threads)


_UNPACKED = (torch.ops.aten.to.dtype, torch.ops.aten.bitwise_and.Scalar)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Without the warnings of torch's serializer about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        yield
