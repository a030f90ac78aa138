"""Dumps: a numbered text and a program that runs after every pass, and no harm to other files."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from planish.ir import Program, capture, text
from planish.ir.errors import PassError, UsageError, VerificationError
from planish.ir.files import load
from planish.passes.base import Pass, PassResult
from planish.passes.instruments import Dump, Instrument, default_instruments
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe
from tests.support.example_passes import Everything, SwapActivation, calling


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


@pytest.fixture(scope="module")
def program() -> Program:
    batch = torch.export.Dim("batch")
    return capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: batch}})


def run(program: Program, *passes: Pass, instruments: Sequence[Instrument]) -> Run:
    return run_pipeline(program, Recipe(passes), None, instruments)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_dump_holds_text_and_a_program_that_runs_after_every_pass(
    program: Program, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "dump"
    instruments = default_instruments(dump_dir=folder)
    found = run(program, Everything(), SwapActivation(), instruments=instruments)
    stems = ["000_capture", "001_everything", "002_swap-activation"]
    assert names(folder) == sorted(f"{s}.{e}" for s in stems for e in ("pt2", "txt"))
    for stem, expected in zip(stems, (program, program, found.program), strict=True):
        assert (folder / f"{stem}.txt").read_text() == text(expected)
        loaded = load(folder / f"{stem}.pt2")
        assert text(loaded) == text(expected)
        assert torch.equal(loaded(*program.samples[0]), expected(*program.samples[0]))
    # A program that did not change costs no space.
    assert (folder / "001_everything.pt2").stat().st_nlink == 2


def test_a_dump_replaces_an_earlier_one_and_nothing_else(program: Program, tmp_path: Path) -> None:
    dump: list[Instrument] = [Dump(tmp_path, programs=False)]
    run(program, Everything(), SwapActivation(), instruments=dump)
    assert len(names(tmp_path)) == 3
    run(program, SwapActivation(), instruments=dump)
    assert names(tmp_path) == ["000_capture.txt", "001_swap-activation.txt"]
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"files that no dump wrote: mine\.txt"):
        run(program, SwapActivation(), instruments=dump)
    assert names(tmp_path) == ["000_capture.txt", "001_swap-activation.txt", "mine.txt"]


def test_a_dump_keeps_the_text_of_a_rejected_program(program: Program, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        run(
            program,
            SwapActivation(to="gelu"),
            instruments=default_instruments(dump_dir=tmp_path),
        )
    rejected = (tmp_path / "001_swap-activation.failed.txt").read_text()
    assert "aten.gelu" in rejected
    assert names(tmp_path) == [
        "000_capture.pt2",
        "000_capture.txt",
        "001_swap-activation.failed.txt",
    ]


def test_a_dump_of_a_pass_that_returned_nothing_ends_before_it(
    program: Program, tmp_path: Path
) -> None:
    with pytest.raises(PassError):
        run(program, calling(lambda p, c: None), instruments=[Dump(tmp_path, programs=False)])
    assert names(tmp_path) == ["000_capture.txt"]


@pytest.mark.parametrize("kind", ["file", "missing parent that is a file", "damaged list"])
def test_a_folder_that_cannot_be_dumped_into_is_refused(
    program: Program, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "dump"
    if kind == "file":
        folder.write_text("")
    elif kind == "damaged list":
        folder.mkdir()
        (folder / ".planish-dump.json").write_text("{")
    else:
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "dump"
    with pytest.raises(UsageError, match="dump folder"):
        run(program, instruments=[Dump(folder)])


def test_names_of_passes_make_plain_file_names(program: Program, tmp_path: Path) -> None:
    odd = calling(lambda p, c: PassResult(p), name="../odd name")
    run(program, odd, instruments=[Dump(tmp_path, programs=False)])
    assert names(tmp_path) == ["000_capture.txt", "001_.._odd_name.txt"]
