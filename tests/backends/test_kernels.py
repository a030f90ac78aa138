"""Every quantized operator is reported as an integer kernel or as a float fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planish.backends.base import Artifact, ExportOptions
from planish.backends.kernels import quantized_operators
from planish.backends.registry import load_backend
from planish.ir.program import Program
from tests.support.planted import Net, planted


def net(**options: Any) -> Program:
    torch.manual_seed(1)
    return planted(Net(), (torch.randn(2, 3, 8, 8),), **options)


def export(program: Program, folder: Path, target: str = "onnx", **options: Any) -> Artifact:
    return load_backend(target).export(program, folder / "m.onnx", ExportOptions(**options))


def test_the_quantized_operators_are_those_that_read_dequantized_values() -> None:
    names = [node.name for node in quantized_operators(net(last=True))]
    # Behind a flatten and a transpose, which only move values, the linear is still quantized.
    assert names == ["conv2d", "linear", "linear_1"]


@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
def test_integer_kernels_are_found_in_the_graph_that_runs(target: str, tmp_path: Path) -> None:
    artifact = export(net(last=True), tmp_path, target)
    assert [use.node for use in artifact.kernels] == ["conv2d", "linear", "linear_1"]
    assert all(use.kernel is not None and use.reason == "" for use in artifact.kernels)
    assert artifact.kernels[0].kernel == "QLinearConv"
    assert artifact.runtime is not None
    for use in artifact.kernels:
        assert any(str(use.kernel) in operator for operator in artifact.runtime.operators)
    assert artifact.kernels[0].operator == "aten.conv2d"
    assert "self.conv(x)" in str(artifact.kernels[0].source)


def test_an_operator_that_runs_in_float_says_why(tmp_path: Path) -> None:
    """ONNX Runtime has no integer convolution for ranges chosen at run time."""
    artifact = export(net(dynamic=True), tmp_path)
    uses = {use.node: use for use in artifact.kernels}
    assert uses["conv2d"].kernel is None
    assert "Conv in float" in uses["conv2d"].reason
    assert artifact.runtime is not None
    assert not any("QLinearConv" in operator for operator in artifact.runtime.operators)


def test_a_float_program_has_no_quantized_operators(tmp_path: Path) -> None:
    artifact = export(planted(nn.ReLU(), (torch.randn(2, 3),)), tmp_path)
    assert artifact.kernels == ()


def test_a_file_that_was_not_run_claims_no_kernels(tmp_path: Path) -> None:
    assert export(net(), tmp_path, verify=False).kernels == ()
