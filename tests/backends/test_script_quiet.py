"""Nobody who writes or runs TorchScript files is told that torch deprecates what they are made of.

Some of these warnings come from C++ and pass by Python's filters, so stderr is looked at.
"""

import subprocess
import sys
from pathlib import Path

import pytest

_MODULE = """
import torch
from torch import nn

torch.manual_seed(0)
SAMPLES = [torch.randn(16, 3, 8, 8) for _ in range(3)]


def build():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(128, 16), nn.GELU(), nn.Linear(16, 4))
    return net.eval(), (SAMPLES[0],)


def batches():
    return [(s,) for s in SAMPLES]
"""
_EXPORT = """
import sys
import planish
from quiet_model import batches, build

net, args = build()
result = planish.optimize(net, args, recipe=sys.argv[1], calibration=batches(),
                          target="torchscript")
artifact = result.export(sys.argv[2])
print(*artifact.operators)
"""


def _stderr(folder: Path, *command: str) -> tuple[str, str]:
    """What a fresh Python process prints, to stdout and to stderr; warnings are errors in it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model to import."""
    (tmp_path / "quiet_model.py").write_text(_MODULE, encoding="utf-8")
    (tmp_path / "run.py").write_text(_EXPORT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "operator"),
    [
        ("exact", "mkldnn::_linear_pointwise"),
        ("int8-static", "aten::quantize_per_tensor"),
        ("int8-dynamic", "onednn::qlinear_pointwise"),
    ],
)
def test_export_is_quiet(folder: Path, recipe: str, operator: str) -> None:
    out, err = _stderr(folder, "run.py", recipe, "model.pt")
    assert operator in out.split()
    assert not err


def test_commands_are_quiet(folder: Path) -> None:
    cli = "from planish.tools.cli import main; main()"
    _, err = _stderr(folder, "-c", cli, "export", "quiet_model:build", "-o", "a.pt", "--quiet")
    assert not err
    options = ["--recipe", "int8-static", "--calibration", "quiet_model:batches", "--quiet"]
    _, err = _stderr(folder, "-c", cli, "optimize", "quiet_model:build", "-o", "b.pt", *options)
    assert not err
    _, err = _stderr(folder, "-c", cli, "bench", "a.pt", "b.pt", "--quiet")
    assert not err
