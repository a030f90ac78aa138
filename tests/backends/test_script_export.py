"""TorchScript files: what they hold, that plain torch runs them, and what they refuse."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import planish
from planish.backends.script_run import ScriptSession
from planish.ir.errors import ExportError, UnsupportedError
from planish.tools.candidates import make_inputs, open_candidate
from tests.support.real_models import inputs, loaded
from tests.support.script_files import answers_of


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_quantized_layers_become_integer_kernels(tmp_path: Path) -> None:
    description, model = loaded("minilm")
    result = planish.optimize(
        model,
        inputs("minilm"),
        dynamic_shapes=description.dynamic_shapes,
        recipe="int8-dynamic",
        target="torchscript",
    )
    artifact = result.export(tmp_path / "model.pt")
    assert {use.kernel for use in artifact.kernels} == {"onednn::qlinear_pointwise.tensor"}
    assert artifact.operators["onednn::qlinear_pointwise"] == len(artifact.kernels)
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.max_steps <= 1
    args, kwargs = inputs("minilm")
    here = pytree.tree_leaves(result.model(*args, **kwargs))
    (there,) = answers_of(artifact.path, [(args, kwargs)])
    assert all(_far(a, b) < 0.12 for a, b in zip(there, here, strict=True))


class Small(nn.Module):
    """A residual net of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.stem(x))
        b = a + self.point(torch.relu(self.depth(a)))
        return self.head(nn.functional.max_pool2d(b, 2).mean((2, 3)))


def test_convolutions_of_pictures_stay_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(2, 3, 16, 16) for _ in range(4)]
    result = planish.optimize(
        Small().eval(),
        samples[0],
        recipe="int8-static",
        calibration=[(s,) for s in samples],
        dynamic_shapes=({0: Dim("batch", max=8)},),
        target="torchscript",
    )
    artifact = result.export(tmp_path / "model.pt")
    kernels = {use.operator: use.kernel for use in artifact.kernels}
    assert kernels["aten.conv2d"] == "onednn::qconv2d_pointwise"
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.values > 5
    for use in artifact.kernels:
        assert (use.kernel is None) == bool(use.reason)


def test_codes_of_weights_stay_small_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    sizes = {}
    for recipe in ("none", "int8-weight", "int4-weight"):
        result = planish.optimize(
            net, torch.randn(16, 256), recipe=recipe, target="torchscript",
            calibration=None if recipe == "none" else [torch.randn(16, 256)],
        )  # fmt: skip
        artifact = result.export(tmp_path / f"{recipe}.pt")
        sizes[recipe] = artifact.bytes
        assert all("dequantized" in use.reason for use in artifact.kernels)
    assert sizes["int8-weight"] < 0.32 * sizes["none"]
    assert sizes["int4-weight"] < 0.25 * sizes["none"]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(Answer)


class Nested(nn.Module):
    """Takes a dict and a constant, gives what its style says."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.linear = nn.Linear(8, 8)

    def forward(self, parts: dict[str, Tensor], scale: int = 2, mask: Any = None) -> Any:
        a = self.linear(parts["x"]) * scale
        b = a + parts["y"]
        return {
            "dict": {"a": a, "b": b},
            "tuple": (a, (b, None)),
            "list": [a, b],
            "named": Pair(a, b),
            "dataclass": Answer(a, b),
        }[self.style]


@pytest.mark.parametrize(
    ("style", "remark"),
    [("dict", ""), ("tuple", ""), ("list", ""), ("named", ""), ("dataclass", "named tuple")],
)
def test_structures_are_kept(style: str, remark: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested(style).eval()
    call = {"parts": {"x": torch.randn(3, 8), "y": torch.randn(3, 8)}}
    result = planish.optimize(model, call, recipe="none", target="torchscript")
    result.export(tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(**call)
    module = ScriptSession(tmp_path / "model.pt").module
    found = module(call["parts"])
    leaves = [t for t in pytree.tree_leaves(found) if t is not None]
    known = [t for t in pytree.tree_leaves(expected) if t is not None]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(leaves, known, strict=True))
    if style == "dataclass":
        assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    else:
        assert pytree.tree_structure(found).num_nodes == pytree.tree_structure(expected).num_nodes
        assert isinstance(found, (dict, tuple, list))
    assert any(remark in sentence for sentence in result.report.remarks) or not remark


def test_other_sizes_run_and_illegal_ones_are_told(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Flatten()).eval()
    shapes = ({0: Dim("batch", min=2, max=6)},)
    result = planish.optimize(
        net, torch.randn(3, 4, 8), dynamic_shapes=shapes, recipe="none", target="torchscript"
    )
    result.export(tmp_path / "model.pt")
    session = ScriptSession(tmp_path / "model.pt")
    x = torch.randn(5, 4, 8)
    assert torch.allclose(session.run([x])[0], net(x), atol=1e-5)
    for bad in (torch.randn(7, 4, 8), torch.randn(3, 5, 8), torch.randn(3, 4, 8).double()):
        with pytest.raises(ExportError, match=r"must be f32 \[batch, 4, 8\], batch from 2 to 6"):
            session.run([bad])


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: v.sin() + 1, lambda v: v * 2, (x,))


def test_a_branch_stays_a_branch(tmp_path: Path) -> None:
    result = planish.optimize(Branch().eval(), torch.ones(3), recipe="none", target="torchscript")
    result.export(tmp_path / "model.pt")
    session = ScriptSession(tmp_path / "model.pt")
    for x in (torch.ones(3), -torch.ones(3)):
        assert torch.allclose(session.run([x])[0], Branch()(x))


_EXPORT = """
import sys, torch, planish
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()).eval()
planish.optimize(net, torch.randn(16, 32), target="torchscript").export(sys.argv[1])
"""


def test_equal_programs_give_equal_files_and_a_loaded_one_saves_again(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "model.pt", tmp_path / "b" / "model.pt"]
    for path in paths:
        path.parent.mkdir()
        subprocess.run([sys.executable, "-c", _EXPORT, str(path)], check=True, capture_output=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    x = torch.randn(16, 32)
    session = ScriptSession(paths[0])
    torch.jit.save(session.module, str(tmp_path / "again.pt"))
    again = torch.jit.load(str(tmp_path / "again.pt"))
    assert torch.equal(again(x), session.run([x])[0])
    assert session.metadata is not None
    assert session.metadata["inputs"] == [{"name": "input", "dtype": "float32", "shape": [16, 32]}]
    assert json.dumps(session.metadata)


def test_files_are_compared_and_timed_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh()).eval()
    shapes = ({0: Dim("batch", max=8)},)
    for name in ("a.pt", "a.onnx"):
        result = planish.optimize(net, torch.randn(3, 8), dynamic_shapes=shapes)
        result.export(tmp_path / name)
    opened = [open_candidate(str(tmp_path / name)) for name in ("a.onnx", "a.pt")]
    assert opened[0].slots == opened[1].slots
    values = make_inputs(opened, {"batch": 5})
    first, second = (candidate.run(values) for candidate in opened)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.shape == (5, 4)
        assert abs(array - second[name]).max() < 1e-5


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x04}\x94.")  # an empty dict
    with pytest.raises(UnsupportedError, match="no TorchScript file, and other pickles"):
        ScriptSession(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UnsupportedError, match="no TorchScript file"):
        ScriptSession(path)


def test_an_opset_is_a_thing_of_onnx(tmp_path: Path) -> None:
    result = planish.optimize(
        nn.ReLU().eval(), torch.randn(2, 3), recipe="none", target="torchscript"
    )
    with pytest.raises(ExportError, match="has no opset"):
        result.export(tmp_path / "model.pt", opset=20)
    assert not list(tmp_path.iterdir())


_LOADER = r"""
#include <torch/script.h>
#include <fstream>
#include <iterator>
int main(int, char** argv) {
  auto module = torch::jit::load(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  auto inputs = torch::jit::pickle_load(bytes).toListRef().vec();
  c10::InferenceMode guard;
  auto out = module.forward(inputs);
  auto first = out.isTuple() ? out.toTuple()->elements()[0].toTensor() : out.toTensor();
  first = first.contiguous();
  std::ofstream made(argv[3], std::ios::binary);
  made.write(static_cast<char*>(first.data_ptr()), first.nbytes());
}
"""


def test_a_program_in_cpp_runs_it(tmp_path: Path) -> None:
    from shutil import which

    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = which("g++") or which("clang++")
    if compiler is None or not Path(sysconfig.get_paths()["include"]).parent.is_dir():
        pytest.skip("there is no C++ compiler")
    description, model = loaded("minilm")
    result = planish.optimize(
        model, inputs("minilm"), dynamic_shapes=description.dynamic_shapes, target="torchscript"
    )
    result.export(tmp_path / "model.pt")
    (tmp_path / "main.cpp").write_text(_LOADER, encoding="utf-8")
    folders = library_paths()
    command = [
        compiler,
        "-O0",
        "-std=c++20",
        str(tmp_path / "main.cpp"),
        "-o",
        str(tmp_path / "run"),
    ]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    command += [f"-I{p}" for p in include_paths()] + [f"-L{p}" for p in folders]
    command += [f"-Wl,-rpath,{p}" for p in folders] + ["-Wl,--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    _, kwargs = inputs("minilm", 1)
    torch.save([kwargs["input_ids"], kwargs["attention_mask"]], tmp_path / "in")
    files = [str(tmp_path / name) for name in ("run", "model.pt", "in", "out")]
    subprocess.run(files, check=True, capture_output=True, text=True)
    raw = bytearray((tmp_path / "out").read_bytes())
    expected = pytree.tree_leaves(result.model(**kwargs))[0]
    found = torch.frombuffer(raw, dtype=torch.float32).reshape(expected.shape)
    assert _far(found, expected) < 1e-4
