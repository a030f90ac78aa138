"""``planish quantize``: the data it takes, what it writes and says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.support.command import Call

HERE = "tests.tools.test_quantize"


class Net(nn.Module):
    """A convolution, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, image: Tensor) -> Tensor:
        y = torch.relu(self.conv(image)).mean((2, 3))
        result: Tensor = self.head(torch.tanh(self.up(y)))
        return result


def dynamic() -> tuple[nn.Module, Any, Any]:
    """The net for batches of any size."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", max=64)
    return Net().eval(), (torch.randn(2, 3, 8, 8),), ({0: batch},)


def fixed() -> tuple[nn.Module, Any]:
    """The net for batches of 4."""
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(4, 3, 8, 8),)


def batches() -> list[dict[str, Tensor]]:
    """Ten batches of two."""
    return [{"image": torch.from_numpy(x)} for x in np.split(_images(), 10)]


def no_batches() -> int:
    """What a user may return by mistake."""
    return 3


def agreement(outputs: Tensor, reference: Tensor) -> float:
    """Share of samples with the same decision."""
    return float((outputs.argmax(-1) == reference.argmax(-1)).float().mean())


def labels() -> list[tuple[Tensor, Tensor]]:
    """Batches of images with what the model itself makes of them."""
    images = torch.from_numpy(_images(8))
    torch.manual_seed(0)
    return [(images, Net().eval()(images).argmax(-1))]


def accuracy(model: Any, labeled: Any) -> float:
    """Share of right decisions."""
    right = [model(images).argmax(-1) == label for images, label in labeled]
    return float(torch.cat(right).float().mean())


def _images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, image=_images())
    return path


def _json(planish_: Call, *arguments: object) -> dict[str, Any]:
    code, out, err = planish_("quantize", *arguments, "--json", "--quiet")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def _operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


# -- the command ----------------------------------------------------------------------------------


def test_static_from_a_file(planish_: Call, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    arguments = ("--calibration", data, "--recipe", "int8-static", "-o", out, "--target", "onnx")
    found = _json(planish_, f"{HERE}:dynamic", *arguments)
    assert "QuantizeLinear" in _operators(out)
    assert found["output"] == str(out)
    assert found["held_out"]["batches"] == 2  # 20 samples in batches of 2 as the example's
    assert found["held_out"]["sqnr_db"] > 20
    assert found["file"]["bytes"] == out.stat().st_size
    assert found["file"]["speed"]["rounds"] == found["file"]["float_speed"]["rounds"] >= 8
    assert found["file"]["float_speed"]["ratio"] == 1.0
    kernels = found["runtime"]["kernels"]
    assert {use["operator"] for use in kernels} >= {"aten.conv2d", "aten.linear"}
    assert all(use["kernel"] or use["reason"] for use in kernels)


def test_the_default_races_and_says_so(planish_: Call, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    code, text, err = planish_(
        "quantize", f"{HERE}:dynamic", "--calibration", data, "-o", out, "--quiet"
    )
    assert code == 0, err
    assert out.exists()
    for name in ("float", "int8-static", "int8-dynamic"):
        assert name in text
    assert "measured here, one thread" in text
    assert "speed here, one thread:" in text
    assert "x of float" in text
    assert text.rstrip().endswith(f"wrote {out}")


def test_weights_alone_need_no_data(planish_: Call, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    code, text, err = planish_(
        "quantize", f"{HERE}:dynamic", "-o", out, "--recipe", "int8-weight", "--quiet"
    )
    assert code == 0, err
    assert "fidelity on the example inputs alone" in text
    assert "size: " in text


def test_a_bound_a_choice_and_a_metric(planish_: Call, data: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", data, "--recipe", "int8-static", "--target", "onnx")
    bound = ("--min-sqnr-db", 45, "--metric", f"{HERE}:agreement", "--min-metric", 0.9)
    choice = ("--exclude", "conv", "--exclude", "aten.mean*")
    found = _json(
        planish_, f"{HERE}:dynamic", *arguments, *bound, *choice, "-o", tmp_path / "model.onnx"
    )
    (keep,) = [entry for entry in found["passes"] if entry["name"] == "keep-float"]
    assert "min_sqnr_db=45" in keep["options"]
    assert "min_metric=0.9" in keep["options"]
    assert {error["operator"] for error in keep["operators"]} == {"linear"}
    assert any(error["kept_float"] for error in keep["operators"])
    assert found["held_out"]["metric"] >= 0.9


def test_a_metric_that_reads_labels(planish_: Call, data: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", data, "--recipe", "int8-static", "--target", "onnx")
    bound = ("--metric", f"{HERE}:accuracy", "--labeled", f"{HERE}:labels", "--min-metric", 0.8)
    found = _json(planish_, f"{HERE}:dynamic", *arguments, *bound, "-o", tmp_path / "model.onnx")
    assert found["held_out"]["metric"] >= 0.8


def test_a_fixed_batch_leaves_the_rest_out_and_says_so(planish_: Call, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, image=_images(18))
    arguments = ("--calibration", path, "--recipe", "int8-dynamic", "--target", "onnx")
    found = _json(planish_, f"{HERE}:fixed", *arguments, "-o", tmp_path / "model.onnx")
    assert any("the last 2 samples of data.npz are left out" in r for r in found["remarks"])


def test_help_has_examples(planish_: Call) -> None:
    code, out, _ = planish_("quantize", "--help")
    assert code == 0
    assert "planish quantize ./minilm --calibration sentences.npz" in out


# -- what it refuses ------------------------------------------------------------------------------


def _refused(planish_: Call, *arguments: object, model: str = "dynamic") -> str:
    code, out, err = planish_("quantize", f"{HERE}:{model}", *arguments, "--quiet")
    assert code == 2, (out, err)
    assert out == ""
    return err


@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_no_calibration_says_what_to_pass(planish_: Call, tmp_path: Path, recipe: str) -> None:
    err = _refused(planish_, "-o", tmp_path / "model.onnx", "--recipe", recipe)
    assert f"the recipe '{recipe}' needs calibration data" in err
    if recipe == "int8-static":
        assert "needs calibration data, for smooth-quant and quantize and correct-bias\n" in err
    assert "give --calibration FILE.npz (one array for each input" in err
    assert not list(tmp_path.iterdir())


class Branch(nn.Module):
    """Does one thing or another, by value."""

    def forward(self, image: Tensor) -> Tensor:
        return image + 1 if image.sum() > 0 else image - 1


def branching() -> tuple[nn.Module, Any]:
    """A model that cannot be traced."""
    return Branch().eval(), (torch.randn(2, 3, 8, 8),)


def without_products() -> tuple[nn.Module, Any]:
    """A model that has nothing to quantize."""
    return nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), (torch.randn(2, 3, 8, 8),)


@pytest.mark.parametrize(
    ("model", "options", "exit_code", "reason"),
    [
        ("branching", ("--recipe", "int8-weight"), 4, "control flow depends on values"),
        ("without_products", ("--recipe", "int8-weight"), 4, "has no operator that computes on"),
        ("without_products", (), 4, "no alternative quantizes anything"),
        ("dynamic", ("--recipe", "int8-static", "--min-sqnr-db", 500), 3, "the best reached is "),
        ("dynamic", ("--min-sqnr-db", 500), 3, "no alternative keeps the bound"),
    ],
)
def test_exit_codes_tell_what_cannot_be(
    planish_: Call, tmp_path: Path, model: str, options: Any, exit_code: int, reason: str
) -> None:
    """Unsupported is 4, a bound that is not kept 3; no file is left, and nothing to replay."""
    path, out = tmp_path / "data.npz", tmp_path / "model.onnx"
    if model == "without_products":
        np.savez(path, input=_images())
    else:
        np.savez(path, image=_images())
    given = ("quantize", f"{HERE}:{model}", "--calibration", path, "-o", out, *options, "--quiet")
    code, stdout, err = planish_(*given)
    assert code == exit_code, (stdout, err)
    assert reason in err
    assert "  try: " in err
    assert "replay: " not in err
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_a_recipe_that_quantizes_nothing(planish_: Call, tmp_path: Path) -> None:
    err = _refused(planish_, "-o", tmp_path / "model.onnx", "--recipe", "exact")
    assert "the recipe 'exact' quantizes nothing" in err


def test_labels_in_the_data(planish_: Call, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, image=_images(), label=np.zeros(20, np.int64))
    err = _refused(planish_, "--calibration", path, "-o", tmp_path / "model.onnx")
    assert "it holds 'label', which the model does not take (image)" in err
    assert "without labels" in err


def _tall() -> dict[str, np.ndarray]:
    return {"image": np.zeros((20, 3, 8, 8, 1), np.float32)}


def _double() -> dict[str, np.ndarray]:
    return {"image": _images().astype(np.float64)}


def _other() -> dict[str, np.ndarray]:
    return {"pixels": _images()}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_tall, "input 'image' has shape [2, 3, 8, 8, 1]; the model takes"),
        (_double, "input 'image' is f64; the model takes f32"),
        (_other, "it holds 'pixels', which the model does not take (image)"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_arrays_that_the_model_does_not_take(
    planish_: Call, tmp_path: Path, make: Any, reason: str, folder: bool
) -> None:
    """The file, the array, and what the model takes instead."""
    arrays = {n: a[:2] if folder else a for n, a in make().items()}
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "000.npz"
    np.savez(path, **arrays)
    data = path.parent if folder else path
    err = _refused(planish_, "--calibration", data, "-o", tmp_path / "model.onnx")
    shown = " ".join(err.split())
    assert reason in shown
    assert f"at: calibration batch 0 ({path})" in shown
    assert "the model takes image: f32 [batch (0 to 64), 3, 8, 8]" in shown


def test_a_number_of_operators_without_a_bound(planish_: Call, tmp_path: Path) -> None:
    err = _refused(planish_, "-o", tmp_path / "model.onnx", "--max-float", 3)
    assert "--max-float without a bound" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--min-metric", 0.5), "--min-metric without --metric"),
        (("--labeled", f"{HERE}:labels"), "--labeled without --metric"),
    ],
)
def test_options_that_do_nothing_alone(
    planish_: Call, data: Path, tmp_path: Path, arguments: tuple[object, ...], reason: str
) -> None:
    given = ("--calibration", data, "-o", tmp_path / "model.onnx", *arguments)
    assert reason in _refused(planish_, *given)


def test_a_mask_that_is_no_input(planish_: Call, data: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", data, "--padding-mask", "imagee")
    err = _refused(planish_, *arguments, "-o", tmp_path / "model.onnx")
    assert "did you mean 'image'?" in err


def test_a_pattern_that_nothing_answers_to(planish_: Call, data: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", data, "--exclude", "upp", "-o", tmp_path / "model.onnx")
    err = _refused(planish_, *arguments)  # int8 too: no float file in silence
    assert "where.exclude holds 'upp', which no operator answers to" in err
    assert not (tmp_path / "model.onnx").exists()


def test_a_cosine_that_cannot_be(planish_: Call, data: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", data, "--min-cosine", 1.5, "-o", tmp_path / "model.onnx")
    assert "can never be kept" in _refused(planish_, *arguments)
