"""A failed export leaves a bundle too, and a wrong path does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.ir.errors import PlanishError
from planish.ir.text import text
from planish.passes.debug.bundle import failure_of, load_bundle, replay
from tests.passes.debug.bundling import Net, bundle_in, sample

COMMAND_LINE = "from planish.tools.cli import main; main()"


class Gcd(nn.Module):
    """An operator that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.gcd(x, x + 4)


# -- exports --------------------------------------------------------------------------------------


def test_a_failed_export_replays_in_a_fresh_process(tmp_path: Path) -> None:
    integers = torch.arange(6).reshape(2, 3)
    result = planish.optimize(Gcd().eval(), (integers,), recipe="none", dump_dir=tmp_path)
    with pytest.raises(planish.PlanishError) as caught:
        result.export(tmp_path / "model.onnx", target="onnx")
    bundle = load_bundle(bundle_in(tmp_path))
    assert caught.value.replay == f"planish repro {bundle.folder}"
    assert bundle.failure.signature == "export/UnsupportedError/aten.gcd"
    assert bundle.facts.export is not None
    assert bundle.facts.export.target == "onnx"
    assert text(bundle.program) == text(result.program)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, "repro", str(bundle.folder), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["got"]["signature"] == bundle.failure.signature
    assert done.returncode == 0


def test_a_crash_of_the_emitter_tells_the_choices_made_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: object) -> None:
        raise IndexError("out of operators")

    result = planish.optimize(Net().eval(), (sample(),), recipe="none", dump_dir=tmp_path)
    monkeypatch.setattr("planish.backends.onnx_translate.emit", crash)
    with pytest.raises(IndexError) as caught:
        result.export(tmp_path / "model.onnx")
    bundle = load_bundle(bundle_in(tmp_path))
    assert caught.value.__notes__ == [f"replay: planish repro {bundle.folder}"]
    assert bundle.facts.export is not None
    assert bundle.facts.export.choices is not None
    assert set(bundle.facts.export.choices) == {"linear"}
    again = replay(bundle)
    assert isinstance(again, IndexError)
    assert failure_of(again).signature == bundle.failure.signature


def test_a_wrong_path_is_no_failure_of_the_export(tmp_path: Path) -> None:
    result = planish.optimize(Net().eval(), (sample(),), recipe="none", dump_dir=tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    for path, opset in (("absent/model.onnx", None), ("folder.onnx", None), ("m.onnx", 3)):
        with pytest.raises(PlanishError) as caught:
            result.export(tmp_path / path, opset=opset)
        assert caught.value.replay is None
    assert not [p for p in tmp_path.iterdir() if "planish-repro" in p.name]
