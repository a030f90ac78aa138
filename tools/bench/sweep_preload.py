"""Imported once by the server that the sweep's processes are forked from.

The first trace and the first export of a process import for several seconds. Doing one of each
here, on a single linear layer, lets every child inherit what was imported. No session of a runtime
is opened: its threads would not survive the fork.
"""

import tempfile
from pathlib import Path

import onnxruntime  # noqa: F401
import torch

import planish
from planish.tools.bench import sweep_stages  # noqa: F401

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as _folder:
    planish.optimize(
        torch.nn.Linear(2, 2).eval(),
        (torch.ones(2, 2),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        target="onnx",
    ).export(Path(_folder) / "warm.onnx", verify=False)
