"""Loading and running TorchScript files: damaged ones, foreign ones, wrong inputs, threads."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.backends.registry import load_backend
from planish.backends.script_run import ScriptSession
from planish.ir.errors import ExportError, PlanishError, UnsupportedError, UsageError
from tests.support.script_files import module, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh()).eval()
    written(net, tmp_path / "model.pt", (torch.ones(16, 8),))
    return tmp_path / "model.pt"


def _rewritten(path: Path, change: dict[str, bytes | None]) -> Path:
    """A copy with other contents for the members that end so; None leaves one out."""
    other = path.with_name("other.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            ends = [end for end in change if name.endswith(end)]
            content = change[ends[0]] if ends else old.read(name)
            if content is not None:
                new.writestr(name, content)
    return other


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"call": 3}', b"\xff\xfe"])
def test_a_damaged_description(path: Path, text: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"planish.json in .* is damaged") as caught:
        ScriptSession(_rewritten(path, {"planish.json": text}))
    assert caught.value.hint


@pytest.mark.parametrize("end", ["data.pkl", "file.py", "constants.pkl"])
def test_damaged_contents(path: Path, end: str) -> None:
    for content in (None, b"", b"\x80\x02nothing"):
        with pytest.raises(PlanishError):
            ScriptSession(_rewritten(path, {end: content})).run([torch.ones(16, 8)])


def test_half_a_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnsupportedError, match="no TorchScript file"):
        ScriptSession(path)


def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "model.pt"))
    session = ScriptSession(tmp_path / "model.pt")
    assert session.metadata is None
    assert session.input_names == ("input",)
    assert torch.equal(session.run([torch.tensor([-1.0, 2.0])])[0], torch.tensor([0.0, 2.0]))


def test_other_inputs_than_the_file_takes(path: Path) -> None:
    session = ScriptSession(path)
    for count in (0, 2):
        with pytest.raises(UsageError, match=f"takes 1 inputs, got {count}"):
            session.run([torch.ones(16, 8)] * count)
    with pytest.raises(ExportError, match=r"must be f32 \[16, 8\]") as caught:
        session.run([torch.ones(16, 9)])
    assert caught.value.hint
    with pytest.raises(ExportError, match="fails on these inputs"):
        session.run([3])


def test_timing_leaves_the_threads_of_the_process_alone(path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run = load_backend("torchscript").opened(path)
        run([torch.ones(16, 8)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_operators_within_branches_are_counted(tmp_path: Path) -> None:
    model = module(
        lambda self, x: torch.cond(x.sum() > 0, lambda v: v.sin() + 1, lambda v: v * 2, (x,))
    )
    result = written(model, tmp_path / "model.pt", (torch.ones(3),))
    assert result.report.runtime is not None
    assert {"aten::sin", "aten::mul"} <= set(ScriptSession(tmp_path / "model.pt").operators())
