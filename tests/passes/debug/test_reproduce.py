"""Every failure of a run leaves a bundle, and the bundle fails the same way in a fresh process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
from planish.ir.capture import capture
from planish.ir.compare import bounds_of
from planish.ir.errors import PlanishError, RequirementError, UsageError
from planish.ir.text import text
from planish.passes.base import Pass
from planish.passes.debug.bundle import failure_of, load_bundle
from planish.passes.debug.bundle_replay import PinnedCompare
from planish.passes.instruments import (
    DisablePass,
    ExcludeSites,
    Instrument,
    SiteLimit,
)
from planish.passes.steps import Step
from tests.passes.debug.bundling import Net, bundle_in, sample
from tests.support import failing_passes as failing
from tests.support.example_passes import Everything, RoundWeights, SwapActivation
from tests.support.real_models import inputs, loaded
from tests.support.repository import ROOT


class Half(Net):
    """Half precision inside, single precision outside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x).to(torch.bfloat16).to(torch.float32))


BATCH = {"x": {0: torch.export.Dim("batch", max=64)}}


@dataclass
class Case:
    """A run that fails."""

    passes: Sequence[Pass]
    signature: str
    stage: str = "pass"
    model: Callable[[], nn.Module] = Net
    options: dict[str, Any] = field(default_factory=dict)
    instruments: Callable[[], Sequence[Instrument]] = tuple


def batches() -> list[Tensor]:
    return [sample(), 200 * sample()]


CASES: dict[str, Case] = {
    "crash in a rule": Case(
        [SwapActivation(to="relu"), failing.CrashInRule()], "crash/crash-in-rule/bad-rule/KeyError"
    ),
    "crash in a pass": Case([failing.Crash()], "crash/crash/ValueError"),
    "no result": Case(
        [failing.Crash(error="none")],
        "crash/crash/PassError of planish.passes.pipeline:_check_result",
    ),
    "misuse of the rewriter": Case(
        [failing.Crash(error="pass")],
        "crash/crash/PassError of planish.ir.rewriter:Rewriter._opened",
    ),
    "crash that depends on the sites before": Case(
        [RoundWeights(), failing.Crash(error="site")], "crash/crash/ValueError"
    ),
    "crash behind a limit and an exclusion": Case(
        [RoundWeights(), failing.CrashInRule()],
        "crash/crash-in-rule/bad-rule/KeyError",
        instruments=lambda: [SiteLimit(3), ExcludeSites("round@linear_bias")],
    ),
    "verifier": Case([failing.WrongType()], "verifier/wrong-type/operator-types"),
    "wrong numbers": Case([failing.Wrong()], "contract/wrong/differs"),
    "wrong numbers, later": Case([RoundWeights(), failing.Wrong()], "contract/wrong/differs"),
    "wrong on the second probe": Case(
        [failing.Wrong(how="elsewhere")],
        "contract/wrong/differs",
        options={"dynamic_shapes": BATCH},
    ),
    "size of the sample": Case(
        [failing.Wrong(how="size")],
        "verifier/wrong/same-results",
        options={"dynamic_shapes": BATCH},
    ),
    "size of the sample, later": Case(
        [RoundWeights(), failing.Wrong(how="size")],
        "verifier/wrong/same-results",
        options={"dynamic_shapes": BATCH},
    ),
    "not finite": Case([failing.Infinite()], "contract/infinite/not finite"),
    "outside of the rewriter": Case([failing.Behind()], "contract/behind/differs"),
    "dead code from outside": Case([failing.Behind(how="dead")], "verifier/behind/no-dead-nodes"),
    "write into shared memory": Case(
        [failing.Overwrite()], "crash/overwrite/PassError of planish.passes.pipeline:_Driver.call"
    ),
    "calibration": Case(
        [RoundWeights(), failing.Calibrated()],
        "crash/calibrated/OverflowError",
        options={"calibration": batches()},
    ),
    "all passes together": Case(
        [failing.Slightly()] * 2, "contract/differs, all passes together", stage="recipe"
    ),
    "at the end": Case(
        [SwapActivation(to="relu"), failing.Wrong()],
        "contract/differs",
        stage="recipe",
        options={"verify": "end"},
    ),
    "verifier at the end": Case(
        [failing.WrongType()],
        "verifier/operator-types",
        stage="recipe",
        options={"verify": "end"},
    ),
    "unchecked": Case(
        [failing.Wrong(), failing.Crash()], "crash/crash/ValueError", options={"verify": "off"}
    ),
    "after an unsound pass": Case(
        [failing.Unsaveable(), failing.Crash()],
        "crash/crash/ValueError",
        stage="recipe",
        options={"verify": "off"},
    ),
    "coarser bounds": Case(
        [failing.Upcast(), failing.Wrong()], "contract/wrong/differs", model=Half
    ),
}


def fails(case: Case, folder: Path | None) -> PlanishError:
    with pytest.raises(PlanishError) as caught:
        planish.optimize(
            case.model().eval(),
            (sample(),),
            recipe=case.passes,
            instruments=case.instruments(),
            dump_dir=folder,
            **case.options,
        )
    return caught.value


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PlanishError, Path]]:
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PLANISH_REPRO_DIR", str(folder))
            error = fails(case, None)
        found[name] = error, bundle_in(folder)
    return found


COMMAND_LINE = "from planish.tools.cli import main; main()"
REPLAY_ALL = """
import json, sys
from planish.passes.debug.bundle import failure_of, load_bundle, replay
for path in sys.argv[1:]:
    error = replay(load_bundle(path))
    print(json.dumps([failure_of(error).signature, str(error)] if error else None))
"""


@pytest.fixture(scope="module")
def replayed(failures: dict[str, tuple[PlanishError, Path]]) -> dict[str, list[str]]:
    """What a process says that has seen none of the runs."""
    paths = [str(path) for _, path in failures.values()]
    done = subprocess.run(
        [sys.executable, "-c", REPLAY_ALL, *paths],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(failures, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_failure_replays_in_a_fresh_process(
    name: str,
    failures: dict[str, tuple[PlanishError, Path]],
    replayed: dict[str, list[str]],
) -> None:
    error, folder = failures[name]
    assert failure_of(error).signature == CASES[name].signature
    facts = load_bundle(folder).facts
    assert facts.stage == CASES[name].stage
    assert facts.failure.signature == CASES[name].signature
    assert error.replay == f"planish repro {folder}"
    assert f"  replay: {error.replay}" in str(error)
    assert replayed[name] is not None
    assert replayed[name][0] == CASES[name].signature


@pytest.mark.parametrize("name", ["wrong numbers", "size of the sample, later", "calibration"])
def test_a_replay_says_the_very_same(
    name: str,
    failures: dict[str, tuple[PlanishError, Path]],
    replayed: dict[str, list[str]],
) -> None:
    message = load_bundle(failures[name][1]).failure.message
    assert replayed[name][1] == message
    assert "replay:" not in message  # a bundle does not name itself


def test_a_bundle_holds_the_program_before_the_pass_and_the_rest_of_the_recipe(
    tmp_path: Path,
) -> None:
    passes = [RoundWeights(), Everything(), failing.CrashInRule(), SwapActivation(to="gelu")]
    case = Case(passes, "")
    fails(case, tmp_path)
    bundle = load_bundle(bundle_in(tmp_path))
    assert text(bundle.program) == (tmp_path / "002_everything.txt").read_text()
    assert bundle.recipe.passes == tuple(passes[2:])
    assert bundle.recipe.target == "onnxruntime-cpu"
    assert bundle.facts.sites.count == 2
    assert bundle.calibration is None
    assert torch.equal(bundle.program.samples[0][0], sample())


def test_the_program_is_bundled_as_the_pass_met_it(
    failures: dict[str, tuple[PlanishError, Path]],
) -> None:
    # The pass made torch fix the size, which every program of the run shares.
    program = load_bundle(failures["size of the sample, later"][1]).program
    assert text(program).startswith("program(%x: f32[batch, 4])")


def test_bounds_are_those_of_the_original_program(
    failures: dict[str, tuple[PlanishError, Path]],
) -> None:
    bundle = load_bundle(failures["coarser bounds"][1])
    original = capture(Half().eval(), (sample(),))
    assert bundle.facts.bounds == bounds_of(original)
    assert bundle.facts.bounds != bounds_of(bundle.program)
    assert PinnedCompare(bundle).bounds(bundle.program) == bounds_of(original)


def test_calibration_is_bundled_as_the_spool_held_it(
    failures: dict[str, tuple[PlanishError, Path]],
) -> None:
    held = load_bundle(failures["calibration"][1]).calibration
    assert held is not None
    assert len(held) == 2
    for (kept,), given in zip(held, batches(), strict=True):
        assert torch.equal(kept, given)


def test_left_out_steps_stay_left_out(tmp_path: Path) -> None:
    wrong = failing.Wrong()
    case = Case([wrong, failing.Crash()], "", instruments=lambda: [DisablePass(["wrong"])])
    fails(case, tmp_path)
    assert load_bundle(bundle_in(tmp_path)).recipe.passes == (failing.Crash(),)


def test_the_same_failure_gives_the_same_folder(tmp_path: Path) -> None:
    case = CASES["crash in a rule"]
    first = fails(case, tmp_path).replay
    before = bundle_in(tmp_path).stat().st_ino
    # Also beside a dump, which is written anew and lets the bundle be.
    assert fails(case, tmp_path).replay == first
    assert bundle_in(tmp_path).stat().st_ino != before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    other = fails(Case([failing.CrashInRule()], ""), tmp_path / "other").replay
    assert other is not None
    assert other.split("/")[-1] != str(first).split("/")[-1]


def test_without_a_dump_folder_the_environment_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["crash in a pass"]
    monkeypatch.setenv("PLANISH_REPRO_DIR", str(tmp_path / "not yet there"))
    error = fails(case, None)
    assert error.replay == f"planish repro '{bundle_in(tmp_path / 'not yet there')}'"
    monkeypatch.setenv("PLANISH_REPRO_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert f"planish repro {tmp_path}/planish-repro-" in str(fails(case, None))


def test_errors_of_the_call_leave_no_bundle(tmp_path: Path) -> None:
    class Interrupted(Instrument):
        def before_pass(self, step: Step) -> None:
            raise KeyboardInterrupt

    def call(**options: Any) -> None:
        planish.optimize(Net().eval(), (sample(),), dump_dir=tmp_path, **options)

    with pytest.raises(RequirementError):
        call(recipe=[failing.Calibrated()])
    with pytest.raises(UsageError, match="no such pass"):
        call(recipe=[Everything()], instruments=[DisablePass(["absent"])])
    with pytest.raises(UsageError, match="no rule wanted"):
        call(recipe=[Everything()], instruments=[ExcludeSites("a@b")])
    with pytest.raises(KeyboardInterrupt):
        call(recipe=[Everything()], instruments=[Interrupted()])
    call(recipe=[Everything(), SwapActivation()])
    assert not [p for p in tmp_path.iterdir() if "planish-repro" in p.name]


# -- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failure_on_minilm_replays_in_a_fresh_process(tmp_path: Path) -> None:
    description, model = loaded("minilm")
    args, kwargs = inputs("minilm")
    wrong = "tests.support.failing_passes:Wrong"
    with pytest.raises(planish.VerificationError) as caught:
        planish.optimize(
            model,
            (args, kwargs),
            dynamic_shapes=description.dynamic_shapes,
            recipe=f"merge-duplicate-constants,remove-identities,{wrong}",
            dump_dir=tmp_path,
        )
    bundle = load_bundle(bundle_in(tmp_path))
    assert bundle.failure.signature == "contract/wrong/differs"
    assert caught.value.replay == f"planish repro {bundle.folder}"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, "repro", str(bundle.folder), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    got = json.loads(done.stdout)
    assert got["reproduced"] is True
    assert got["got"]["message"].splitlines()[0] == bundle.failure.message.splitlines()[0]
