"""``planish export``, ``bench`` and ``compare`` over every kind of file."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import planish
from planish.backends.registry import load_target, target_names
from tests.support.command import Call
from tests.support.tiny import conv_bn

MODEL = "tests.support.tiny:conv_bn"
SIZE = ("--size", "batch=3", "--json", "--quiet")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One net in every format; and as somebody else would have saved it."""
    folder = tmp_path_factory.mktemp("artifacts")
    model, inputs, shapes = conv_bn()
    made: dict[str, Path] = {}
    for target in target_names():
        if target == "aotinductor" and shutil.which("g++") is None:
            continue
        path = folder / f"{target}{load_target(target).suffix}"
        planish.optimize(model, inputs, dynamic_shapes=shapes, target=target).export(path)
        made[target] = path
    made["foreign script"] = folder / "foreign.pt"
    x = torch.randn(2, 3, 8, 8)
    torch.jit.save(torch.jit.trace(model, x), str(made["foreign script"]))
    made["foreign export"] = folder / "foreign.pt2"
    batch = torch.export.Dim("batch", max=9)
    torch.export.save(
        torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), made["foreign export"]
    )
    return made


def test_bench_takes_every_kind_of_file(planish_: Call, files: dict[str, Path]) -> None:
    code, out, _ = planish_("bench", *files.values(), "--rounds", "2", "--trust-code", *SIZE)
    assert code == 0
    facts = json.loads(out)["candidates"]
    assert len(facts) == len(files)
    for found, path in zip(facts, files.values(), strict=True):
        assert found["bytes"] == path.stat().st_size
        assert found["load_ms"] > 0
        assert found["peak_bytes"] > 0
        assert found["fidelity"]["sqnr_db"] is None or found["fidelity"]["sqnr_db"] > 80


def test_bench_leaves_memory_out_for_a_model(planish_: Call, files: dict[str, Path]) -> None:
    code, out, _ = planish_("bench", MODEL, files["torchscript"], "--rounds", "2", *SIZE)
    assert code == 0
    first, second = json.loads(out)["candidates"]
    assert first["peak_bytes"] is None
    assert second["peak_bytes"] > 0
    code, out, _ = planish_("bench", files["torchscript"], "--rounds", "2", "--no-memory", *SIZE)
    assert json.loads(out)["candidates"][0]["peak_bytes"] is None


def test_a_file_that_says_nothing_needs_another(planish_: Call, files: dict[str, Path]) -> None:
    code, _, err = planish_("bench", files["foreign script"], "--rounds", "2", "--quiet")
    assert code == 2
    assert "does not say what its inputs look like" in err
    code, _, _ = planish_("compare", files["foreign script"], files["onnx"], "--size", "batch=2")
    assert code == 0


def test_compare_runs_machine_code_only_when_told(planish_: Call, files: dict[str, Path]) -> None:
    if "aotinductor" not in files:
        pytest.skip("there is no g++")
    pair = (files["onnx"], files["aotinductor"], "--size", "batch=2", "--quiet")
    code, _, err = planish_("compare", *pair)
    assert code == 2
    assert "--trust-code" in err
    assert planish_("compare", *pair, "--trust-code")[0] == 0


@pytest.mark.parametrize(
    ("suffix", "target"), [(".pt", "torchscript"), (".pt2", "torch-export"), (".onnx", "onnx")]
)
def test_the_suffix_says_the_target(
    suffix: str, target: str, planish_: Call, tmp_path: Path
) -> None:
    out_file = tmp_path / f"net{suffix}"
    code, out, _ = planish_("export", MODEL, "-o", out_file, "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["target"] == target
    assert out_file.stat().st_size > 0
    code, _, _ = planish_("optimize", MODEL, "-o", out_file, "--quiet")
    assert code == 0


def test_a_suffix_that_does_not_fit_the_target(planish_: Call, tmp_path: Path) -> None:
    out_file = tmp_path / "net.pt"
    code, _, err = planish_("export", MODEL, "-o", out_file, "--target", "aotinductor")
    assert code == 2
    assert "writes .pt2 files, and the output is *.pt" in err
    assert not list(tmp_path.iterdir())
