"""The file: valid, the same in two engines, named after the user's names, written all or not."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.backends import onnx_export, onnx_file
from planish.backends.base import Artifact, ExportOptions
from planish.backends.registry import load_backend, load_target, target_names
from planish.ir.capture import capture
from planish.ir.errors import ExportError, UnsupportedError, UsageError
from planish.ir.program import Program

TARGETS = ("onnx", "onnxruntime-cpu")
METADATA = {"planish.version": "1.2.3", "planish.recipe": "exact", "planish.fidelity": "{}"}


class Encoder(nn.Module):
    """A transformer layer and a convolution, with outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
        self.conv = nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, input_ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = self.layer(self.embed(input_ids)) * scale
        return {"hidden": x, "pooled": self.conv(x.transpose(1, 2)).mean(-1)}


@pytest.fixture(scope="module")
def program() -> Program:
    batch, length = Dim("batch"), Dim("length", max=64)
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
    shapes = {"input_ids": {0: batch, 1: length}, "scale": {0: batch}}
    return capture(Encoder().eval(), (ids, torch.ones(2, 1, 1)), dynamic_shapes=shapes)


def export(program: Program, path: Path, target: str = "onnx", **options: Any) -> Artifact:
    return load_backend(target).export(program, path, ExportOptions(**options))


def inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "input_ids": generator.integers(0, 50, (batch, length)),
        "scale": generator.standard_normal((batch, 1, 1)).astype(np.float32),
    }


def expected(program: Program, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    answer = program(*[torch.from_numpy(v) for v in feeds.values()])
    return {name: value.numpy() for name, value in answer.items()}


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_the_portable_file_is_valid(program: Program, tmp_path: Path, opset: int) -> None:
    path = tmp_path / "m.onnx"
    artifact = export(program, path, opset=opset)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    assert artifact.opset == opset
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_two_engines_agree_with_torch(
    program: Program, tmp_path: Path, target: str, batch: int
) -> None:
    import onnxruntime
    import openvino

    path = tmp_path / "m.onnx"
    export(program, path, target)
    feeds = inputs(batch, 9)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, feeds)
    core = openvino.Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    other = compiled(feeds)
    for index, (name, value) in enumerate(expected(program, feeds).items()):
        np.testing.assert_allclose(got[index], value, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(other[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
def test_names_and_dimensions_are_the_users(program: Program, tmp_path: Path, target: str) -> None:
    path = tmp_path / "m.onnx"
    artifact = export(program, path, target)
    graph = onnx.load(str(path)).graph

    def described(values: Any) -> dict[str, list[Any]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    assert described(graph.input) == {"input_ids": ["batch", "length"], "scale": ["batch", 1, 1]}
    assert described(graph.output) == {"hidden": ["batch", "length", 16], "pooled": ["batch", 8]}
    assert artifact.input_names == ("input_ids", "scale")
    assert artifact.output_names == ("hidden", "pooled")
    assert "embed.weight" in {i.name for i in graph.initializer}


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_program_gives_the_same_bytes(
    program: Program, tmp_path: Path, target: str
) -> None:
    digests = set()
    for name in ("a.onnx", "b.onnx"):
        artifact = export(program.clone(), tmp_path / name, target, metadata=METADATA)
        digests.add(hashlib.sha256(artifact.path.read_bytes()).hexdigest())
        assert artifact.bytes == artifact.path.stat().st_size
    assert len(digests) == 1


def test_metadata_is_in_the_file(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export(program, path, metadata=METADATA)
    model = onnx.load(str(path))
    assert {p.key: p.value for p in model.metadata_props} == METADATA
    assert not any(node.metadata_props for node in model.graph.node)
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_weights_go_to_a_second_file_above_the_limit(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    artifact = export(program, path, external_data_bytes=1000)
    assert artifact.files == (path, tmp_path / "m.onnx.data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert artifact.bytes == sum(f.stat().st_size for f in artifact.files)
    held = onnx.load(str(path), load_external_data=False).graph.initializer
    outside = [i for i in held if i.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    for tensor in outside:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert facts["location"] == "m.onnx.data"
        assert int(facts["offset"]) % 4096 == 0
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in artifact.files:
        file.rename(moved / file.name)
    feeds = inputs(2, 5)
    got = load_backend("onnx").run(moved / "m.onnx", [torch.from_numpy(v) for v in feeds.values()])
    np.testing.assert_allclose(got[0], expected(program, feeds)["hidden"], atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was here before")

    def interrupted(*args: object, **kwargs: object) -> None:
        assert any(p.name != "m.onnx" for p in tmp_path.iterdir())  # it had begun to write
        raise error

    monkeypatch.setattr(onnx_export, "publish", interrupted)
    with pytest.raises(error):
        export(program, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"what was here before"


def test_a_full_disk_is_reported(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file, "_flush", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export(program, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_reported(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        export(program, tmp_path / "no" / "m.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        export(program, tmp_path)


def test_an_impossible_opset_is_reported(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"opset 9\n  try: use an opset from 18 to 24"):
        export(program, tmp_path / "m.onnx", opset=9)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.igamma(x, x)


@pytest.mark.parametrize("target", TARGETS)
def test_an_untranslatable_operator_is_named_with_its_line(tmp_path: Path, target: str) -> None:
    program = capture(Odd().eval(), (torch.rand(3),))
    with pytest.raises(UnsupportedError) as caught:
        export(program, tmp_path / "m.onnx", target)
    message = str(caught.value)
    assert "aten.igamma" in message
    assert f"{Path(__file__).name}:" in message
    assert "return torch.igamma(x, x)" in message
    assert list(tmp_path.iterdir()) == []


class Plain(nn.Module):
    """Outputs that are inputs, constants, the same value twice, or no tensor at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.arange(3.0))

    def forward(self, relu: Tensor) -> tuple[Any, ...]:
        y = relu.relu()
        return relu, self.table, y, y, None, 3, relu.shape[0]


def test_odd_outputs(tmp_path: Path) -> None:
    program = capture(Plain().eval(), (torch.randn(2, 3),), dynamic_shapes=({0: Dim("n")},))
    artifact = export(program, tmp_path / "m.onnx")
    assert artifact.output_names == ("output_0", "output_1", "output_2", "output_3", "output_6")
    got = load_backend("onnx").run(artifact.path, [torch.tensor([[1.0, -2.0, 0.0]])])
    assert [g.tolist() for g in got] == [
        [[1.0, -2.0, 0.0]], [0.0, 1.0, 2.0], [[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]], 1,
    ]  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.embed(ids))
        return result


@pytest.mark.parametrize("target", TARGETS)
def test_tied_weights_are_stored_once(tmp_path: Path, target: str) -> None:
    program = capture(Tied().eval(), (torch.tensor([[1, 2]]),))
    artifact = export(program, tmp_path / "m.onnx", target)
    assert artifact.bytes < 40 * 16 * 4 + 2000


def test_the_registry_names_the_nearest_target() -> None:
    assert target_names() == (*TARGETS, "torchscript", "torch-export", "aotinductor")
    assert load_target("onnx").suffix == ".onnx"
    with pytest.raises(UsageError, match="did you mean 'onnxruntime-cpu'"):
        load_backend("onnxruntime-gpu")
