"""What a bundle cannot hold is said; a run that succeeds, or cannot be bundled, leaves nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from planish.backends.timer import TargetTimer
from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError
from planish.ir.program import Program
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.debug.bundle import failure_of, load_bundle, replay
from planish.passes.debug.reproduce import Reproduce
from planish.passes.factorize.factorize import Factorize
from planish.passes.instruments import Instrument, default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.steps import Step
from tests.passes.debug.bundling import Net, bundle_in, sample
from tests.support import failing_passes as failing
from tests.support.example_passes import SwapActivation, calling

# -- what cannot be bundled -----------------------------------------------------------------------


@pytest.fixture
def program() -> Program:
    return capture(Net().eval(), (sample(),))


def raises(
    program: Program,
    passes: Sequence[Pass],
    folder: Path,
    *others: Instrument,
    context: PassContext | None = None,
) -> Exception:
    instruments = [Reproduce(folder), *others, *default_instruments()]
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any: the caller looks at it
        run_pipeline(program, Recipe(tuple(passes)), context, instruments)
    assert isinstance(caught.value, Exception)
    return caught.value


def test_a_pass_that_cannot_be_imported_is_named(program: Program, tmp_path: Path) -> None:
    def crash(program: Program, context: PassContext) -> PassResult:
        raise ValueError("the first error")

    error = raises(program, [calling(crash)], tmp_path)
    assert "the first error" in str(error)
    bundle = load_bundle(bundle_in(tmp_path))
    assert bundle.facts.left_out == (
        "pass calls: importing tests.support.example_passes:Calls gives another class than the one "
        "that ran",
    )
    assert "What could not be bundled" in (bundle.folder / "README.txt").read_text()
    # A later step that cannot be imported does not keep the failing one from being replayed.
    raises(program, [failing.Crash(), calling(crash)], tmp_path / "later")
    later = load_bundle(bundle_in(tmp_path / "later"))
    assert later.recipe.passes == (failing.Crash(),)
    assert failure_of(replay(later) or Exception()).signature == "crash/crash/ValueError"


def test_a_loss_is_named_and_may_be_given_again(program: Program, tmp_path: Path) -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return torch.tensor(0.5)

    context = PassContext(loss=loss, labeled=[1])
    error = raises(program, [failing.Scored()], tmp_path, context=context)
    bundle = load_bundle(bundle_in(tmp_path))
    assert "pass scored needs labels and loss, which no file can hold" in bundle.facts.left_out[0]
    assert isinstance(replay(bundle), RequirementError)
    again = replay(bundle, loss=loss, labeled=[1])
    assert again is not None
    assert failure_of(again).signature == failure_of(error).signature


def test_an_instrument_of_the_caller_is_named(program: Program, tmp_path: Path) -> None:
    class Strict(Instrument):
        def after_pass(self, step: Step, result: PassResult) -> None:
            raise LookupError("not allowed here")

    error = raises(program, [SwapActivation()], tmp_path, Strict())
    assert isinstance(error, LookupError)
    found = bundle_in(tmp_path)
    assert error.__notes__ == ["in pass swap-activation", f"replay: planish repro {found}"]
    bundle = load_bundle(found)
    assert bundle.failure.signature == "crash/swap-activation/LookupError"
    assert bundle.facts.left_out[0].startswith(f"the instrument {__name__}:")
    assert replay(bundle) is None


def test_where_no_bundle_can_be_written_the_error_says_why(
    program: Program, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    error = raises(program, [failing.Crash()], blocked)
    assert isinstance(error, PassError)
    assert error.replay is None
    (note,) = error.__notes__
    assert note.startswith("no bundle was written to replay this: the program before it")
    assert "File exists" in note or "Not a directory" in note
    assert blocked.read_text() == "in the way"


def test_a_program_that_no_file_holds_leaves_a_note_and_nothing_else(
    program: Program, tmp_path: Path
) -> None:
    odd = program.clone()
    failing.Unsaveable().run(odd, PassContext())
    error = raises(odd, [failing.Crash()], tmp_path)
    assert "is not to its liking" in str(error)
    assert "no bundle was written" in error.__notes__[0]
    assert "_Odd" in error.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_it_is_filled(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    error = raises(program, [failing.Crash()], tmp_path)
    assert "MiB left, and the program takes" in error.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("planish.passes.debug.bundle_writing.readme", broken)
    error = raises(program, [failing.Crash()], tmp_path)
    assert "No space left on device" in error.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_succeeds_writes_nothing_and_keeps_no_program(
    program: Program, tmp_path: Path
) -> None:
    reproduce = Reproduce(tmp_path / "absent")
    run_pipeline(program, Recipe((SwapActivation(),)), None, [reproduce, *default_instruments()])
    assert not (tmp_path / "absent").exists()
    assert not [v for v in vars(reproduce).values() if isinstance(v, (Program, Step))]


def test_a_pass_that_measures_is_replayed_with_a_clock(tmp_path: Path) -> None:
    class Strict(Instrument):
        def after_pass(self, step: Step, result: PassResult) -> None:
            raise LookupError("not allowed here")

    torch.manual_seed(0)
    program = capture(torch.nn.Linear(64, 64).eval(), (torch.randn(8, 64),))
    latency = Factorize(method="svd", rule="latency")
    raises(program, [latency], tmp_path, Strict(), context=PassContext(timer=TargetTimer("onnx")))
    bundle = load_bundle(bundle_in(tmp_path))
    assert bundle.recipe.passes == (latency,)
    assert replay(bundle) is None  # measured, and nothing fails but the instrument that is not here
