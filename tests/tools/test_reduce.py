"""``planish reduce``: from a bundle to a small one and a module, on a small net and on MiniLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.ir.errors import ExportError
from planish.passes.base import Pass
from planish.passes.debug.reduce_folder import move
from tests.passes.debug.faulty import Faulty
from tests.support.command import Call
from tests.support.example_passes import SwapActivation
from tests.support.real_models import inputs, loaded

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from planish.tools.cli import main; main()"]


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(torch.relu(x * 2) + 1)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundle_of(Net().eval(), (torch.linspace(-1, 1, 4),), SwapActivation(to="gelu"), tmp_path)


def bundle_of(
    model: nn.Module,
    args: tuple[Tensor, ...],
    pass_: Pass,
    folder: Path,
    *,
    kwargs: dict[str, Tensor] | None = None,
) -> Path:
    """Where ``optimize`` leaves the bundle of a failure."""
    with pytest.raises(planish.PlanishError) as caught:
        planish.optimize(model, (args, kwargs or {}), recipe=[pass_], dump_dir=folder)
    assert caught.value.replay is not None
    return Path(caught.value.replay.removeprefix("planish repro "))


def test_the_result_is_a_bundle_beside_the_first(planish_: Call, bundle: Path) -> None:
    code, out, err = planish_("reduce", bundle)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == "stage operators before now tries so far".split()
    assert lines[1].split()[:3] == ["window", "4", "1"]
    assert "4 -> 1 operators (75.0% removed), 0 -> 0 bytes of constants" in lines
    assert "none of these operators can be left out" in lines
    folder = bundle.with_name(f"{bundle.name}-reduced")
    assert f"wrote program.pt2 and module.py into {folder}" in lines
    assert "reducing: 4 of 4 operators" in err
    assert (folder / "module.py").is_file()
    code, out, _ = planish_("repro", folder)
    assert code == 0
    assert out.endswith("\nreproduced: the same failure\n")


def test_json_and_a_folder_of_ones_own(planish_: Call, bundle: Path, tmp_path: Path) -> None:
    code, out, err = planish_("reduce", bundle, "-o", tmp_path / "small", "--json", "--quiet")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert result["bundle"] == str(bundle)
    assert (result["operators_before"], result["operators_after"]) == (4, 1)
    assert result["removed_ratio"] == 0.75
    assert result["exhausted"] is False
    assert result["problem"] is None
    assert result["module"] == "module.py"
    assert result["replay"] == f"planish repro {tmp_path / 'small'}"
    assert result["steps"][-1]["tries"] == result["tries"] <= result["max_tries"]


def test_a_module_is_a_model_for_every_command(planish_: Call, bundle: Path) -> None:
    folder = bundle.with_name("small")
    assert planish_("reduce", bundle, "-o", folder, "--quiet")[0] == 0
    result = subprocess.run(
        [*COMMAND, "optimize", "module:build", "--recipe", "recipe.yaml", "--quiet"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PLANISH_REPRO_DIR": str(bundle.parent), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 3, result.stderr
    assert "pass swap-activation: it is exact, and at the sample inputs" in result.stderr


def test_the_limit_is_stated_when_it_is_hit(planish_: Call, bundle: Path) -> None:
    code, out, _ = planish_("reduce", bundle, "--max-tries", 1)
    assert code == 0
    assert "stopped after 1 tries: more might go" in out
    assert "can be left out" not in out
    assert planish_("reduce", bundle, "--max-tries", 0)[0] == 2


def test_what_does_not_reproduce_is_exit_1(planish_: Call, bundle: Path) -> None:
    recipe = bundle / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("gelu", "relu"))
    code, out, err = planish_("reduce", bundle)
    assert (code, out) == (1, "")
    assert "does not reproduce here: nothing fails" in err
    assert not bundle.with_name(f"{bundle.name}-reduced").exists()


def test_what_is_no_bundle_is_exit_2(planish_: Call, tmp_path: Path) -> None:
    assert planish_("reduce", tmp_path / "nowhere")[0] == 2
    code, _, err = planish_("reduce", tmp_path)
    assert code == 2
    assert "is no bundle" in err


class Gcd(nn.Module):
    """An operator that ONNX lacks, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", torch.arange(6).reshape(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2 + 1).clamp(min=1)
        return torch.gcd(y, self.get_buffer("other") + 4).float().relu() / 2


def test_a_failed_export_is_reduced_to_its_operator(planish_: Call, tmp_path: Path) -> None:
    model, sample = Gcd().eval(), (torch.arange(6).reshape(2, 3),)
    result = planish.optimize(model, sample, recipe="none", dump_dir=tmp_path)
    with pytest.raises(planish.PlanishError) as caught:
        result.export(tmp_path / "model.onnx", target="onnx")
    assert caught.value.replay is not None
    bundle = Path(caught.value.replay.removeprefix("planish repro "))
    code, out, _ = planish_("reduce", bundle, "-o", tmp_path / "small", "--json")
    reduced = json.loads(out)
    assert code == 0
    assert reduced["operators_after"] == 1
    assert reduced["problem"] is None
    assert "torch.ops.aten.gcd.default" in (tmp_path / "small" / "module.py").read_text()
    assert planish_("repro", tmp_path / "small")[0] == 0


@pytest.mark.parametrize("how", ["crash", "numbers"])
def test_minilm_loses_nine_tenths_of_its_operators(
    how: str, planish_: Call, tmp_path: Path
) -> None:
    _, model = loaded("minilm")
    args, kwargs = inputs("minilm")
    pass_ = Faulty(how=how)  # type: ignore[arg-type]  # mypy does not narrow parameters
    bundle = bundle_of(model, args, pass_, tmp_path, kwargs=kwargs)
    code, out, _ = planish_("reduce", bundle, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["removed_ratio"] >= 0.9
    assert result["problem"] is None
    replayed = subprocess.run(
        [*COMMAND, "repro", result["folder"], "--json", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["reproduced"] is True


def test_a_bundle_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    folder = tmp_path / "reduced"
    folder.mkdir()
    (folder / "repro.json").write_text("{}")
    with pytest.raises(ExportError, match="could not be written"):
        move(tmp_path / "missing", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["reduced"]
    assert (folder / "repro.json").read_text() == "{}"
