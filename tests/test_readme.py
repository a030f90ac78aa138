"""The README is a promise: its code runs, its commands exist, its tables are true."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from planish.backends.registry import BACKENDS
from planish.tools.catalogue import insert
from planish.tools.cli import COMMANDS, main
from tests.support.real_models import loaded
from tests.support.repository import ROOT
from tests.support.walkthrough import BUNDLE, failed_bundle

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "readme"}
    first, second, smaller, third = blocks("python")
    exec(compile(first, "README.md", "exec"), space)
    assert tuple(space["logits"].shape) == (5, 10)  # type: ignore[attr-defined]
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert "fold-batch-norm" in capsys.readouterr().out
    exec(compile(second, "README.md", "exec"), space)
    assert "{'head.weight': SparseLayout(n=2, m=4, axis=1" in capsys.readouterr().out
    exec(compile(smaller, "README.md", "exec"), space)
    assert "factorize-weight" in capsys.readouterr().out
    exec(compile(third, "README.md", "exec"), space)
    assert capsys.readouterr().out.count("aten.relu") == 1


def test_console_commands_run_on_the_pretrained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded("minilm")  # skips where the package is missing
    from planish.tools.demo import model_folder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").symlink_to(model_folder())
    monkeypatch.syspath_prepend(str(tmp_path))
    bundle = failed_bundle(tmp_path)
    for line in "".join(blocks("console")).splitlines():
        command = shlex.split(line.removeprefix("$ ").replace(BUNDLE, bundle))
        assert command[0] == "planish"
        extra = ["--rounds", "3"] if command[1] == "bench" else []
        monkeypatch.setattr(sys, "argv", [*command, *extra])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        expected = 1 if command[1] == "diff" else 0  # like diff(1): there is a difference
        assert (stopped.value.code or 0) == expected, (line, captured.err[-500:])
        assert captured.out


def test_shows_every_command() -> None:
    lines = "".join(blocks("console")).splitlines()
    assert {line.split()[2] for line in lines} == set(COMMANDS)


def test_pass_table_is_up_to_date() -> None:
    assert insert(README) == README, "run: python -m planish.tools.catalogue README.md"


def test_target_table_is_complete() -> None:
    section = README.split("## Targets")[1].split("##")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", section, re.M)) == set(BACKENDS)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{name}:", makefile, re.M), name


def test_modules_that_are_run_exist() -> None:
    for name in re.findall(r"python -m planish\.([\w.]+)", README):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
