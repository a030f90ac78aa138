"""What the report says of sparse weights, as text, JSON and HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.ir.tensortype import SparseLayout
from planish.sparsity import CPU_NOTE, SparseWeight, packed_bytes, sparsity_dict, sparsity_lines


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


X = torch.randn(2, 16)
PRUNED = "sparsify{score=magnitude}"


@pytest.mark.parametrize(
    ("layout", "numel", "bits", "size"),
    [
        (SparseLayout(2, 4, 1), 1024, 16, 1024 + 128),  # half of the halves, 2 bits for each
        (SparseLayout(2, 4, 1), 1024, 32, 2048 + 128),
        (SparseLayout(2, 4, 0), 1024, 8, 512 + 128),
        (SparseLayout(2, 4, 0), 1024, 4, 256 + 128),
        (SparseLayout(1, 8, 1), 1024, 32, 128 * 35 // 8),
        (SparseLayout(512, 1024, None), 1024, 32, None),
        (SparseLayout(32, 64, None, (4, 4)), 1024, 32, None),
    ],
)
def test_packed_sizes(layout: SparseLayout, numel: int, bits: int, size: int | None) -> None:
    assert packed_bytes(layout, numel, bits) == size


@pytest.mark.parametrize(
    ("recipe", "dtype", "dense", "packed"),
    [
        (PRUNED, "f32", 2048, 1024 + 64),
        (
            PRUNED + ", round-weights{dtype=uint4,block_size=16}",
            "uint4",
            256,
            128 + 64,
        ),
        (PRUNED + ", quantize{mode=dynamic}", "int8", 512, 256 + 64),
        (PRUNED.replace("}", ",pattern=unstructured}"), "f32", 2048, None),
    ],
)
def test_every_sparse_weight_is_listed(
    recipe: str, dtype: str, dense: int, packed: int | None, tmp_path: Path
) -> None:
    result = planish.optimize(Net().eval(), X, recipe=recipe)
    facts = json.loads(result.report.to_json())["sparsity"]
    first, second = facts["weights"]
    assert first["name"].startswith("up.")
    assert second["name"].startswith("down.")
    assert first["dtype"] == dtype
    assert (first["dense_bytes"], first["packed_bytes"]) == (dense, packed)
    assert 0.5 <= first["zeros"] < 0.8
    text = result.report.to_text(width=140)
    assert first["name"] in text
    assert "2 weights are sparse: 2 " + ("unstructured" if packed is None else "2:4") in text
    assert (CPU_NOTE in " ".join(text.split())) == (packed is not None)
    assert ("kernels multiply zeros" in result.report.to_html()) == (packed is not None)
    assert '"sparsity":{"weights"' in result.report.to_html()
    result.export(tmp_path / "model.onnx")
    assert "the file was read back: 2 of 2 sparse weights keep their zeros" in str(result.report)
    held = json.loads(result.report.to_json())["runtime"]["sparsity"]
    assert [found["exact"] for found in held] == [True, True]


def test_nothing_is_said_of_dense_programs() -> None:
    report = planish.optimize(Net().eval(), X).report
    assert report.to_dict()["sparsity"] is None
    assert "sparse" not in report.to_text()


def test_the_note_is_for_cpus_and_for_groups() -> None:
    weight = SparseWeight("w", SparseLayout(2, 4, 1), (8, 8), "float16", 0.5, 128, 72)
    facts: Any = sparsity_dict([weight], "onnxruntime-cpu")
    assert facts["note"] == CPU_NOTE
    assert "2:4 sparsity does not make" in CPU_NOTE
    assert "faster on CPU runtimes" in CPU_NOTE
    facts = sparsity_dict([weight], "some-gpu")
    assert facts["note"] is None
    assert CPU_NOTE not in sparsity_lines([weight], "some-gpu", None)
