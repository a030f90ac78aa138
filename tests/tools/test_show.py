"""``planish show --explain``: a node's life on the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import planish.tools.show
from planish.ir import capture, save
from tests.support.command import Call
from tests.support.tiny import conv_bn

SWAP = "tests.support.example_passes:SwapActivation"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    model, example, shapes = conv_bn()
    save(capture(model, example, dynamic_shapes=shapes), path)
    return str(path)


def test_a_node_is_explained_in_text(planish_: Call, saved: str) -> None:
    recipe = f"remove-identities,{SWAP}"
    arguments = ("show", saved, "--recipe", recipe, "--quiet", "--explain", "relu")
    code, out, err = planish_(*arguments)
    lines = [line for line in out.splitlines() if "tiny.py" not in line]
    assert (code, err) == (0, "")
    assert out.count("tiny.py:22: return self.drop(torch.relu(self.bn(self.conv(image))))") == 2
    assert lines == [
        "relu",
        "capture",
        "  relu",
        "    %2: f32[batch, 8, 6, 6] = aten.relu(%1)",
        "    module (the model) (ConvBn)",
        "  dropout",
        "    %3: f32[batch, 8, 6, 6] = aten.dropout(%2, p=0.5, train=False)",
        "    module drop (Dropout)",
        "step 1, remove-identities",
        "  1 DropIdentity at dropout: replaced dropout by relu",
        "    - %3: f32[batch, 8, 6, 6] = aten.dropout(%2, p=0.5, train=False)",
        "    + %2: f32[batch, 8, 6, 6] = aten.relu(%1)",
        "step 2, swap-activation",
        "  2 relu-to-clamp at relu: made clamp_min_default from relu, in place of relu",
        "    - %2: f32[batch, 8, 6, 6] = aten.relu(%1)",
        "    + %2: f32[batch, 8, 6, 6] = aten.clamp_min(%1, min=0)",
        "the result",
        "  relu is gone; clamp_min_default stands for it",
        "  %2: f32[batch, 8, 6, 6] = aten.clamp_min(%1, min=0)",
        "  read by return",
    ]


def test_a_number_means_the_text_that_the_same_command_prints(planish_: Call, saved: str) -> None:
    command = ("show", saved, "--recipe", "fold-batch-norm", "--quiet")
    _, printed, _ = planish_(*command)
    assert "  %1: f32[batch, 8, 6, 6] = aten.relu(%0)" in printed
    _, out, _ = planish_(*command, "--explain", "%1", "--json")
    facts = json.loads(out)
    assert (facts["name"], facts["alive"]) == ("relu", True)
    assert facts["others"] == ["%1@0"]
    (event,) = [e for e in facts["events"] if e["step"] == 1]
    assert (event["kind"], event["number"]) == ("rewired", 1)
    _, out, _ = planish_(*command, "--explain", "@conv.weight")
    assert "batch-norm-into-producer at batch_norm: edited @conv.weight" in out


def test_options_that_cut_a_run_short_hold_for_explanations(planish_: Call, saved: str) -> None:
    arguments = ("show", saved, "--recipe", f"remove-identities,{SWAP}", "--quiet")
    _, out, err = planish_(*arguments, "--explain", "relu", "--stop-after", "1")
    assert "swap-activation" not in out
    assert err == "left out: 2 swap-activation\n"
    _, out, err = planish_(*arguments, "--explain", "relu", "--bisect-limit", "1", "--json")
    assert err == ""
    assert json.loads(out)["remarks"] == [
        "the limit of 1 rewrite sites denied 1; the last done is 1, DropIdentity@dropout"
    ]


def test_a_run_that_fails_is_explained_as_far_as_it_went(planish_: Call, saved: str) -> None:
    arguments = ("show", saved, "--recipe", f"{SWAP}{{to=gelu}}", "--quiet")
    code, out, err = planish_(*arguments, "--explain", "relu")
    assert code == 3
    assert "+ %2: f32[batch, 8, 6, 6] = aten.gelu(%1)" in out
    assert "after step 1, swap-activation, which failed" in out
    assert "it is exact, and at the sample inputs" in err
    code, out, err = planish_(*arguments, "--explain", "rely")
    assert (code, out) == (3, "")
    assert "nothing called 'rely'" in err
    code, out, _ = planish_(*arguments, "--explain", "relu", "--verify", "off")
    assert code == 0
    assert "gelu_default stands for it" in out


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--explain", "reul"), "did you mean relu"),
        (("--explain", "%9"), "%0 to %3"),
        (("--explain", "relu", "--cost"), "--explain prints no program"),
        (("--explain", "relu", "--stop-after", "x"), "it has no passes at all"),
    ],
)
def test_wrong_calls_are_refused(
    options: tuple[str, ...], fragment: str, planish_: Call, saved: str
) -> None:
    code, out, err = planish_("show", saved, "--quiet", *options)
    assert (code, out) == (2, "")
    assert fragment in err


def test_color_is_for_terminals(
    planish_: Call, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("show", saved, "--recipe", SWAP, "--quiet", "--explain", "relu")
    _, out, _ = planish_(*arguments)
    assert "\x1b" not in out
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr(planish.tools.show, "stdout", lambda: terminal)
    planish_(*arguments)
    line = "    + %2: f32[batch, 8, 6, 6] = aten.clamp_min(%1, min=0)"
    assert f"\x1b[32m{line}\x1b[0m" in stream.getvalue()


def test_a_module_is_explained_without_a_recipe(planish_: Call, tmp_path: Path) -> None:
    code, out, _ = planish_("show", "tests.support.tiny:conv_bn", "--explain", "%0", "--quiet")
    assert code == 0
    assert out.startswith("%0 is conv2d\ncapture\n  conv2d\n")
    assert out.endswith("  read by batch_norm\n")
