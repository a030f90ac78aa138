"""The whole road on pretrained models: capture, exact recipe, both targets, equal to PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils import _pytree as pytree

import planish
from planish.ir.compare import difference
from planish.tools.bench.real_models import REAL_MODELS
from tests.support.real_models import inputs, loaded

QUICK = {"minilm", "efficientnet-lite0"}
IDS = [
    pytest.param(m.id, marks=[] if m.id in QUICK else pytest.mark.slow)
    for m in REAL_MODELS
    if m.exports
]

_OPTIMIZED: dict[str, planish.Optimized] = {}


def optimized(model_id: str) -> planish.Optimized:
    """Each model optimized once for the whole module."""
    if model_id not in _OPTIMIZED:
        description, model = loaded(model_id)
        args, kwargs = inputs(model_id, 0)
        _OPTIMIZED[model_id] = planish.optimize(
            model, (args, kwargs), dynamic_shapes=description.dynamic_shapes
        )
    return _OPTIMIZED[model_id]


def answers(model_id: str, size: int) -> tuple[torch.Tensor, ...]:
    """What PyTorch answers, as flat tensors."""
    _, model = loaded(model_id)
    args, kwargs = inputs(model_id, size)
    with torch.no_grad():
        return tuple(pytree.tree_leaves(model(*args, **kwargs)))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("model_id", IDS)
def test_optimized_model_equals_pytorch(model_id: str, size: int) -> None:
    args, kwargs = inputs(model_id, size)
    outputs = tuple(pytree.tree_leaves(optimized(model_id).model(*args, **kwargs)))
    assert difference(answers(model_id, size), outputs) is None


@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
@pytest.mark.parametrize("model_id", IDS)
def test_exported_file_equals_pytorch(model_id: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    artifact = optimized(model_id).export(path, target=target)
    assert artifact.target == target
    if target == "onnx":
        file = onnx.load(path)
        onnx.checker.check_model(file, full_check=True)
        assert {o.domain for o in file.opset_import} <= {"", "ai.onnx"}
    for size in (0, 1):
        expected = answers(model_id, size)
        for engine in (run_ort, run_openvino) if target == "onnx" else (run_ort,):
            outputs = engine(path, artifact, inputs(model_id, size))
            assert difference(expected, outputs) is None, (engine.__name__, size)


def _feed(artifact: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, np.ndarray]:
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return {n: t.numpy() for n, t in zip(artifact.input_names, tensors, strict=True)}


def run_ort(path: Path, artifact: Any, call: Any) -> tuple[torch.Tensor, ...]:
    """Run the file in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(list(artifact.output_names), _feed(artifact, call))
    return tuple(torch.from_numpy(o) for o in outputs)


def run_openvino(path: Path, artifact: Any, call: Any) -> tuple[torch.Tensor, ...]:
    """Run the file in OpenVINO, in float32 as the file says."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(_feed(artifact, call))
    return tuple(torch.from_numpy(np.array(outputs[name])) for name in artifact.output_names)


def test_minilm_keeps_names_and_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "minilm.onnx"
    optimized("minilm").export(path)
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in graph.output] == ["last_hidden_state", "pooler_output"]
    dims = [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "sequence"]


def test_minilm_file_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    description, model = loaded("minilm")
    args, kwargs = inputs("minilm", 0)
    first = optimized("minilm")
    first.export(tmp_path / "first.onnx")
    again = planish.optimize(
        model,
        (args, kwargs),
        dynamic_shapes=description.dynamic_shapes,
        recipe=planish.Recipe.parse(str(first.recipe)),
    )
    again.export(tmp_path / "again.onnx")
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_minilm_file_tells_how_it_was_made(tmp_path: Path) -> None:
    result = optimized("minilm")
    path = tmp_path / "minilm.onnx"
    result.export(path)
    facts = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert facts["planish.version"] == planish.__version__
    assert planish.Recipe.parse(facts["planish.recipe"]).passes == result.recipe.passes
    assert "cosine" in facts["planish.fidelity"]


def test_all_batch_norms_of_lite0_are_gone() -> None:
    targets = [str(n.target) for n in optimized("efficientnet-lite0").program.operators]
    assert targets.count("aten.conv2d.default") == 49
    assert not [t for t in targets if "batch_norm" in t]


def test_report_has_what_a_script_reads() -> None:
    facts = optimized("minilm").report.to_dict()
    entry = {"name", "contract", "changes", "refusals", "seconds", "sqnr_db", "parameters",
             "bytes", "macs"}  # fmt: skip
    assert all(entry <= set(p) for p in facts["passes"])
    assert {"totals", "target", "runtime", "fidelity", "versions", "seed"} <= set(facts)
    assert {"sqnr_db", "cosine", "max_abs"} <= set(facts["fidelity"])
