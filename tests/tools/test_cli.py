"""The command line as a user types it: outputs, exit codes, JSON, and what is left on disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import planish
from planish.tools.cli import COMMANDS
from tests.support.command import Call

MODEL = "tests.support.tiny:conv_bn"
LABELED = ["--labeled", "tests.support.tiny:labeled", "--loss", "tests.support.tiny:loss"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny import conv_bn

    model, inputs, shapes = conv_bn()
    path = tmp_path_factory.mktemp("artifact") / "conv.onnx"
    planish.optimize(model, inputs, dynamic_shapes=shapes).export(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, planish_: Call) -> None:
    code, out, _ = planish_(command, "--help")
    assert code == 0
    assert f"planish {command}" in out.split("Examples:")[1]


def test_help_needs_no_torch() -> None:
    code = "import sys\nsys.argv=['planish','--help']\nfrom planish.tools.cli import main\n"
    check = "try:\n    main()\nexcept SystemExit:\n    assert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True)


def test_optimize_writes_the_file_and_prints_the_table(planish_: Call, tmp_path: Path) -> None:
    out_file, report = tmp_path / "net.onnx", tmp_path / "net.json"
    code, out, err = planish_("optimize", MODEL, "-o", str(out_file), "--report", str(report))
    assert code == 0
    assert out_file.stat().st_size > 0
    assert "fold-batch-norm" in out
    assert f"wrote {out_file}" in out.replace("\n", "")
    assert "capturing ..." in err
    names = [
        entry["name"] for entry in json.loads(report.read_text())["passes"] if entry["changes"]
    ]
    assert "fold-batch-norm" in names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.json", "net.onnx"]


def test_optimize_json_is_json_alone(planish_: Call) -> None:
    code, out, _ = planish_("optimize", MODEL, "--recipe", "fold-batch-norm", "--json", "--quiet")
    facts = json.loads(out)
    assert code == 0
    assert [entry["name"] for entry in facts["passes"]] == ["fold-batch-norm"]
    assert facts["passes"][0]["contract"] == "exact"
    assert facts["fidelity"]["cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ("score=fisher", LABELED),
        ("score=magnitude,layers=sensitivity", ["--calibration", "tests.support.tiny:sentences"]),
    ],
)
def test_optimize_prunes_by_data_that_is_named(
    options: str, data: list[str], planish_: Call
) -> None:
    recipe = f"fold-batch-norm,sparsify{{pattern=1x1,ratio=0.25,{options}}}"
    code, out, err = planish_("optimize", MODEL, "--recipe", recipe, *data, "--json", "--quiet")
    assert code == 0, err
    facts = json.loads(out)
    assert [p["name"] for p in facts["passes"] if p["changes"]] == ["fold-batch-norm", "sparsify"]
    code, _, err = planish_("optimize", MODEL, "--recipe", recipe, "--quiet")
    assert code == 2
    assert data[0].removeprefix("--") in err


def test_export_is_portable_and_checked(planish_: Call, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "net.onnx"
    code, out, _ = planish_("export", MODEL, "-o", str(path), "--opset", "20", "--json", "--quiet")
    facts = json.loads(out)
    assert code == 0
    assert (facts["target"], facts["opset"], facts["inputs"]) == ("onnx", 20, ["image"])
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert len(facts["probes"]) >= 2


def test_show_prints_the_program(planish_: Call) -> None:
    code, out, _ = planish_("show", MODEL, "--quiet")
    assert code == 0
    assert out.startswith("program(%image: f32[batch, 3, 8, 8])\n")
    assert "aten.batch_norm" in out
    code, out, _ = planish_("show", MODEL, "--quiet", "--recipe", "fold-batch-norm")
    assert "aten.batch_norm" not in out


def test_show_counts_what_the_model_costs(planish_: Call) -> None:
    _, out, _ = planish_("show", MODEL, "--cost", "--json", "--quiet")
    facts = json.loads(out)
    assert facts["macs"] == 8 * 3 * 9 * 6 * 6  # a batch of one
    assert facts["parameters"] == 8 * 3 * 9 + 8 + 4 * 8


def test_passes_lists_and_explains(planish_: Call) -> None:
    code, out, _ = planish_("passes", "--json")
    table = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0
    assert table["fold-batch-norm"]["contract"] == "exact"
    assert all(entry["summary"] for entry in table.values())
    code, out, _ = planish_("passes", "fold-batch-norm")
    assert "batch" in out
    code, _, err = planish_("passes", "fold-batch-nrom")
    assert code == 2
    assert "fold-batch-norm" in err


def test_run_pass_shows_the_diff_and_saves(planish_: Call, tmp_path: Path) -> None:
    saved = tmp_path / "after.pt2"
    code, out, _ = planish_("run-pass", MODEL, "fold-batch-norm", "-o", str(saved), "--quiet")
    assert code == 0
    assert re.search(r"^-.*aten\.batch_norm", out, re.M)
    assert "fold-batch-norm: 1 changes" in out
    code, out, _ = planish_("show", str(saved), "--quiet")
    assert code == 0
    assert "aten.batch_norm" not in out


def test_compare_tells_equal_from_different(planish_: Call, artifact: Path, tmp_path: Path) -> None:
    code, out, _ = planish_("compare", MODEL, str(artifact), "--quiet")
    assert code == 0
    assert out.startswith("ok")
    other = tmp_path / "other.onnx"
    _perturb(artifact, other)
    code, out, _ = planish_("compare", MODEL, str(other), "--quiet")
    assert code == 3
    assert out.startswith("FAILS")
    code, _, _ = planish_("compare", MODEL, str(other), "--quiet", "--min-sqnr", "1")
    assert code == 0


def test_bench_compares_two_files(planish_: Call, artifact: Path) -> None:
    arguments = ("--rounds", "2", "--size", "batch=3", "--json", "--quiet")
    code, out, _ = planish_("bench", str(artifact), str(artifact), *arguments)
    facts = json.loads(out)
    assert code == 0
    assert facts["inputs"] == {"image": [3, 3, 8, 8]}
    assert [c["rounds"] for c in facts["candidates"]] == [2, 2]
    assert facts["candidates"][1]["fidelity"]["equal"]


def test_doctor_finds_no_problem_here(planish_: Call) -> None:
    code, out, _ = planish_("doctor", "--json")
    facts = json.loads(out)
    assert (code, facts["problems"]) == (0, [])
    assert facts["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["optimise", MODEL], 2, "Did you mean 'optimize'"),
        (["optimize"], 2, "MODEL"),
        (["optimize", "nowhere.module:build"], 2, "no module 'nowhere'"),
        (["optimize", "tests.support.tiny:missing"], 2, "has no 'missing'"),
        (["optimize", "tests.support.tiny:not_a_model"], 2, "returned a int"),
        (["optimize", "tests.support.tiny:broken"], 2, "the checkpoint is gone"),
        (["optimize", "tests.support.tiny:branch"], 4, "if x.sum() > 0"),
        (["optimize", "nothing"], 2, "no model at 'nothing'"),
        (["optimize", "weights.safetensors"], 2, "not weights"),
        (["optimize", MODEL, "--recipe", "exat"], 2, "exact"),
        (["optimize", MODEL, "-o", "net.tflite"], 2, "no target writes .tflite"),
        (["optimize", MODEL, "-o", "/nonexistent/net.onnx"], 2, "does not exist"),
        (["optimize", MODEL, "--loss", "tests.support.tiny:loss"], 2, "--loss without --labeled"),
        (["optimize", MODEL, "--labeled", "a:b"], 2, "--labeled without --loss"),
        (["optimize", MODEL, *LABELED[:3], "tests.support.tiny:none"], 2, "has no 'none'"),
        (["export", MODEL, "-o", "net.onnx", "--opset", "7"], 2, "opset 7"),
        (["export", MODEL, "-o", "/proc/net.onnx"], 2, "cannot be written"),
        (["optimize", ""], 2, "MODEL is empty"),
        (["run-pass", "missing.pt2", "fold-constant"], 2, "fold-constants"),
        (["bench", "missing.onnx"], 2, "no file 'missing.onnx'"),
        (["bench", MODEL, "--size", "batch"], 2, "is not NAME=NUMBER"),
        (["bench", MODEL, "--size", "rows=3"], 2, "no input has a dynamic dimension 'rows'"),
        (["show", "missing.pt2"], 2, "missing.pt2"),
    ],
)
def test_usage_errors_name_what_is_wrong(
    arguments: list[str],
    code: int,
    fragment: str,
    planish_: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = planish_(*arguments)
    assert fragment in err
    assert got == code
    assert not list(tmp_path.iterdir())


def test_an_error_is_json_where_json_was_asked_for(planish_: Call) -> None:
    code, out, err = planish_("optimize", MODEL, "--recipe", "fold-batch-nrm", "--json")
    told = json.loads(out)["error"]
    assert told["kind"] == "RecipeError"
    assert told["exit_code"] == code == 2
    assert "fold-batch-nrm" in told["what"]
    assert told["what"] in err


def test_a_bundle_that_is_given_as_a_model_is_told_apart(planish_: Call, tmp_path: Path) -> None:
    (tmp_path / "repro.json").write_text("{}", encoding="utf-8")
    code, _, err = planish_("show", str(tmp_path))
    assert code == 2
    assert str(tmp_path / "program.pt2") in err


def test_a_folder_that_is_no_model(planish_: Call, tmp_path: Path) -> None:
    code, _, err = planish_("show", str(tmp_path))
    assert code == 2
    assert "no config.json" in err
    (tmp_path / "config.json").write_text("{")
    code, _, err = planish_("show", str(tmp_path))
    assert code == 2
    assert "not JSON" in err


def _perturb(source: Path, target: Path) -> None:
    import numpy as np
    import onnx

    model = onnx.load(source)
    for initializer in model.graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        if values.dtype == np.float32:
            changed = onnx.numpy_helper.from_array(values * np.float32(1.05), initializer.name)
            initializer.CopyFrom(changed)
    onnx.save(model, target)


def test_run_pass_says_what_a_lossy_pass_cost(planish_: Call) -> None:
    recipe = "tests.support.example_passes:RoundWeights"
    code, out, _ = planish_("run-pass", MODEL, recipe, "--quiet")
    assert code == 0
    assert "outputs against those before: SQNR " in out
    assert "where the accuracy went" in out
    assert "conv.weight" in out.split("where the accuracy went")[1]
