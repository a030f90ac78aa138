"""The wrong pass of docs/debugging.md, and a failure that it makes."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.repository import ROOT

DEBUGGING = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
BUNDLE = "planish-repro-35467e558832"  # as the pages call it; the name depends on the versions


def blocks(language: str) -> list[str]:
    """The code blocks of a language on the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", DEBUGGING, re.S | re.M)


WRONG = blocks("python")[0]

_FAIL = """
import torch
import planish
from wrong import DropZeroBias

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)).eval()
with torch.no_grad():
    model[0].bias.sub_(model[0].bias.mean())
    model[2].bias.add_(1.0)
try:
    planish.optimize(model, torch.randn(2, 8), recipe=[DropZeroBias()])
except planish.VerificationError as error:
    print(error)
"""


def failed_bundle(folder: Path) -> str:
    """Write wrong.py into a folder, let it spoil a small model there, and name the bundle left.

    A process of its own runs it, so that the pass is one that a replay has to import.
    """
    (folder / "wrong.py").write_text(WRONG, encoding="utf-8")
    made = subprocess.run(
        [sys.executable, "-c", _FAIL],
        cwd=folder,
        env={**os.environ, "PLANISH_REPRO_DIR": ".", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    (bundle,) = (path.name for path in folder.glob("planish-repro-*"))
    assert bundle in made.stdout
    return bundle
