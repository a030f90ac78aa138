"""``planish diff`` as a user types it: what it prints, in which form, and its exit codes."""

from __future__ import annotations

import io
import json
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

import planish.tools.diff
from planish.ir import capture, load, save
from planish.ir.textdiff import compare
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from tests.support.command import Call
from tests.support.tiny import conv_bn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a.pt2``, ``b.pt2`` without its dropout and ``c.pt2`` with its batch norm folded."""
    path = tmp_path_factory.mktemp("programs")
    model, example, shapes = conv_bn()
    program = capture(model, example, dynamic_shapes=shapes)
    save(program, path / "a.pt2")
    for name, recipe in (("b", "remove-identities"), ("c", "fold-batch-norm")):
        save(run_pipeline(program, Recipe.parse(recipe)).program, path / f"{name}.pt2")
    return path


def test_one_operator_less_is_two_lines(
    planish_: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    code, out, err = planish_("diff", "a.pt2", "b.pt2", "--quiet", "--context", "1")
    assert (code, err) == (1, "")
    expected = """
        --- a.pt2
        +++ b.pt2
        @@ -10,3 +10,2 @@
           %2: f32[batch, 8, 6, 6] = aten.relu(%1)
        -  %3: f32[batch, 8, 6, 6] = aten.dropout(%2, p=0.5, train=False)
        -  return %3
        +  return %2
        """
    assert out == textwrap.dedent(expected).lstrip()


def test_equal_programs_print_nothing_and_exit_with_0(planish_: Call, folder: Path) -> None:
    path = str(folder / "a.pt2")
    assert planish_("diff", path, path, "--quiet") == (0, "", "")
    assert planish_("diff", path, path, "--quiet", "--side-by-side") == (0, "", "")
    code, out, _ = planish_("diff", path, path, "--quiet", "--full")
    assert code == 0
    assert "aten.conv2d" in out
    assert not [line for line in out.splitlines()[2:] if line[0] in "+-"]
    # A module is captured first; its constants are another's, with the same values.
    assert planish_("diff", "tests.support.tiny:conv_bn", path, "--quiet") == (0, "", "")


def test_constants_of_other_values_show_a_digest(planish_: Call, folder: Path) -> None:
    _, out, _ = planish_("diff", str(folder / "a.pt2"), str(folder / "c.pt2"), "--quiet")
    marked = [line for line in out.splitlines() if "@conv.weight: " in line]
    assert [line[:41] for line in marked] == [
        "-  const @conv.weight: f32[8, 3, 3, 3] = ",
        "+  const @conv.weight: f32[8, 3, 3, 3] = ",
    ]
    assert marked[0][1:] != marked[1][1:]
    assert "-  const @bn.weight: f32[8]\n" in out


def test_all_lines_are_shown_when_asked_for(planish_: Call, folder: Path) -> None:
    pair = (str(folder / "a.pt2"), str(folder / "b.pt2"))
    _, out, _ = planish_("diff", *pair, "--quiet", "--full")
    assert out.count("\n") == 3 + 13
    assert "@@ -1,12 +1,11 @@" in out


@pytest.mark.parametrize("columns", [60, 100, 160])
def test_two_columns_fit_the_terminal(
    columns: int, planish_: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    pair = (str(folder / "a.pt2"), str(folder / "b.pt2"))
    code, out, _ = planish_("diff", *pair, "--quiet", "--side-by-side", "--context", "1")
    rows = out.splitlines()[2:]
    width = (columns - 3) // 2
    assert code == 1
    assert max(map(len, rows)) <= columns
    assert {row[width : width + 3].strip() for row in rows} == {"", "<", "|"}
    left = " ".join(row[:width].strip() for row in rows)
    right = " ".join(row[width + 3 :].strip() for row in rows)
    assert left == (
        "%2: f32[batch, 8, 6, 6] = aten.relu(%1) "
        "%3: f32[batch, 8, 6, 6] = aten.dropout(%2, p=0.5, train=False) return %3"
    )
    assert " ".join(right.split()) == "%2: f32[batch, 8, 6, 6] = aten.relu(%1) return %2"


@pytest.mark.parametrize("columns", ["", "0", "-3", "wide"])
def test_what_is_no_width_counts_as_none_given(
    columns: str, planish_: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("diff", str(folder / "a.pt2"), str(folder / "b.pt2"), "--quiet", "--side-by-side")
    monkeypatch.delenv("COLUMNS", raising=False)
    expected = planish_(*arguments)
    assert expected[0] == 1
    assert "aten.relu" in expected[1]
    monkeypatch.setenv("COLUMNS", columns)
    assert planish_(*arguments) == expected


def test_json_lists_every_line_with_its_status(planish_: Call, folder: Path) -> None:
    pair = (str(folder / "a.pt2"), str(folder / "b.pt2"))
    code, out, _ = planish_("diff", *pair, "--quiet", "--json")
    facts = json.loads(out)
    assert (code, facts["equal"]) == (1, False)
    assert facts["counts"] == {"same": 10, "changed": 1, "added": 0, "removed": 1}
    assert facts["entries"][-2:] == [
        {
            "status": "removed",
            "before": "  %3: f32[batch, 8, 6, 6] = aten.dropout(%2, p=0.5, train=False)",
            "after": None,
            "node_before": "dropout",
            "node_after": None,
            "moved": False,
        },
        {
            "status": "changed",
            "before": "  return %3",
            "after": "  return %2",
            "node_before": None,
            "node_after": None,
            "moved": False,
        },
    ]


def test_color_is_for_terminals(
    planish_: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = (str(folder / "a.pt2"), str(folder / "b.pt2"))
    for option in ((), ("--side-by-side",)):
        _, out, _ = planish_("diff", *pair, "--quiet", *option)
        assert "\x1b" not in out
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr(planish.tools.diff, "stdout", lambda: terminal)
    found = compare(load(pair[0]), load(pair[1]))
    planish.tools.diff.print_unified(found, 0, pair)
    planish.tools.diff.print_columns(found, 0, pair)
    printed = stream.getvalue()
    assert "\x1b[31m-  return %3\x1b[0m" in printed
    assert "\x1b[32m+  return %2\x1b[0m" in printed
    assert "\x1b[32m  return %2\x1b[0m" in printed


def test_wrong_calls_are_refused(planish_: Call, folder: Path) -> None:
    path = str(folder / "a.pt2")
    for arguments, fragment, expected in (
        ((path,), "B", 2),
        ((path, "missing.pt2"), "missing.pt2", 2),
        ((path, path, "--context", "-1"), "not in the range", 2),
        ((path, "model.onnx"), ".onnx file; a model is needed", 2),
        ((path, "tests.support.tiny:branch"), "control flow depends on values", 4),
    ):
        code, out, err = planish_("diff", *arguments)
        assert (code, out) == (expected, "")
        assert fragment in err
