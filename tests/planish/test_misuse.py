"""Bad input ends in one clear error: of the right kind, with what, where and what to do.

In every case the caller's model is bit-identical afterwards.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

import planish


class Net(nn.Module):
    """A small ordinary network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.drop(torch.relu(self.bn(self.conv(image)))) * scale


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error must name
            return x + 1
        return x - 1


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x


class Counter(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class OnlyEven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 4:
            raise ValueError("only four rows are supported")
        return x * 2


class Buggy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(3, 3)


def nan_net() -> nn.Module:
    net = Net().eval()
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = float("nan")
    return net


def half_trained() -> nn.Module:
    net = Net().eval()
    net.drop.train()
    return net


IMAGE = torch.randn(2, 3, 8, 8)


def optimize(model: Any, *args: Any, **kwargs: Any) -> Callable[[], object]:
    """A call to be made later, so that the model can be hashed before."""
    return lambda: planish.optimize(model, *args, **kwargs)


def net() -> nn.Module:
    return Net().eval()


def on_a_gpu() -> nn.Module:
    """A tensor that says it is on a GPU, on a machine that has none."""
    net = Net().eval()
    with FakeTensorMode():
        net.register_buffer("table", torch.empty(3, device="cuda"))
    return net


# name, model, call of it, error kind, fragments the message must hold
CASES: list[tuple[str, Callable[[], Any], Callable[[Any], object], type[Exception], list[str]]] = [
    ("a list as inputs", net, lambda m: planish.optimize(m, [IMAGE]),
     planish.UsageError, ["example_inputs is a list", "args tuple"]),
    ("too many inputs", net, lambda m: planish.optimize(m, (IMAGE, 1.0, 2)),
     planish.UsageError, ["do not fit Net.forward", "too many positional"]),
    ("a misspelt keyword", net, lambda m: planish.optimize(m, {"imagee": IMAGE}),
     planish.UsageError, ["do not fit Net.forward", "image"]),
    ("an input of the wrong shape", net, lambda m: planish.optimize(m, torch.randn(2, 5, 8, 8)),
     planish.CaptureError, ["channels", "test_misuse.py"]),
    ("an input of the wrong dtype", net, lambda m: planish.optimize(m, IMAGE.long()),
     planish.CaptureError, ["test_misuse.py", "type"]),
    ("no inputs and a model that advertises none", net, lambda m: planish.optimize(m),
     planish.UsageError, ["does not say what its inputs look like", "image"]),
    ("training mode", Net, lambda m: planish.optimize(m, IMAGE),
     planish.CaptureError, ["training mode", "model.eval()"]),
    ("one submodule in training mode", half_trained, lambda m: planish.optimize(m, IMAGE),
     planish.CaptureError, ["training mode", "'drop'"]),
    ("a data-dependent branch", lambda: Branch().eval(), lambda m: planish.optimize(m, IMAGE),
     planish.UnsupportedError, ["control flow depends on values", "if x.sum() > 0", "torch.cond"]),
    ("a data-dependent loop", lambda: Loop().eval(), lambda m: planish.optimize(m, IMAGE),
     planish.UnsupportedError, ["control flow depends on values", "while x.abs().max() > 1"]),
    ("a buffer that forward updates", lambda: Counter().eval(),
     lambda m: planish.optimize(m, torch.ones(2)),
     planish.CaptureError, ["writes into the buffer 'seen'", "output"]),
    ("nothing to optimize", lambda: Identity().eval(), lambda m: planish.optimize(m, IMAGE),
     planish.CaptureError, ["no operators"]),
    ("a bug of the model's own", lambda: Buggy().eval(), lambda m: planish.optimize(m, IMAGE),
     planish.CaptureError, ["test_misuse.py", "x @ torch.ones(3, 3)"]),
    ("NaN weights", nan_net, lambda m: planish.optimize(m, IMAGE),
     planish.CaptureError, ["'conv.weight' holds 1 NaN of 108", "checkpoint"]),
    ("weights on the meta device", lambda: Net().eval().to("meta"),
     lambda m: planish.optimize(m, IMAGE),
     planish.CaptureError, ["meta device", "checkpoint"]),
    ("a model on the GPU", on_a_gpu, lambda m: planish.optimize(m, IMAGE),
     planish.UsageError, ["'table' is on cuda:0", "runs on the CPU", ".cpu()"]),
    ("an input on another device", net, lambda m: planish.optimize(m, IMAGE.to("meta")),
     planish.UsageError, ["meta", "cpu", "one device"]),
    ("a class instead of a model", lambda: Net, lambda m: planish.optimize(m, IMAGE),
     planish.UsageError, ["expected an nn.Module", "type"]),
    ("a state dict instead of a model", lambda: Net().state_dict(),
     lambda m: planish.optimize(m, IMAGE),
     planish.UsageError, ["expected an nn.Module", "state dict"]),
    ("a size that the model does not allow", lambda: OnlyEven().eval(),
     lambda m: planish.optimize(m, torch.ones(4, 2), dynamic_shapes=({0: Dim("rows")},)),
     planish.CaptureError, ["rows", "dynamic_shapes"]),
    ("an axis that the input lacks", net,
     lambda m: planish.optimize(m, IMAGE, dynamic_shapes=({7: Dim("rows")},)),
     planish.UsageError, ["axis 7", "4 axes"]),
    ("dynamic shapes for another input", net,
     lambda m: planish.optimize(m, IMAGE, dynamic_shapes={"picture": {0: Dim("rows")}}),
     planish.UsageError, ["dynamic_shapes", "image"]),
    ("an unknown recipe", net, lambda m: planish.optimize(m, IMAGE, recipe="exacct"),
     planish.RecipeError, ["'exacct'", "exact"]),
    ("an unknown pass", net, lambda m: planish.optimize(m, IMAGE, recipe="fold-batch-nrom,x-y"),
     planish.RecipeError, ["fold-batch-nrom", "fold-batch-norm"]),
    ("an unknown option", net,
     lambda m: planish.optimize(m, IMAGE, recipe="fold-constants{max_growth_byte=1}"),
     planish.RecipeError, ["max_growth_byte", "max_growth_bytes"]),
    ("an option of the wrong type", net,
     lambda m: planish.optimize(m, IMAGE, recipe="fold-constants{max_growth_bytes=many}"),
     planish.RecipeError, ["many", "max_growth_bytes"]),
    ("recipe text that does not parse", net,
     lambda m: planish.optimize(m, IMAGE, recipe="fold-constants{max_growth_bytes=1"),
     planish.RecipeError, ["}"]),
    ("a recipe file that is not there", net,
     lambda m: planish.optimize(m, IMAGE, recipe="nowhere/recipe.yaml"),
     planish.RecipeError, ["nowhere/recipe.yaml"]),
    ("a recipe that is no recipe", net, lambda m: planish.optimize(m, IMAGE, recipe=3),  # type: ignore[arg-type]
     planish.RecipeError, ["int"]),
    ("a list with something else than passes", net,
     lambda m: planish.optimize(m, IMAGE, recipe=[Net]),  # type: ignore[list-item]
     planish.RecipeError, ["Net"]),
    ("an unknown target", net, lambda m: planish.optimize(m, IMAGE, target="onnxruntime-gpu"),
     planish.UsageError, ["'onnxruntime-gpu'", "onnxruntime-cpu"]),
    ("an unknown verify mode", net, lambda m: planish.optimize(m, IMAGE, verify="always"),  # type: ignore[arg-type]
     planish.UsageError, ["'always'", "'each'"]),
]  # fmt: skip


def fingerprint(model: object) -> object:
    """Everything of a module that a caller could notice."""
    if not isinstance(model, nn.Module):
        return None
    tensors = {
        name: (value.dtype, value._version, id(value), value.requires_grad)
        + (
            ()
            if value.is_meta or isinstance(value, FakeTensor)
            else (hashlib.sha256(value.detach().numpy().tobytes()).digest(),)
        )
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    flags = {name: (m.training, sorted(m.__dict__), len(m._forward_hooks))
             for name, m in model.named_modules()}  # fmt: skip
    return tensors, flags


@pytest.mark.parametrize(
    ("make", "call", "kind", "fragments"),
    [pytest.param(*case[1:], id=case[0].replace(" ", "-")) for case in CASES],
)
def test_one_clear_error_and_the_model_untouched(
    make: Callable[[], Any],
    call: Callable[[Any], object],
    kind: type[Exception],
    fragments: list[str],
) -> None:
    torch.manual_seed(0)
    model = make()
    before = fingerprint(model)
    with pytest.raises(kind) as caught:
        call(model)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "  try: " in message or "  at: " in message
    assert fingerprint(model) == before


@pytest.fixture(scope="module")
def result() -> planish.Optimized:
    torch.manual_seed(0)
    return planish.optimize(Net().eval(), IMAGE)


def test_refuses_a_folder_that_is_not_there(result: planish.Optimized, tmp_path: Path) -> None:
    with pytest.raises(planish.ExportError, match="does not exist"):
        result.export(tmp_path / "missing" / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_refuses_a_suffix_that_nothing_writes(result: planish.Optimized, tmp_path: Path) -> None:
    with pytest.raises(planish.ExportError, match=r"no target writes '.tflite'"):
        result.export(tmp_path / "net.tflite")


def test_refuses_a_folder_as_file(result: planish.Optimized, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(planish.ExportError, match="folder"):
        result.export(tmp_path / "net.onnx")


def test_refuses_an_opset_that_the_target_lacks(result: planish.Optimized, tmp_path: Path) -> None:
    with pytest.raises(planish.ExportError, match="opset 7"):
        result.export(tmp_path / "net.onnx", opset=7)
    assert not list(tmp_path.iterdir())


def test_names_inputs_that_the_optimized_model_does_not_know(result: planish.Optimized) -> None:
    with pytest.raises(planish.UsageError, match="unknown input 'picture'"):
        result.model(picture=IMAGE)
    with pytest.raises(planish.UsageError, match="missing input 'image'"):
        result.model()


def test_optimized_model_says_why_it_cannot_train(result: planish.Optimized) -> None:
    assert result.model.eval() is result.model
    with pytest.raises(planish.UsageError, match="for inference"):
        result.model.train()


def test_optimized_model_takes_no_weights_which_it_shares_with_the_caller() -> None:
    model = nn.Linear(3, 2).eval()
    result = planish.optimize(model, torch.randn(4, 3))
    before = fingerprint(model)
    zeros = {name: torch.zeros_like(value) for name, value in result.model.state_dict().items()}
    with pytest.raises(planish.UsageError, match="takes no other weights"):
        result.model.load_state_dict(zeros)
    assert fingerprint(model) == before


def test_optimized_model_refuses_sizes_that_were_static_at_capture() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, -1) * 2.0

    result = planish.optimize(Rows().eval(), torch.randn(3, 4))
    assert result.model(torch.randn(3, 4)).shape == (3, 4)
    with pytest.raises(planish.UsageError, match=r"'x' is f32\[6, 4\]; .* takes f32\[3, 4\]"):
        result.model(torch.randn(6, 4))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"target": None}, "target is None"),
        ({"seed": "one"}, "seed is 'one'"),
        ({"seed": 2**70}, "seed is"),
        ({"dump_dir": 3}, "dump_dir is 3"),
        ({"instruments": 3}, "instruments holds 3"),
        ({"instruments": [3]}, "instruments holds 3"),
        ({"loss": 3}, "loss is a int"),
        ({"labeled": 3}, "labeled is a int"),
    ],
)
def test_refuses_options_of_the_wrong_kind(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(planish.UsageError, match=fragment):
        planish.optimize(net(), IMAGE, **options)


def test_refuses_a_path_or_an_opset_of_the_wrong_kind(result: planish.Optimized) -> None:
    with pytest.raises(planish.UsageError, match="the path is None"):
        result.export(None)  # type: ignore[arg-type]
    with pytest.raises(planish.UsageError, match="opset is '20'"):
        result.export("net.onnx", opset="20")  # type: ignore[arg-type]


def test_remarks_on_what_had_no_effect() -> None:
    found = planish.optimize(net(), IMAGE, recipe="none", loss=lambda a, b: a, labeled=[IMAGE])
    assert [r.split()[0] for r in found.report.remarks] == ["loss", "labeled"]
    blank = planish.optimize(net(), torch.full_like(IMAGE, float("nan")), recipe="none")
    assert any("no finite number" in remark for remark in blank.report.remarks)


def test_refuses_inputs_beside_a_program(result: planish.Optimized) -> None:
    with pytest.raises(planish.UsageError, match="part of the Program already"):
        planish.optimize(result.program, IMAGE)


def test_refuses_a_corrupt_program_file(tmp_path: Path) -> None:
    from planish.ir.files import load

    path = tmp_path / "broken.pt2"
    path.write_bytes(b"PK\x03\x04 this is no archive")
    with pytest.raises(planish.PlanishError, match=r"broken\.pt2"):
        load(path)


def test_refuses_a_pickled_program_file(tmp_path: Path) -> None:
    from planish.ir.files import load

    path = tmp_path / "planted.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch /tmp/planted'\ntR.")
    with pytest.raises(planish.PlanishError, match=r"planted\.pt2"):
        load(path)
