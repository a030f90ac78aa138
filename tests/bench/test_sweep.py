"""The sweep's own machinery: outcomes, limits, crashes, resuming."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from planish.ir.errors import UnsupportedError
from planish.tools.bench import sweep
from planish.tools.bench.sweep_stages import Case, Outcome, Stage, Status, sweep_one
from planish.tools.bench.zoo import ZooEntry, zoo

LINEAR = ZooEntry(
    name="small/test", family="small", build=lambda: torch.nn.Linear(2, 2), inputs=lambda: ((), {})
)


def outcome(name: str, status: Status) -> Outcome:
    return Outcome(name=name, family="small", status=status, seconds={"build": 0.5})


def test_outcome_survives_json() -> None:
    before = Outcome(
        name="a", family="timm", status=Status.BUG, stage="onnx", kind="KeyError", message='"x"\n'
    )
    assert Outcome.from_json(before.to_json()) == before


def raising(error: Exception) -> Stage:
    def run(case: Case) -> None:
        raise error

    return Stage("capture", run)


def test_named_errors_are_told_from_bugs() -> None:
    named = sweep_one(LINEAR, (raising(UnsupportedError("no aten.x")),))
    assert (named.status, named.kind, named.stage) == (Status.ERROR, "UnsupportedError", "capture")
    bug = sweep_one(LINEAR, (raising(KeyError("x")),))
    assert (bug.status, bug.kind) == (Status.BUG, "KeyError")
    assert sweep_one(LINEAR, ()).status is Status.PASS


def test_later_lines_win(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [outcome("a", Status.BUG), outcome("b", Status.PASS), outcome("a", Status.PASS)]
    path.write_text("".join(line.to_json() + "\n" for line in lines))
    assert {n: o.status for n, o in sweep.read_results(path).items()} == {
        "a": Status.PASS,
        "b": Status.PASS,
    }


def test_share() -> None:
    outcomes = [outcome("a", Status.PASS)] * 19 + [outcome("b", Status.ERROR)]
    assert sweep.pass_share(outcomes) == pytest.approx(0.95)
    assert sweep.pass_share([]) == 0.0


def _dies(name: str, result: str, log: str, memory_bytes: int, timeout_seconds: int) -> None:
    Path(log).write_text("last words")
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(name: str, result: str, log: str, memory_bytes: int, timeout_seconds: int) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("body", "message"),
    [(_dies, "ended by SIGKILL; it printed last: last words"), (_hangs, "no result after 1 s")],
)
def test_crash_and_timeout_are_bugs(
    body: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    # Forked, so that the child runs the body that this test put in place.
    monkeypatch.setattr(sweep, "_CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(sweep, "child", body)
    found = sweep.run_entry(LINEAR, tmp_path, timeout_seconds=1, memory_gb=1.0)
    assert (found.status, found.kind) == (Status.BUG, "Crash")
    assert message in found.message


def test_resume_skips_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def run_entry(entry: ZooEntry, *_: object) -> Outcome:
        asked.append(entry.name)
        return outcome(entry.name, Status.PASS)

    monkeypatch.setattr(sweep, "run_entry", run_entry)
    monkeypatch.setattr(sweep, "sweep_dir", lambda: tmp_path)
    names = [entry.name for entry in zoo() if entry.family == "small"]
    recorded = [outcome(names[0], Status.PASS), outcome(names[1], Status.BUG)]
    lines = "".join(o.to_json() + "\n" for o in recorded)
    (tmp_path / "results.jsonl").write_text(lines)
    assert sweep.main(["--family", "small", "--resume"]) == 0
    assert set(asked) == set(names[2:])
    asked.clear()
    assert sweep.main(["--family", "small", "--failed"]) == 0
    assert asked == [names[1]]
    assert "totals" in capsys.readouterr().out
    assert set(sweep.read_results(tmp_path / "results.jsonl")) == set(names)
