"""ONNX Runtime: choices are measured, cached and replayed; its optimized graph is read back."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from planish.backends import ort_measure, ort_run
from planish.backends.base import Artifact, ExportOptions
from planish.backends.ort_legalize import CHOICES
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.errors import ExportError, RecipeError
from planish.ir.program import Program


class Block(nn.Module):
    """What every choice is about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.rms = nn.RMSNorm(16)
        angle = torch.arange(5)[:, None] * torch.linspace(0.1, 1.0, 2)
        self.cos = nn.Buffer(torch.cat([angle, angle], -1).cos())
        self.sin = nn.Buffer(torch.cat([angle, angle], -1).sin())

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(x).view(2, 5, 4, 4).transpose(1, 2)
        turned = torch.ops.planish.rotary_embedding(heads, self.cos, self.sin)
        y = nn.functional.scaled_dot_product_attention(turned, turned, heads)
        z: Tensor = self.rms(self.norm(x + y.transpose(1, 2).reshape(2, 5, 16)))
        return z


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Block().eval(), (torch.randn(2, 5, 16),))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def export(program: Program, tmp_path: Path, **options: object) -> Artifact:
    backend = load_backend("onnxruntime-cpu")
    return backend.export(program, tmp_path / "m.onnx", ExportOptions(**options))  # type: ignore[arg-type]


# What the file holds only where the default form was taken, and only where the alternative was.
SIGNS = {
    "residual": ("Sum", "Add"),
    "linear": ("Gemm", "MatMul"),
    "attention": ("Attention", "Softmax"),
    "rms-norm": ("RMSNormalization", "Sqrt"),
    "rotary": ("RotaryEmbedding", "Neg"),
}
# Those that a program without integers meets.
DEFAULTS = {c.name: c.default for c in CHOICES if c.name in SIGNS}


@pytest.mark.parametrize("name", SIGNS)
def test_each_choice_changes_the_file_and_not_the_numbers(
    program: Program, tmp_path: Path, name: str
) -> None:
    choice = next(c for c in CHOICES if c.name == name)
    for form, sign in zip((choice.default, choice.alternative), SIGNS[name], strict=True):
        artifact = export(program, tmp_path, choices={**DEFAULTS, name: form})
        assert artifact.choices == {**DEFAULTS, name: form}
        assert sign in artifact.operators
        other = SIGNS[name][sign == SIGNS[name][0]]
        assert other not in artifact.operators or name in ("residual", "linear")


def test_a_faster_alternative_is_taken_and_remembered(
    program: Program, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(name: str) -> float:
        measured.append(name)
        return 2.0 if name == "linear" else 1.01

    ort_measure._measure_once.cache_clear()
    monkeypatch.setattr(ort_measure, "measure", measure)
    remarks: list[str] = []
    first = export(program, tmp_path, remark=remarks.append)
    assert first.choices == {**DEFAULTS, "linear": "matmul"}
    assert sorted(measured) == sorted(DEFAULTS)
    assert any("measured lowering linear" in r for r in remarks)
    (file,) = (cache / "planish").iterdir()
    assert json.loads(file.read_text())["linear"] == 2.0
    ort_measure._measure_once.cache_clear()
    again = export(program, tmp_path)
    assert again.choices == first.choices
    assert len(measured) == len(DEFAULTS)


def test_replayed_choices_measure_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_measure, "measure", lambda name: pytest.fail("measured"))
    ort_measure._measure_once.cache_clear()
    recorded = {**DEFAULTS, "residual": "add"}
    assert export(program, tmp_path, choices=recorded).choices == recorded


def test_an_unknown_choice_is_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no lowering choice 'lienar'"):
        export(program, tmp_path, choices={"lienar": "gemm"})
    with pytest.raises(RecipeError, match="use gemm or matmul"):
        export(program, tmp_path, choices={"linear": "conv"})


def test_an_older_opset_overrules_a_replayed_choice_and_says_so(
    program: Program, tmp_path: Path
) -> None:
    remarks: list[str] = []
    artifact = export(program, tmp_path, choices=DEFAULTS, opset=20, remark=remarks.append)
    assert artifact.choices["attention"] == "matmul"
    assert any("attention=operator needs opset 23" in r for r in remarks)


def test_a_damaged_cache_is_measured_anew(
    program: Program, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ort_measure.cache_file()
    file.parent.mkdir(parents=True)
    file.write_text("{not json")
    monkeypatch.setattr(ort_measure, "measure", lambda name: 1.0)
    ort_measure._measure_once.cache_clear()
    assert export(program, tmp_path).choices == DEFAULTS
    assert json.loads(file.read_text())["rotary"] == 1.0


def test_an_unwritable_cache_is_a_remark(
    program: Program, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(ort_measure, "measure", lambda name: 1.0)
    ort_measure._measure_once.cache_clear()
    remarks: list[str] = []
    export(program, tmp_path, remark=remarks.append)
    assert any("cannot be written" in r for r in remarks)


def test_the_real_measurement_returns_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_measure, "_ROUNDS", 2)
    for choice in CHOICES:
        assert 0.01 < ort_measure.measure(choice.name) < 100


def test_the_optimized_graph_is_read_back(program: Program, tmp_path: Path) -> None:
    artifact = export(program, tmp_path, choices={**DEFAULTS, "residual": "add"})
    assert artifact.runtime is not None
    assert artifact.runtime.runtime.startswith("onnxruntime ")
    assert artifact.runtime.providers == ("CPUExecutionProvider",)
    assert artifact.operators["Add"] == 1
    assert artifact.runtime.operators["com.microsoft.SkipLayerNormalization"] == 1
    assert load_backend("onnxruntime-cpu").read_back(artifact.path) == artifact.runtime


def test_a_large_file_is_read_back_by_what_ran(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_run, "_WRITE_LIMIT_BYTES", 10)
    artifact = export(program, tmp_path, choices=DEFAULTS)
    assert artifact.runtime is not None
    assert artifact.runtime.operators["Attention"] == 1
    assert artifact.runtime.notes


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match="ONNX Runtime refuses the file"):
        load_backend("onnx").read_back(path)


def test_a_bfloat16_input_cannot_be_fed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bfloat16 input cannot be fed"):
        ort_run.as_array(torch.zeros(2, dtype=torch.bfloat16))
