"""The options that watch a run, cut it short and bisect it by hand, as a user types them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import planish
from planish.ir import capture, load, save, text
from planish.ir.textdiff import compare
from planish.tools.watching import Watching, watching
from tests.support.command import Call
from tests.support.real_models import inputs, loaded
from tests.support.tiny import conv_bn

MODEL = "tests.support.tiny:conv_bn"
ROUND = "tests.support.example_passes:RoundWeights"
SWAP = "tests.support.example_passes:SwapActivation"
RECIPE = f"fold-batch-norm,{SWAP},remove-identities"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as a file, which takes no capturing."""
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    model, example, shapes = conv_bn()
    save(capture(model, example, dynamic_shapes=shapes), path)
    return str(path)


def optimize(planish_: Call, model: str, *options: str) -> tuple[int, str, str]:
    return planish_("optimize", model, "--recipe", RECIPE, "--quiet", *options)


def test_programs_are_printed_on_stderr_and_stdout_stays_json(planish_: Call, saved: str) -> None:
    code, out, err = optimize(planish_, saved, "--print-after", "fold-.*|remove-.*", "--json")
    assert code == 0
    assert len(json.loads(out)["passes"]) == 3
    heads = [line for line in err.splitlines() if line.startswith("//")]
    assert heads == ["// after step 1, fold-batch-norm", "// after step 3, remove-identities"]
    assert "aten.batch_norm" not in err
    assert err.count("program(%image: f32[batch, 3, 8, 8])") == 2


def test_only_what_changed_is_printed(planish_: Call, saved: str) -> None:
    recipe = f"eliminate-dead-code,{SWAP}"
    arguments = ("run-pass", saved, recipe, "--quiet", "--print-after-change")
    code, _, err = planish_(*arguments)
    assert code == 0
    assert re.findall("^// after step .*", err, re.M) == [f"// after step 2, {SWAP}"]
    code, out, err = planish_(*arguments, "--print-after", "eliminate-.*")
    assert "//" not in err
    assert "remark: nothing was printed after 'eliminate-.*': no such pass changed" in out


def test_passes_are_left_out_and_the_report_says_so(planish_: Call, saved: str) -> None:
    code, out, _ = optimize(planish_, saved, "--stop-after", "fold-batch-norm")
    assert code == 0
    assert "left out: 2 swap-activation, 3 remove-identities" in out
    assert "found nothing to do" not in out
    _, out, _ = optimize(planish_, saved, "--start-from", "3", "--all-passes")
    assert len(re.findall(r"exact +left out", out)) == 2
    options = ("--disable-pass", "swap-activation", "--disable-pass", "1", "--json")
    _, out, _ = optimize(planish_, saved, *options)
    assert [entry["ran"] for entry in json.loads(out)["passes"]] == [False, False, True]
    code, out, err = planish_("show", saved, "--recipe", RECIPE, "--start-from", "3", "--quiet")
    assert "left out: 1 fold-batch-norm, 2 swap-activation" in err
    assert "aten.batch_norm" in out
    _, out, _ = planish_("run-pass", saved, RECIPE, "--stop-after", "1", "--quiet")
    assert "remove-identities: left out" in out


def test_export_says_what_was_left_out(planish_: Call, saved: str, tmp_path: Path) -> None:
    path = str(tmp_path / "net.onnx")
    arguments = ("export", saved, "-o", path, "--recipe", RECIPE, "--quiet", "--timing")
    code, out, err = planish_(*arguments, "--disable-pass", "2", "--bisect-limit", "1", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["left_out"], err) == (["2 swap-activation"], "")
    assert [row["step"] for row in facts["timing"]] == [1, 3]
    assert facts["remarks"][1:] == [
        "the limit of 1 rewrite sites denied 1; the last done is "
        "1, batch-norm-into-producer@batch_norm"
    ]


def test_sites_are_left_out_by_number_and_by_name(planish_: Call, saved: str) -> None:
    _, out, _ = optimize(planish_, saved, "--bisect-limit", "2", "--json")
    entries = json.loads(out)["passes"]
    assert [len(entry["changes"]) for entry in entries] == [1, 1, 0]
    assert entries[1]["remarks"] == [
        "the limit of 2 rewrite sites denied 1; the last done is 2, relu-to-clamp@relu"
    ]
    _, out, _ = optimize(planish_, saved, "--bisect-limit", "9")
    assert "remark: the limit of 9 rewrite sites denied none of 3" in out
    _, out, _ = optimize(planish_, saved, "--exclude", "relu-to-clamp@relu", "--json")
    numbers = [c["number"] for entry in json.loads(out)["passes"] for c in entry["changes"]]
    assert numbers == [1, 3]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--stop-after", "fold-batch-nrom"], "did you mean 'fold-batch-norm'?"),
        (["--start-from", "4"], "it has steps 1 to 3"),
        (["--disable-pass", "fold"], "disable-pass names 'fold'"),
        (["--start-from", "3", "--stop-after", "1"], "nothing would run"),
        (["--print-after", "("], "is no regular expression"),
        (["--print-after", "fold"], "did you mean 'fold-batch-norm'?; the whole name counts"),
        (["--exclude", "relu"], "write RULE@NODE"),
        (["--bisect-limit", "-1"], "-1 is not in the range"),
    ],
)
def test_options_that_cannot_work_are_told_before_the_model_is_loaded(
    options: list[str], fragment: str, planish_: Call
) -> None:
    for command in (
        ["optimize", "no.pt2", "--recipe", RECIPE],
        ["run-pass", "no.pt2", RECIPE],
    ):
        code, out, err = planish_(*command, *options)
        assert (code, out) == (2, "")
        assert fragment in err.replace("\n", " ")
        assert "no.pt2" not in err


def test_a_dump_folder_that_cannot_be_is_told_with_what_to_do(
    planish_: Call, saved: str, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    code, out, err = optimize(planish_, saved, "--dump-dir", str(taken))
    assert (code, out) == (2, "")
    assert "the dump folder cannot be written: File exists" in err
    assert "try: name a folder of your own" in err
    assert taken.read_text() == "mine"


def test_an_exclusion_without_effect_is_an_error(planish_: Call, saved: str) -> None:
    code, _, err = optimize(planish_, saved, "--exclude", "relu-to-clamp@relu_1")
    assert code == 2
    assert "no rule wanted to rewrite at relu-to-clamp@relu_1" in err
    assert "did you mean relu-to-clamp@relu?" in err


def test_timing_has_a_row_per_step_that_ran(planish_: Call, saved: str) -> None:
    code, out, err = optimize(planish_, saved, "--timing", "--disable-pass", "2")
    rows = [line.split() for line in err.splitlines() if line.strip()]
    assert code == 0
    assert rows[0] == ["step", "pass", "pass", "ms", "checking", "ms", "nodes", "before", "after"]
    steps = {row[0]: (row[1], row[-2:]) for row in rows[2:-1]}
    assert steps == {
        "1": ("fold-batch-norm", ["4", "3"]),
        "3": ("remove-identities", ["3", "2"]),
    }
    assert rows[-1][0] == "all"
    assert "\x1b" not in err + out
    _, out, err = optimize(planish_, saved, "--timing", "--json")
    timing = json.loads(out)["timing"]
    assert [(t["step"], t["nodes_before"], t["nodes_after"]) for t in timing] == [
        (1, 4, 3),
        (2, 3, 3),
        (3, 3, 2),
    ]
    assert all(t["seconds"] > 0 and t["checking_seconds"] > 0 for t in timing)
    assert err == ""


def test_timing_also_shows_a_run_that_fails(planish_: Call, saved: str) -> None:
    recipe = f"remove-identities,{SWAP}{{to=gelu}}"
    code, _, err = planish_("run-pass", saved, recipe, "--timing", "--quiet")
    assert code == 3
    assert re.search(r"^ +2 +swap-activation", err, re.M)


def test_a_dump_goes_on_where_it_stopped(planish_: Call, saved: str, tmp_path: Path) -> None:
    """Lossy and with a seed: every number is the same as in the run that was not interrupted."""
    recipe = f"fold-batch-norm,{ROUND},{SWAP},remove-identities"
    folder, whole = tmp_path / "dump", tmp_path / "whole.pt2"
    code, _, _ = planish_("run-pass", saved, recipe, "--quiet", "-o", str(whole))
    assert code == 0
    arguments = ("optimize", saved, "--recipe", recipe, "--quiet", "--dump-dir", str(folder))
    assert planish_(*arguments, "--stop-after", "3")[0] == 0
    names = sorted(path.name for path in folder.glob("*.pt2"))
    assert names == [
        "000_capture.pt2",
        "001_fold-batch-norm.pt2",
        "002_round-weights.pt2",
        "003_swap-activation.pt2",
    ]
    expected = load(whole)
    for number, name in enumerate(names):
        program = load(folder / name)
        assert (folder / name).with_suffix(".txt").read_text() == text(program)
        assert torch.isfinite(program(*program.samples[0])).all()
        out = str(tmp_path / f"from_{number}.pt2")
        start = ("--start-from", str(number + 1), "-o", out, "--quiet")
        assert planish_("run-pass", str(folder / name), recipe, *start)[0] == 0
        assert compare(expected, load(out)).equal
        sample = expected.samples[0]
        assert torch.equal(load(out)(*sample), expected(*sample))


@pytest.mark.slow
def test_the_dump_of_a_real_model_goes_on_to_the_same_program(tmp_path: Path) -> None:
    _, model = loaded("minilm")
    watchers = Watching(stop_after="recover-norms").instruments()
    dumped = tmp_path / "dump"
    captured = planish.optimize(model, inputs("minilm"), recipe="none", verify="off").program
    whole = planish.optimize(captured, verify="off").program
    planish.optimize(captured, verify="off", dump_dir=dumped, instruments=list(watchers))
    last = sorted(dumped.glob("*.pt2"))[-1]
    assert last.name == "008_recover-norms.pt2"
    rest = Watching(start_from="recover-activations").instruments()
    found = planish.optimize(load(last), verify="off", instruments=list(rest)).program
    assert compare(whole, found).equal
    shutil.rmtree(dumped)


def test_every_option_reaches_the_command() -> None:
    got: list[Watching] = []

    @click.command()
    @watching
    def command(watching: Watching) -> None:
        got.append(watching)

    options = "--print-after a --print-after-change --dump-dir d --stop-after 2 --start-from 1"
    more = "--disable-pass x --disable-pass y --exclude r@n --bisect-limit 3 --timing"
    found = CliRunner().invoke(command, [*options.split(), *more.split()])
    assert found.exit_code == 0, found.output
    assert got == [
        Watching("a", True, Path("d"), "2", "1", ("x", "y"), ("r@n",), 3, True),
    ]
    kinds = [type(instrument).__name__ for instrument in got[0].instruments()]
    assert kinds == [
        "Timing",
        "StartFrom",
        "StopAfter",
        "DisablePass",
        "SiteLimit",
        "ExcludeSites",
        "PrintAfter",
    ]
