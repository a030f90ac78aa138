"""Bundles on disk: what is in them, what damage is said, and when two failures are one."""

import json
import math
import pickle  # noqa: TID251 - to make files that must be refused
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planish.ir.errors import (
    ExportError,
    PassError,
    PlanishError,
    RecipeError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import Pass
from planish.passes.debug.bundle import (
    Export,
    Facts,
    Failure,
    Sites,
    failure_of,
    is_failure,
    load_bundle,
    replay,
    write_bundle,
)
from planish.passes.debug.bundle_facts import read_facts
from planish.passes.debug.bundle_replay import drift
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from tests.passes.debug.bundling import deep
from tests.support import failing_passes as failing
from tests.support.example_passes import SwapActivation


@pytest.fixture(scope="module")
def program() -> Program:
    return deep()


FAILURE = Failure("crash", "pass crash (step 2)", "crash/crash/ValueError", "it failed\n  at: x")
FACTS = Facts(
    stage="pass",
    failure=FAILURE,
    verify="end",
    seed=5,
    sites=Sites(3, 8, ("a@b", "c@d")),
    bounds=(1e-4,),
    sizes={"batch": 4},
    passes=("crash",),
    export=Export("onnx", 20, {"linear": "gemm"}, verify=False),
    left_out=("a loss",),
)
RECIPE = Recipe((failing.Crash(), SwapActivation(to="gelu")), target="onnx", seed=7)


def written(program: Program, folder: Path, **facts: Any) -> Path:
    x = program.samples[0][0]
    return write_bundle(
        folder,
        replace(FACTS, **facts),
        program,
        RECIPE,
        calibration=[(x,), (x + 1,)],
        probe=(x + 2,),
        error=ValueError("the first error"),
    )


@pytest.fixture
def folder(program: Program, tmp_path: Path) -> Path:
    return written(program, tmp_path)


# -- what is in it --------------------------------------------------------------------------------


def test_a_bundle_reads_back_as_it_was_written(program: Program, folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.facts == FACTS
    assert bundle.failure == FAILURE
    assert text(bundle.program) == text(program)
    assert bundle.recipe == RECIPE
    assert bundle.probe is not None
    assert bundle.calibration is not None
    x = program.samples[0][0]
    assert [torch.equal(b[0], x + i) for i, b in enumerate(bundle.calibration)] == [True, True]
    assert torch.equal(next(iter(bundle.probe))[0], x + 2)
    assert (folder / "error.txt").read_text() == "ValueError: the first error\n\n"


def test_the_folder_is_named_for_its_content_and_private(
    program: Program, folder: Path, tmp_path: Path
) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    inode = folder.stat().st_ino
    # Neither versions nor the wording of the message make it another failure.
    same = written(
        program, tmp_path, versions={"torch": "3"}, failure=replace(FAILURE, message="else")
    )
    assert same == folder
    assert folder.stat().st_ino != inode
    assert load_bundle(folder).failure.message == "else"
    assert written(program, tmp_path, seed=6) != folder
    assert written(deep(depth=2), tmp_path) != folder
    assert len(list(tmp_path.iterdir())) == 3


def test_the_readme_names_the_command_and_every_file_with_its_size(folder: Path) -> None:
    readme = (folder / "README.txt").read_text()
    assert f"\n    planish repro {folder.name}\n" in readme
    for path in folder.iterdir():
        if path.name != "README.txt":
            assert f"    {path.name} " in readme
    size = (folder / "program.pt2").stat().st_size
    assert f"{size / 2**10:.1f} KiB" in readme
    assert "    a loss" in readme


# -- damage ---------------------------------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "boom")


def edited(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "repro.json").read_text())
        for key, value in changes.items():
            if value is None:
                del data[key]
            else:
                data[key] = value
        (folder / "repro.json").write_text(json.dumps(data))

    return damage


def truncated(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def foreign_program(folder: Path) -> None:
    exported = torch.export.export(nn.ReLU(), (torch.ones(2),))
    torch.export.save(exported, folder / "program.pt2")


def pickled_program(folder: Path) -> None:
    torch.save(Bomb(folder / "boom"), folder / "program.pt2")


def bare_pickle(folder: Path) -> None:
    (folder / "program.pt2").write_bytes(pickle.dumps(Bomb(folder / "boom")))


def pickle_beside_the_program(folder: Path) -> None:
    """An archive that claims to be planish's, and holds pickles for all parts."""
    payload = pickle.dumps(Bomb(folder / "boom"))
    with zipfile.ZipFile(folder / "program.pt2", "w") as archive:
        archive.writestr("planish.json", '{"format": "planish program", "version": 1}')
        for name in ("graph.json", "constants.safetensors", "samples.safetensors", "data.pkl"):
            archive.writestr(name, payload)


def newer_program(folder: Path) -> None:
    with zipfile.ZipFile(folder / "program.pt2", "w") as archive:
        archive.writestr("planish.json", '{"format": "planish program", "version": 99}')


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no facts": (removed("repro.json"), "is no bundle: it has no repro.json"),
    "half the facts": (truncated("repro.json"), "repro.json is damaged: JSONDecodeError"),
    "other JSON": (edited(format="something"), "repro.json is not that of a bundle"),
    "newer": (edited(version=99), "has format version 99; this planish reads 1"),
    "no stage": (edited(stage=None), "repro.json is damaged: KeyError: 'stage'"),
    "unknown stage": (edited(stage="later"), "'later' is none of pass, recipe, export"),
    "unknown verify": (edited(verify=["each"]), "is none of each, end, off"),
    "failure is a text": (edited(failure="bad"), "repro.json is damaged: TypeError"),
    "bounds are a text": (edited(bounds="abc"), "repro.json is damaged: ValueError"),
    "an infinite seed": (edited(seed=math.inf), "repro.json is damaged: OverflowError"),
    "no program": (removed("program.pt2"), "has no program.pt2"),
    "half a program": (truncated("program.pt2"), "program.pt2 is damaged"),
    "a program of torch": (foreign_program, "is not a program that planish saved"),
    "a pickled program": (pickled_program, "is not a program that planish saved"),
    "a bare pickle": (bare_pickle, "program.pt2 is damaged"),
    "pickles within": (pickle_beside_the_program, "program.pt2 is damaged"),
    "a newer program": (newer_program, "has format version 99; this planish reads version 1"),
    "no recipe": (removed("recipe.yaml"), "has no recipe.yaml"),
    "half a probe": (truncated("probe.zip"), "probe.zip is damaged"),
    "half the calibration": (truncated("calibration.zip"), "calibration.zip is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error_and_nothing_is_unpickled(name: str, folder: Path) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(UsageError) as caught:
        load_bundle(folder)
    assert message in caught.value.what
    assert caught.value.hint
    assert not (folder / "boom").exists()


def test_what_is_no_folder_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(UsageError, match="is a file"):
        load_bundle(folder / "repro.json")


def test_a_damaged_recipe_is_said_when_it_is_read(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("passes: [[")
    bundle = load_bundle(folder)
    with pytest.raises(RecipeError, match="not YAML"):
        _ = bundle.recipe


def test_loading_imports_nothing_and_replaying_says_what_is_missing(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("passes:\n- not_there.at_all:Pass\n")
    bundle = load_bundle(folder)
    with pytest.raises(UsageError, match=r"'not_there.at_all:Pass' cannot be imported"):
        replay(bundle)


# -- when two failures are one --------------------------------------------------------------------


def failure(program: Program, *passes: Pass, **options: Any) -> Failure:
    with pytest.raises(PlanishError) as caught:
        run_pipeline(program, Recipe(passes), None, default_instruments(**options))
    return failure_of(caught.value)


@pytest.mark.parametrize(
    "pass_",
    [
        failing.CrashInRule(),
        failing.Crash(),
        failing.WrongType(),
        failing.Wrong(),
        failing.Wrong(how="size"),
        failing.Infinite(),
        failing.Behind(how="dead"),
    ],
    ids=str,
)
def test_a_signature_knows_no_sizes_names_and_places(pass_: Pass) -> None:
    first = failure(deep(), pass_)
    other = failure(deep(width=9, depth=3, batch=5), SwapActivation(to="relu"), pass_)
    assert first.message != other.message
    assert first.signature == other.signature
    assert not any(c.isdigit() for c in first.signature)


def test_a_signature_tells_passes_rules_and_kinds_apart() -> None:
    found = {
        failure(deep(), pass_, **options).signature
        for pass_, options in (
            (failing.CrashInRule(), {}),
            (failing.Crash(), {}),
            (failing.Crash(error="none"), {}),
            (failing.Crash(error="pass"), {}),
            (failing.WrongType(), {}),
            (failing.WrongType(), {"verify": "end"}),
            (failing.Wrong(), {}),
            (failing.Wrong(), {"verify": "end"}),
            (failing.Wrong(how="size"), {}),
            (failing.Infinite(), {}),
            (failing.Behind(), {}),
            (failing.Behind(how="dead"), {}),
        )
    }
    assert len(found) == 12


def thrown(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "signature"),
    [
        (ValueError("at 3"), "crash/ValueError"),
        (ExportError("no"), "export/ExportError/tests.passes.debug.test_bundle:thrown"),
        (UnsupportedError("operator aten.x cannot"), "export/UnsupportedError/aten.x"),
        (VerificationError("node a reads 'b'"), "verifier/tests.passes.debug.test_bundle:thrown"),
        (VerificationError("it is lossy, and at p an output is not finite"), "contract/not finite"),
        (
            VerificationError("it is lossy, and there is no input to measure its error on"),
            "contract/not measured",
        ),
        (
            VerificationError("the program no longer runs on sample 1: operator failed: size 3"),
            "contract/no longer runs",
        ),
        (PassError("no"), "crash/PassError of tests.passes.debug.test_bundle:thrown"),
    ],
    ids=str,
)
def test_signatures_of_errors_outside_of_a_run(error: Exception, signature: str) -> None:
    assert failure_of(thrown(error)).signature == signature


def test_an_error_that_was_never_raised_still_has_a_signature() -> None:
    assert failure_of(ExportError("no")).signature == "export/ExportError"


def test_a_usage_error_of_the_comparison_is_a_failure() -> None:
    from planish.ir.compare import measure

    with pytest.raises(UsageError) as caught:
        measure((torch.ones(2),), (torch.ones(3),))
    assert is_failure(caught.value)
    assert not is_failure(thrown(UsageError("the call is wrong")))
    assert not is_failure(KeyboardInterrupt())


# -- other machines --------------------------------------------------------------------------------


def test_what_differs_between_machines_is_listed(folder: Path) -> None:
    assert drift(load_bundle(folder)) == {}
    edited(versions={"torch": "0.1"}, platform={"threads": "99"})(folder)
    found = drift(load_bundle(folder))
    assert found["torch"] == ("0.1", torch.__version__)
    assert found["threads"] == ("99", str(torch.get_num_threads()))
    assert found["python"][0] == "unknown"


def test_facts_are_read_without_the_program(folder: Path) -> None:
    (folder / "program.pt2").write_bytes(b"")
    assert read_facts(folder) == FACTS
    assert load_bundle(folder, program=False).facts == FACTS
