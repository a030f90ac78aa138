"""Sparse weights in written files: found by reading them back, in every form they take there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import planish
from planish.backends.onnx_graph import Emitter
from planish.backends.sparse_files import sparse_in_file
from planish.ir.errors import VerificationError
from planish.ir.program import Program


class Net(nn.Module):
    """A convolution and two linears, one of them large enough for blocks of 16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.conv(x).relu().mean((2, 3))).relu())
        return y


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
RECIPES = [
    "sparsify{score=magnitude}",
    "sparsify{score=magnitude,pattern=unstructured,ratio=0.7}",
    "sparsify{score=magnitude}, cast-half",
    "sparsify{score=magnitude}, quantize",
    "sparsify{score=magnitude}, quantize{mode=dynamic}",
    "sparsify{score=magnitude}, round-weights{dtype=int4,block_size=16}",
    "sparsify{score=magnitude}, round-weights{dtype=uint4,block_size=16}",
    "sparsify{score=magnitude}, round-weights{dtype=int4,block_size=24}",  # the last is short
    "sparsify{score=magnitude}, round-weights{dtype=uint4,block_size=128}",  # so is the only one
    "sparsify{score=magnitude}, round-weights{dtype=int8,block_size=0,convolutions=true}",
]


def made(recipe: str, target: str = "onnxruntime-cpu") -> Any:
    batches = [torch.randn(2, 8, 6, 6) for _ in range(4)]
    return planish.optimize(Net().eval(), X, recipe=recipe, target=target, calibration=batches)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnx"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_form_keeps_its_zeros(recipe: str, target: str, tmp_path: Path) -> None:
    result = made(recipe, target)
    artifact = result.export(tmp_path / "model.onnx")
    assert [found.constant for found in artifact.sparsity] == list(result.program.layouts)
    assert len(artifact.sparsity) == 3
    for found in artifact.sparsity:
        assert found.stored
        assert found.exact or "conv" in found.constant  # a filter may be merged with its pixels
    held = {p.key: p.value for p in onnx.load(artifact.path).metadata_props}
    layouts = json.loads(held["planish.sparsity"])
    assert layouts == {n: str(s) for n, s in result.program.layouts.items()}


def changed(path: Path, name: str, edit: Any) -> Path:
    """A copy of a file in which one constant was edited."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            tensor.CopyFrom(numpy_helper.from_array(edit(array), name))
    other = path.with_name("changed.onnx")
    onnx.save(model, other)
    return other


def exported(recipe: str, tmp_path: Path) -> tuple[Program, Path, str]:
    """A program, its file, and the name of the constant there that holds the last linear."""
    result = made(recipe)
    artifact = result.export(tmp_path / "model.onnx")
    (found,) = (f for f in artifact.sparsity if f.constant.startswith("down"))
    return result.program, artifact.path, found.stored[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_zero_that_is_none_any_more_is_found(recipe: str, tmp_path: Path) -> None:
    program, path, name = exported(recipe, tmp_path)

    def revived(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[:8] = 1
        return array

    with pytest.raises(VerificationError, match=r"@down.* is sparse<.*does not keep that"):
        sparse_in_file(program, changed(path, name, revived))
    assert sparse_in_file(program, path)


def test_a_dense_weight_in_its_place_is_found(tmp_path: Path) -> None:
    program, path, name = exported("sparsify{score=magnitude}", tmp_path)
    dense = changed(path, name, lambda array: array + np.float32(1))
    with pytest.raises(VerificationError, match=r"8 of 8 of its rows .*0.0% zeros"):
        sparse_in_file(program, dense)


def test_an_export_that_revives_a_zero_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Emitter.tensor

    def revived(e: Emitter, tensor: Tensor, name: str, kind: str | None = None) -> Any:
        if name.startswith("down.weight"):
            tensor = torch.where(tensor == 0, 1e-9, tensor)  # nothing that an output would show
        return whole(e, tensor, name, kind)

    result = made("sparsify{score=magnitude}")
    monkeypatch.setattr(Emitter, "tensor", revived)
    with pytest.raises(VerificationError, match="does not keep that"):
        result.export(tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_a_filter_whose_window_was_rearranged_is_counted(tmp_path: Path) -> None:
    program = made("sparsify{score=magnitude}").program
    weight = program.constants["conv.weight"]
    assert isinstance(weight, Tensor)
    own = weight.numpy()

    def written(array: np.ndarray) -> Path:
        names = [n for n in program.layouts if n != "conv.weight"]
        values = [(n, program.constants[n]) for n in names]
        tensors = [
            numpy_helper.from_array(value.numpy(), name)
            for name, value in values
            if isinstance(value, Tensor)
        ]
        tensors.append(numpy_helper.from_array(array, "conv.weight.merged"))
        graph = onnx.helper.make_graph([], "held", [], [], tensors)
        path = tmp_path / "held.onnx"
        onnx.save(onnx.helper.make_model(graph), path)
        return path

    twice = np.concatenate([own[..., ::-1], np.zeros((16, 8, 3, 1), np.float32), own], 3)
    found = {f.constant: f for f in sparse_in_file(program, written(twice))}
    assert not found["conv.weight"].exact
    assert found["conv.weight"].stored == ("conv.weight.merged",)
    twice[0, 0, 0, 3] = 1.0
    with pytest.raises(VerificationError, match=r"@conv.weight is sparse"):
        sparse_in_file(program, written(twice))


def test_a_program_without_layouts_is_not_read_back(tmp_path: Path) -> None:
    result = planish.optimize(Net().eval(), X)
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.sparsity == ()
    assert sparse_in_file(result.program, tmp_path / "absent.onnx") == ()
    assert "planish.sparsity" not in {p.key for p in onnx.load(artifact.path).metadata_props}
