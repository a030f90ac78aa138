"""``planish bisect`` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.backends.timer import TargetTimer
from planish.ir.capture import capture
from planish.ir.changes import SiteCounter
from planish.ir.errors import UsageError
from planish.ir.files import load
from planish.passes.base import PassContext, PassResult
from planish.passes.debug.bisect import bisect
from planish.passes.debug.bisect_search import budget
from planish.passes.debug.predicates import KeepsContract, MinSqnr, Predicate
from planish.passes.debug.reproduce import Reproduce
from planish.passes.factorize.factorize import Factorize
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.steps import Instrument, Step
from planish.tools.bench.faults import Planted
from planish.tools.bisect_subject import Subject
from planish.tools.predicates import Metric, SlowerThan, read_limit
from tests.passes.debug.damaging import Damage, chain, least, sound
from tests.support.command import Call

MODEL = "tests.passes.debug.damaging:chain_of_six"
DAMAGE = "tests.passes.debug.damaging:Damage"
RECIPE = f"{DAMAGE},tests.support.example_passes:RoundWeights{{step=0.25}},{DAMAGE}{{at=[3]}}"


def not_a_number(model: nn.Module) -> str:
    return "good"


def batches() -> Iterator[tuple[torch.Tensor]]:
    yield (torch.full((2, 4), 3.0),)


def test_every_look_is_a_line_and_the_answer_is_complete(planish_: Call) -> None:
    code, out, err = planish_("bisect", MODEL, "--recipe", RECIPE, "--min-sqnr", "40")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "baseline: the original program: SQNR inf dB  good"
    assert lines[1].startswith("pass 1/3: after 3 of 3 passes (damage): SQNR ")
    assert lines[1].endswith("  BAD")
    assert lines[2] == "pass 2/3: after 1 of 3 passes (damage): SQNR inf dB  good"
    assert lines[3] == "pass 3/3: after 2 of 3 passes (round-weights): SQNR inf dB  good"
    assert lines[4].startswith(
        "site 1/4: with 3 of 6 sites of damage, up to 10 (rectify@clamp_min_default_2): SQNR inf"
    )
    assert "guilty: pass damage (step 3), rewrite site 11: rectify at clamp_min_default_3" in lines
    assert "  source: " in out
    assert "x = torch.relu(x + self.weight)" in out
    diff = lines[lines.index("--- before") :]
    assert diff[1] == "+++ after"
    assert any(line.startswith("+") and "aten.mul" in line for line in diff[2:])
    assert len(diff) < 20  # a small one
    assert "--bisect-limit 10, and with" in out
    assert "--bisect-limit 11" in out
    assert (
        "without it: --exclude rectify@clamp_min_default_3, or the whole pass: --disable-pass 3"
        in lines
    )
    assert "running the recipe ..." in err


def test_the_suggestions_work(planish_: Call) -> None:
    common = ("optimize", MODEL, "--recipe", RECIPE, "--quiet")
    assert planish_(*common)[0] == 3
    assert planish_(*common, "--exclude", "rectify@clamp_min_default_3")[0] == 0
    assert planish_(*common, "--disable-pass", "3")[0] == 0
    assert planish_(*common, "--bisect-limit", "10")[0] == 0
    assert planish_(*common, "--bisect-limit", "11")[0] == 3


def test_without_a_question_the_default_verification_is_asked(planish_: Call) -> None:
    code, out, _ = planish_("bisect", MODEL, "--recipe", RECIPE, "--quiet")
    assert code == 0
    assert "guilty: pass damage (step 3), rewrite site 11" in out
    assert "it is exact, and at the sample inputs" in out


def test_nothing_bad_is_exit_code_one(planish_: Call) -> None:
    code, out, _ = planish_("bisect", MODEL, "--recipe", DAMAGE, "--max-abs", "0.5", "--quiet")
    assert code == 1
    assert "nothing is bad: no output differs from the original's by more than 0.5" in out
    assert "the result of the recipe: max abs 0" in out


def test_the_default_recipe_is_exact(planish_: Call) -> None:
    code, out, _ = planish_("bisect", "tests.support.tiny:conv_bn", "--json", "--quiet")
    facts = json.loads(out)
    assert code == 1
    assert facts["recipe"].startswith("target=onnxruntime-cpu,merge-duplicate-constants,")
    assert not facts["found"]


def test_what_the_recipe_overrules_is_told(planish_: Call) -> None:
    recipe = f"target=onnx,seed=3,{DAMAGE}"
    arguments = ("bisect", MODEL, "--recipe", recipe, "--max-abs", "1", "--quiet")
    _, out, _ = planish_(*arguments, "--target", "onnxruntime-cpu", "--seed", "4")
    own = "remark: the recipe names its own"
    assert f"{own} target, 'onnx'; it was taken instead of 'onnxruntime-cpu'" in out
    assert f"{own} seed, 3; it was taken instead of 4" in out
    assert "remark" not in planish_(*arguments)[1]


def test_json_is_json_alone(planish_: Call) -> None:
    arguments = ("bisect", MODEL, "--recipe", RECIPE, "--max-abs", "0.1", "--json", "--quiet")
    code, out, _ = planish_(*arguments)
    facts = json.loads(out)
    assert code == 0
    assert (facts["step"], facts["pass_name"], facts["site"]) == (3, "damage", 11)
    assert (facts["rule"], facts["node"]) == ("rectify", "clamp_min_default_3")
    assert facts["options"] == ["--exclude rectify@clamp_min_default_3", "--disable-pass 3"]
    levels = [e["level"] for e in facts["evaluations"]]
    assert levels[0] == "baseline"
    assert levels[-1] == "confirm"
    assert facts["monotone"] is True
    assert facts["diff"][0] == "--- before"


@pytest.mark.parametrize(
    ("question", "how"),
    [
        (("--metric", "tests.passes.debug.damaging:least", "--max-drop", "0.1"), "scale"),
        (("--crash",), "crash"),
        (("--non-finite",), "nan"),
        (("--max-abs", "0.1"), "scale"),
        (("--min-sqnr", "30"), "scale"),
        (("--slower-than", "2"), "slow"),
        ((), "type"),
    ],
)
def test_every_question(planish_: Call, question: Sequence[str], how: str) -> None:
    recipe = f"{DAMAGE},{DAMAGE}{{at=[2],how={how}}}"
    code, out, _ = planish_("bisect", MODEL, "--recipe", recipe, "--json", "--quiet", *question)
    facts = json.loads(out)
    assert code == 0
    assert (facts["step"], facts["site"]) == (2, 9)
    assert not facts["evaluations"][-1]["bad"]


def test_the_two_programs_are_written(planish_: Call, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "guilty"
    arguments = ("bisect", MODEL, "--recipe", RECIPE, "--max-abs", "0.1", "-o", str(folder))
    code, out, _ = planish_(*arguments)
    assert code == 0
    before, after = (load(folder / f"{name}.pt2") for name in ("before", "after"))
    assert "aten.mul" not in str(before)
    assert "aten.mul" in str(after)
    assert f"wrote {folder / 'after.pt2'}" in out
    assert sorted(p.name for p in folder.iterdir()) == ["after.pt2", "before.pt2"]


def test_where_a_pass_raises_there_is_only_a_program_before(planish_: Call, tmp_path: Path) -> None:
    recipe = f"{DAMAGE}{{at=[2],how=crash}}"
    code, out, _ = planish_("bisect", MODEL, "--recipe", recipe, "-o", str(tmp_path))
    assert code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["before.pt2"]
    assert "there is no program after it" in out
    assert "KeyError: 'planted'" in out
    (line,) = [line for line in out.splitlines() if line.startswith("--> ")]
    assert "aten.relu" in line  # the node at which it crashed, among its neighbors


def test_a_folder_is_not_left_behind_where_nothing_is_bad(planish_: Call, tmp_path: Path) -> None:
    folder = tmp_path / "guilty"
    arguments = ("bisect", MODEL, "--recipe", DAMAGE, "--max-abs", "1", "-o", str(folder))
    assert planish_(*arguments)[0] == 1
    assert not folder.exists()


def test_calibration_batches_are_looked_at(planish_: Call) -> None:
    arguments = ("bisect", MODEL, "--recipe", RECIPE, "--max-abs", "3.0", "--quiet")
    code, out, _ = planish_(*arguments, "--calibration", "tests.tools.test_bisect:batches")
    assert code == 0  # a deviation of that size shows on large inputs only
    assert "guilty: pass damage" in out
    assert planish_(*arguments)[0] == 1


def test_what_was_found_can_be_left_out_to_find_the_next(planish_: Call) -> None:
    recipe = f"{DAMAGE}{{at=[1,4]}}"
    arguments = ("bisect", MODEL, "--recipe", recipe, "--max-abs", "0.1", "--json", "--quiet")
    first = json.loads(planish_(*arguments)[1])
    second = json.loads(planish_(*arguments, "--exclude", "rectify@relu_1")[1])
    assert (first["node"], second["node"]) == ("relu_1", "relu_4")
    assert first["evaluations"][-1]["bad"]
    assert not second["evaluations"][-1]["bad"]
    code, _, _ = planish_(*arguments, "--disable-pass", "1")
    assert code == 1


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """What a failed run leaves behind: the guilty pass and the one after it."""
    program = chain(4)
    recipe = Recipe((Damage(), Damage(at=(2,)), Damage()))
    contract = KeepsContract()
    contract.prepare(program)
    watchers = (Reproduce(tmp_path), *contract.watchers())
    with pytest.raises(Exception, match="it is exact"):
        run_pipeline(program, recipe, PassContext(), watchers)
    (folder,) = tmp_path.glob("planish-repro-*")
    return folder


def test_a_bundle_brings_program_and_recipe(planish_: Call, bundle: Path) -> None:
    code, out, _ = planish_("bisect", str(bundle), "--json", "--quiet")
    facts = json.loads(out)
    assert code == 0
    assert (facts["step"], facts["node"]) == (1, "clamp_min_default_2")
    assert facts["site"] == 7  # counted as in the run that failed


@pytest.mark.parametrize("option", ["--recipe", "--target", "--calibration", "--seed"])
def test_what_a_bundle_brings_cannot_be_given(planish_: Call, bundle: Path, option: str) -> None:
    code, _, err = planish_("bisect", str(bundle), option, "5")
    assert code == 2
    assert f"{option} is given, and the bundle brings its own" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--min-sqnr", "3", "--crash"), "--min-sqnr and --crash are two questions"),
        (("--max-abs", "3", "--non-finite"), "--max-abs and --non-finite are two questions"),
        (("--metric", "a:b"), "--metric MODULE:FUNCTION alone asks nothing"),
        (("--max-drop", "0.1"), "--max-drop X alone asks nothing"),
        (("--metric", "math:nothing", "--max-drop", "1"), "module 'math' has no 'nothing'"),
        (("--metric", f"{__name__}:not_a_number", "--max-drop", "1"), "returned a str"),
        (("--metric", "math:floor", "--max-drop", "1"), "fails on the original program"),
        (("--max-abs", "-1"), "--max-abs is -1"),
        (("--max-abs", "nan"), "--max-abs is nan"),
        (("--metric", "a:b", "--max-drop", "-1"), "--max-drop is -1"),
        (("--slower-than", "12 parsecs"), "neither a ratio nor a duration"),
        (("--slower-than", "0.9"), "the original itself is slower"),
        (("--threads", "2"), "--threads means nothing here"),
        (("--min-sqnr", "nan"), "--min-sqnr is nan"),
        (("--recipe", "fold-nothing"), "fold-nothing"),
        (("--target", "abacus"), "unknown target 'abacus'"),
        (("--disable-pass", "fold-nothing"), "fold-nothing"),
        (("--exclude", "no-site"), "names no rewrite site"),
        (("--exclude", "a@b", "--max-abs", "1"), "no rule wanted to rewrite at a@b"),
        (("--crash", "--calibration", "tests.tools.test_bisect:batches"), "has no use"),
        (("--slower-than", "0.001us"), "the original program is bad already"),
        (("-o", "/proc/guilty"), "cannot write into '/proc/guilty'"),
    ],
)
def test_misuse_is_exit_code_two(planish_: Call, arguments: Sequence[str], message: str) -> None:
    code, out, err = planish_("bisect", MODEL, "--quiet", *arguments)
    assert message in err
    assert code == 2
    assert "guilty" not in out


# -- the predicates that live here ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("1.1", (1.1, True)),
        ("2x", (2.0, True)),
        ("12ms", (12.0, False)),
        ("0.5s", (500.0, False)),
        (".5s", (500.0, False)),
        ("800us", (0.8, False)),
    ],
)
def test_limits(text: str, limit: tuple[float, bool]) -> None:
    number, is_ratio = read_limit(text)
    assert number == pytest.approx(limit[0])
    assert is_ratio == limit[1]


@pytest.mark.parametrize("text", ["", "fast", "-1", "1e3", "nan", "inf", "0.99x", "5m"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        read_limit(text)


def linears() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A model with a weight that a clock may look at."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return net.eval(), (torch.randn(4, 64),)


@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
def test_passes_that_measure_have_a_clock(planish_: Call, target: str) -> None:
    code, out, err = planish_(
        "bisect",
        f"{__name__}:linears",
        "--recipe",
        "factorize{method=svd,rule=latency}",
        "--target",
        target,
        "--crash",
        "--quiet",
    )
    assert (code, err) == (1, "")
    assert "nothing is bad" in out


class Strict(Instrument):
    """Fails after every pass."""

    def after_pass(self, step: Step, result: PassResult) -> None:
        raise LookupError("not allowed here")


def test_a_bundle_of_a_pass_that_measures_can_be_bisected(planish_: Call, tmp_path: Path) -> None:
    recipe = Recipe((Factorize(method="svd", rule="latency"),), target="onnx")
    context = PassContext(timer=TargetTimer("onnx"))
    with pytest.raises(LookupError):
        run_pipeline(capture(*linears()), recipe, context, (Reproduce(tmp_path), Strict()))
    (folder,) = tmp_path.glob("planish-repro-*")
    code, out, _ = planish_("bisect", str(folder), "--crash", "--quiet")
    assert (code, "nothing is bad" in out) == (1, True)


def test_every_run_draws_from_the_seed_of_the_recipe() -> None:
    subject = Subject(chain(2), Recipe((), seed=7), "onnx", None, SiteCounter())
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    for _ in range(2):
        assert torch.equal(torch.rand(3, generator=subject.context().generator), expected)


def test_a_metric_is_measured_from_the_original() -> None:
    metric = Metric(least, 0.5, name="least")
    original = chain(3)
    base = metric.prepare(original)
    assert not base.bad
    assert base.text.startswith("least ")
    assert not metric.judge(original).bad
    worse = run_pipeline(original, Recipe((Damage(at=(0,)),)), PassContext()).program
    verdict = metric.judge(worse)
    assert verdict.bad
    assert "a drop of" in verdict.text
    better = run_pipeline(original, Recipe((Damage(at=(0,), how="undo"),)), PassContext()).program
    assert not metric.judge(better).bad


def test_a_score_that_is_no_number_is_bad() -> None:
    scores = iter([0.5, float("nan")])
    metric = Metric(lambda model: next(scores), 0.5)
    metric.prepare(chain(1))
    assert metric.judge(chain(1)).bad


def test_the_files_that_were_timed_are_gone() -> None:
    with SlowerThan("100", target="onnx", rounds=3) as slower:
        folder = slower._folder
        assert "times the original's" in slower.prepare(chain(2)).text
        assert list(folder.iterdir()) == []
    assert not folder.exists()


# -- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "predicate"),
    [("gelu-taken-for-an-identity", MinSqnr(40)), ("folded-batch", KeepsContract())],
)
def test_a_wrong_rewrite_in_a_real_model(name: str, predicate: Predicate) -> None:
    from planish.tools.bench.faults import FAULTS
    from planish.tools.bench.faults.models import cached_run
    from tests.support.real_models import loaded

    fault = FAULTS[name]
    loaded(fault.model)  # skips where the weights are missing
    clean = cached_run(fault.model, fault.recipe, None)
    guilty, recipe = clean.planted(fault)
    planted = recipe.passes[guilty - 1]
    found = bisect(clean.program, recipe, predicate)
    assert isinstance(planted, Planted)
    assert found.step == guilty
    assert f"{found.rule}@{found.node}" == planted.site
    assert not found.evaluations[-1].bad
    rewrites = len(clean.run.records[guilty - 1].changes)
    assert found.count("site") <= budget(rewrites + 1)  # a fault may be a rewrite of its own
    sound(found)
