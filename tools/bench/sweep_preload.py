"""Imported once by the server that the sweep's processes are forked from.

The first trace and the first export of a process import for several seconds, and so do the model
libraries. Doing it all once here lets every child inherit it. No session of a runtime is opened:
its threads would not survive the fork.
"""

import contextlib
import tempfile
from pathlib import Path

import torch

import planish
from planish.ir.errors import RequirementError
from planish.tools.bench import sweep_stages  # noqa: F401 - what the children run
from planish.tools.bench.real_nets import require
from planish.tools.bench.torchvision_shim import import_timm


def _import_libraries() -> None:
    """Import what the entries need; an absent library is reported by the entries that need it."""
    require("onnxruntime")
    with contextlib.suppress(RequirementError):
        import_timm()
    with contextlib.suppress(RequirementError):
        _ = require("transformers").PreTrainedModel


def _export_once() -> None:
    with tempfile.TemporaryDirectory() as folder:
        planish.optimize(
            torch.nn.Linear(2, 2).eval(),
            (torch.ones(2, 2),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            target="onnx",
        ).export(Path(folder) / "warm.onnx", verify=False)


torch.set_num_threads(1)
_import_libraries()
_export_once()
