"""``planish repro``: what it prints, its exit codes, and that showing a bundle imports nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import planish
from planish.ir.files import save
from planish.tools.cli import main
from planish.tools.console import stderr, stdout
from tests.support.command import Call
from tests.support.failing_passes import Crash, Wrong


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 2


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def failed(folder: Path) -> planish.PlanishError:
    with pytest.raises(planish.PlanishError) as caught:
        planish.optimize(
            Net().eval(), (torch.linspace(-1, 1, 4),), recipe=[Wrong(), Crash()], dump_dir=folder
        )
    return caught.value


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    error = failed(tmp_path)
    assert error.replay is not None
    return Path(error.replay.removeprefix("planish repro "))


def test_the_same_failure_is_exit_0(planish_: Call, bundle: Path) -> None:
    code, out, err = planish_("repro", bundle)
    assert code == 0
    assert err == "loading ...\nreplaying ...\n"
    assert out.startswith("pass wrong: it is exact, and at the sample inputs output 0 ")
    assert out.endswith("\nreproduced: the same failure\n")
    code, out, err = planish_("repro", bundle, "--json", "--quiet", "--only-failing")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert result["reproduced"] is True
    assert result["got"] == result["expected"]
    assert result["got"]["signature"] == "contract/wrong/differs"
    assert result["differences"] == {}


def test_the_error_of_a_command_ends_with_the_command_that_replays_it(
    planish_: Call, tmp_path: Path
) -> None:
    recipe = "tests.support.failing_passes:Wrong"
    model = "tests.support.tiny:conv_bn"
    code, _, err = planish_(
        "optimize", model, "--recipe", recipe, "--dump-dir", tmp_path / "dump", "--quiet"
    )
    assert code == 3
    command = err.rstrip().splitlines()[-1].strip()
    assert command.startswith(f"replay: planish repro {tmp_path}/dump/planish-repro-")
    code, out, _ = planish_(*command.split()[2:])
    assert code == 0
    assert out.endswith("reproduced: the same failure\n")


def test_another_failure_or_none_is_exit_1_and_lists_what_differs(
    planish_: Call, bundle: Path
) -> None:
    save(planish.optimize(Other().eval(), (torch.ones(4),), recipe="none").program, _other(bundle))
    code, out, _ = planish_("repro", bundle, "--program", _other(bundle))
    assert code == 1
    assert "not reproduced: another failure (crash/wrong/StopIteration)" in out
    assert "where the bundle has contract/wrong/differs:" in out
    assert "versions and machine are those of the bundle" in out
    facts = json.loads((bundle / "repro.json").read_text())
    facts["versions"]["torch"] = "0.1"
    facts["left_out"] = ["a loss"]
    (bundle / "repro.json").write_text(json.dumps(facts))
    (bundle / "recipe.yaml").write_text("passes: []\n")
    code, out, _ = planish_("repro", bundle)
    assert code == 1
    assert out.startswith("not reproduced: no failure, where the bundle has contract/wrong/differs")
    assert f"differs: torch was 0.1 and is {torch.__version__}\n" in out
    assert "not in the bundle: a loss\n" in out
    code, out, _ = planish_("repro", bundle, "--json")
    result = json.loads(out)
    assert (code, result["reproduced"], result["got"]) == (1, False, None)
    assert result["differences"] == {"torch": {"bundle": "0.1", "here": torch.__version__}}


def _other(bundle: Path) -> Path:
    return bundle.parent.parent / "other.pt2"


def test_show_prints_what_is_in_it(planish_: Call, bundle: Path) -> None:
    code, out, _ = planish_("repro", bundle, "--show")
    assert code == 0
    for part in (
        "fails: the first pass of the recipe",
        "signature: contract/wrong/differs",
        "  tests.support.failing_passes:Wrong\n",
        "  tests.support.failing_passes:Crash\n",
        f"torch {torch.__version__}",
        "program.pt2",
        "  README.txt",
    ):
        assert part in out
    code, out, _ = planish_("repro", bundle, "--show", "--json")
    shown = json.loads(out)
    assert shown["stage"] == "pass"
    assert set(shown["files"]) == {p.name for p in bundle.iterdir()}


def test_show_imports_no_pass(bundle: Path) -> None:
    code = (
        "import sys\nfrom planish.tools.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not [m for m in sys.modules if 'failing' in m]\n"
    )
    command = [sys.executable, "-c", code, "repro", str(bundle), "--show"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "signature: contract/wrong/differs" in done.stdout


def test_a_bad_call_says_how_to_call(planish_: Call, bundle: Path, tmp_path: Path) -> None:
    code, _, err = planish_("repro", tmp_path / "absent")
    assert code == 2
    assert "does not exist" in err
    code, _, err = planish_("repro", bundle, "--show", "--only-failing")
    assert code == 2
    assert "--show runs nothing" in err
    (bundle / "program.pt2").unlink()
    code, _, err = planish_("repro", bundle)
    assert code == 2
    assert "has no program.pt2" in err


def test_the_help_says_whose_code_a_replay_runs(planish_: Call) -> None:
    code, out, _ = planish_("repro", "--help")
    assert code == 0
    assert "imports the passes that its recipe names as module:Class" in " ".join(out.split())


def test_a_note_on_an_error_is_printed(
    planish_: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_REPRO_DIR", str(tmp_path / "file"))
    model, recipe = "tests.support.tiny:conv_bn", "tests.support.failing_passes:Crash"
    code, _, err = planish_("optimize", model, "--recipe", recipe, "--quiet")
    assert code == 1
    assert "\nnote: no bundle was written to replay this: " in err


@pytest.mark.parametrize("command", ["repro", "reduce", "bisect"])
def test_no_module_that_lies_in_a_bundle_is_imported(bundle: Path, command: str) -> None:
    recipe = (bundle / "recipe.yaml").read_text()
    assert "tests.support.failing_passes:Wrong" in recipe
    named = recipe.replace("tests.support.failing_passes:Wrong", "stowaway:Wrong")
    (bundle / "recipe.yaml").write_text(named)
    (bundle / "stowaway.py").write_text("open('boom', 'w')")
    code = "from planish.tools.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, command, "."], cwd=bundle, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "stowaway" in done.stderr
    assert not (bundle / "boom").exists()


def test_what_a_bundle_says_does_not_steer_the_terminal(planish_: Call, bundle: Path) -> None:
    facts = json.loads((bundle / "repro.json").read_text())
    facts["failure"]["message"] = "red \x1b[31m and \x07 a bell"
    (bundle / "repro.json").write_text(json.dumps(facts))
    code, out, _ = planish_("repro", bundle, "--show")
    assert code == 0
    assert out.startswith("red ?[31m and ? a bell\n")


def test_no_name_or_message_steers_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "a\x1b]0;title\x9bc"
    for console in (stdout(), stderr()):
        console.print(hostile, markup=False)
        console.print(Text(hostile, style="red"))
        table = Table()
        table.add_column(hostile)
        table.add_row(hostile)
        console.print(table)
    monkeypatch.setattr(sys, "argv", ["planish", "show", f"{hostile}.pt2"])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    for output in (captured.out, captured.err):
        assert output.count("a?]0;title") >= 3
        assert all(c.isprintable() or c == "\n" for c in output)
