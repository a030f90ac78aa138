"""``planish report``: a page of a run or of a saved report, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Call

MODEL = "tests.support.tiny:conv_bn"


def data_of(html: str) -> dict[str, Any]:
    """The JSON that a page carries."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_writes_a_page_of_a_run(planish_: Call, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    code, out, err = planish_("report", MODEL, "--recipe", "fold-batch-norm", "-o", str(path))
    assert code == 0
    assert out.replace("\n", "").startswith(f"wrote {path}: 0.")
    assert "capturing ..." in err
    data = data_of(path.read_text())
    assert data["model"] == "conv_bn (ConvBn)"
    assert [entry["name"] for entry in data["passes"]] == ["fold-batch-norm"]
    assert len(data["passes"][0]["changes"]) == 1
    assert data["runtime"] is None
    assert data["graphs"]["after"]["nodes"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_reads_back_the_runtime_on_wish(planish_: Call, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    recipe = ("--recipe", "fold-batch-norm", "--runtime", "--quiet", "--json")
    code, out, err = planish_("report", MODEL, *recipe, "-o", str(path))
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "path": str(path),
        "bytes": path.stat().st_size,
        "model": "conv_bn (ConvBn)",
    }
    data = json.loads(path.read_text())
    assert sum(data["runtime"]["operators"].values()) > 0
    assert data["totals"]["seconds"]["export"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_saved_report_makes_the_same_page(planish_: Call, tmp_path: Path) -> None:
    saved, page = tmp_path / "run.json", tmp_path / "run.html"
    recipe = ("--recipe", "fold-batch-norm", "--quiet")
    assert planish_("optimize", MODEL, *recipe, "--report", str(saved))[0] == 0
    code, _, err = planish_("report", str(saved), "-o", str(page))
    assert (code, err) == (0, "")
    assert data_of(page.read_text()) == json.loads(saved.read_text())
    assert data_of(page.read_text())["graphs"]["before"]["nodes"]


def test_optimize_writes_the_page(planish_: Call, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    code, out, _ = planish_(
        "optimize", MODEL, "--recipe", "fold-batch-norm", "--report", str(path), "--json", "--quiet"
    )
    assert code == 0
    shown = data_of(path.read_text())
    assert shown["passes"] == json.loads(out)["passes"]
    assert shown["graphs"]


def test_the_table_is_a_form_too(planish_: Call, tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    recipe = ("--recipe", "fold-batch-norm", "--quiet")
    assert planish_("report", MODEL, *recipe, "-o", str(path))[0] == 0
    assert "fold-batch-norm" in path.read_text()
    assert "<" not in path.read_text()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{", "is no JSON report"),
        ('{"passes": [], "seed": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "is no JSON report"),
        ("[]", "this is a list, not a report"),
        ("{}", "the report has no usable 'passes': it is missing"),
        ('{"passes": 3}', "the report has no usable 'passes': it is int"),
    ],
)
def test_what_is_no_report_is_refused(
    planish_: Call, tmp_path: Path, content: str, wrong: str
) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(content)
    code, out, err = planish_("report", str(saved), "-o", str(tmp_path / "out.html"))
    assert (code, out) == (2, "")
    assert wrong in err
    assert [p.name for p in tmp_path.iterdir()] == ["saved.json"]


def test_a_pass_that_is_no_pass_is_refused(planish_: Call, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    recipe = ("--recipe", "fold-batch-norm", "--quiet")
    assert planish_("optimize", MODEL, *recipe, "--report", str(saved))[0] == 0
    data = json.loads(saved.read_text())
    for spoil, wrong in (
        (lambda d: d["passes"][0].pop("bytes"), "pass 1 of the report has no usable 'bytes'"),
        (lambda d: d["passes"].append(3), "pass 2 of the report is a int"),
        (lambda d: d["totals"].pop("before"), "the totals of the report have no 'before'"),
    ):
        spoiled = json.loads(json.dumps(data))
        spoil(spoiled)
        saved.write_text(json.dumps(spoiled))
        code, _, err = planish_("report", str(saved), "-o", str(tmp_path / "out.html"))
        assert code == 2
        assert wrong in err


def test_odd_calls_are_refused(planish_: Call, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text("{}")
    page = str(tmp_path / "out.html")
    for arguments, wrong in (
        (("report", MODEL, "-o", str(tmp_path / "r.pdf")), "a report cannot be written as"),
        (("report", MODEL, "-o", str(tmp_path / "none" / "r.html")), "does not exist"),
        (("optimize", MODEL, "--report", str(tmp_path / "r.pdf")), "a report cannot be written as"),
        (("optimize", MODEL, "--report", str(tmp_path / "none" / "r.html")), "does not exist"),
        (("report", MODEL, "-o", page, "--recipe", "fold-batchnorm"), "fold-batch-norm"),
        (("report", MODEL, "-o", page, "--target", "toaster"), "toaster"),
        (("report", str(tmp_path / "gone.json"), "-o", page), "cannot read"),
        (("report", str(saved), "-o", page, "--seed", "3", "--runtime"), "--runtime, --seed"),
    ):
        code, out, err = planish_(*arguments)
        assert (code, out) == (2, ""), arguments
        assert wrong in err, arguments
    assert [p.name for p in tmp_path.iterdir()] == ["saved.json"]


def test_a_saved_report_becomes_a_page_only(planish_: Call, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    recipe = ("--recipe", "fold-batch-norm", "--quiet")
    assert planish_("report", MODEL, *recipe, "-o", str(saved))[0] == 0
    code, _, err = planish_("report", str(saved), "-o", str(tmp_path / "out.txt"))
    assert code == 2
    assert "can be drawn as a page only" in err
