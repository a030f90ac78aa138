"""What the report and the file say of a quantized model: kernels, fallbacks, the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import planish
from planish.optimized import Optimized
from tests.support.planted import planted


class Net(nn.Module):
    """A convolution and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))
        return y


def optimized(**options: Any) -> Optimized:
    torch.manual_seed(1)
    program = planted(Net(), (torch.randn(2, 3, 6, 6),), **options)
    return planish.optimize(program, recipe="none", target="onnx")


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(str(path)).metadata_props}


def test_the_report_counts_integer_kernels_and_says_what_was_proved(tmp_path: Path) -> None:
    result = optimized(last=True)
    artifact = result.export(tmp_path / "m.onnx")
    runtime = json.loads(result.report.to_json())["runtime"]
    assert [use["node"] for use in runtime["kernels"]] == ["conv2d", "linear"]
    assert runtime["kernels"][0]["kernel"] == "QLinearConv"
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert runtime["stepwise"] == json.loads(json.dumps(artifact.comparison.stepwise.to_dict()))
    assert runtime["fidelity"] == artifact.comparison.fidelity.to_dict()
    text = " ".join(result.report.to_text().split())
    assert "2 of 2 quantized operators run integer kernels" in text
    assert f"{runtime['stepwise']['values']} values of the file agree with the program" in text
    assert "runs in float" not in text


def test_float_fallbacks_are_listed_with_their_reasons(tmp_path: Path) -> None:
    result = optimized(dynamic=True)
    result.export(tmp_path / "m.onnx")
    text = " ".join(result.report.to_text(width=160).split())
    assert "1 of 2 quantized operators run integer kernels" in text
    assert "conv2d aten.conv2d the runtime runs" in text
    page = result.report.to_html()
    assert "the runtime runs" in page


@pytest.mark.parametrize("largest", [0.5, 1.0])
def test_the_file_says_on_which_processors_its_answers_hold(largest: float, tmp_path: Path) -> None:
    """Half of the codes of the weights leave room for two products in 16 bits."""
    result = optimized()
    for name, codes in list(result.program.constants.items()):
        if name.endswith("weight.q"):
            assert isinstance(codes, Tensor)
            result.program.constants[name] = codes.float().mul(largest).to(torch.int8)
    result.export(tmp_path / "m.onnx")
    found = json.loads(metadata(tmp_path / "m.onnx")["planish.instruction_sets"])
    assert ("VNNI" in found[0]) == (largest == 1.0)
    assert f"its answers hold on: {', '.join(found)}" in " ".join(result.report.to_text().split())


def test_a_float_model_says_nothing_of_it(tmp_path: Path) -> None:
    result = planish.optimize(Net().eval(), torch.randn(2, 3, 6, 6), target="onnx")
    result.export(tmp_path / "m.onnx")
    assert "planish.instruction_sets" not in metadata(tmp_path / "m.onnx")
    assert "quantized operators" not in result.report.to_text()
    runtime = json.loads(result.report.to_json())["runtime"]
    assert runtime["kernels"] == []
    assert runtime["stepwise"] is None
