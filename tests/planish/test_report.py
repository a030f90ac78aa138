"""The report of a lossy run: both errors of every pass, and where the accuracy went."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import planish
from planish.accuracy import Loss, ranked, sqnr_text
from planish.ir.compare import Fidelity
from planish.passes.fold.fold_batch_norm import FoldBatchNorm
from planish.passes.steps import NodeError
from planish.report import Report
from tests.support.example_passes import RoundWeights
from tests.support.tiny import conv_bn


@pytest.fixture(scope="module")
def report() -> Report:
    model, inputs, shapes = conv_bn()
    recipe = [RoundWeights(step=1 / 8), FoldBatchNorm(), RoundWeights(step=1 / 64)]
    return planish.optimize(model, inputs, dynamic_shapes=shapes, recipe=recipe).report


@pytest.fixture(scope="module")
def deep() -> Report:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))).eval()
    return planish.optimize(net, torch.randn(3, 4), recipe=[RoundWeights()]).report


def infinite(sqnr: float) -> Fidelity:
    return Fidelity(sqnr, 1.0, 0.0, 0.0, equal=sqnr > 0)


def test_every_pass_tells_local_and_cumulative_error_in_json_and_text(report: Report) -> None:
    facts = json.loads(report.to_json())
    for entry, written in zip(report.passes, facts["passes"], strict=True):
        assert entry.fidelity is not None
        assert entry.cumulative is not None
        assert written["fidelity"] == entry.fidelity.to_dict()
        assert written["cumulative"] == entry.cumulative.to_dict()
        assert written["node_errors"] == [e.to_dict() for e in entry.node_errors]
        assert written["sqnr_db"] == written["fidelity"]["sqnr_db"]
    first, _, last = report.passes
    assert first.fidelity == first.cumulative
    assert last.fidelity != last.cumulative
    line = next(x for x in report.to_text().splitlines() if x.startswith(" round") or "round" in x)
    assert line.split()[5:7] == [sqnr_text(first.fidelity), sqnr_text(first.cumulative)]


def test_the_table_fits_a_hundred_columns_with_and_without_lossy_passes(report: Report) -> None:
    for text in (report.to_text(), report.to_text(all_passes=True)):
        assert max(map(len, text.splitlines())) <= 100
        assert "local" in text
        assert "total" in text
    model, inputs, shapes = conv_bn()
    exact = planish.optimize(model, inputs, dynamic_shapes=shapes).report.to_text(all_passes=True)
    assert max(map(len, exact.splitlines())) <= 100
    assert "SQNR dB" in exact
    assert "where the accuracy went" not in exact


def test_changes_of_lossy_passes_carry_their_own_error(report: Report) -> None:
    changes = json.loads(report.to_json())["passes"][0]["changes"]
    by_site = {e.site: e.own for e in report.passes[0].node_errors}
    for change in changes:
        expected = by_site[change["number"]].to_dict()
        assert change["error"] == {k: expected[k] for k in ("sqnr_db", "rel_l2")}
    # The norm's mean and deviation are whole numbers: rounding them changed nothing.
    assert {"sqnr_db": None, "rel_l2": 0.0} in [c["error"] for c in changes]


def test_all_passes_are_ranked_together_worst_own_error_first(report: Report) -> None:
    losses = ranked(report.passes)
    assert {loss.step for loss in losses} == {1, 3}
    own = [loss.error.own.sqnr_db for loss in losses]
    assert own == sorted(own)
    assert len(losses) == sum(len(p.node_errors) for p in report.passes)
    assert json.loads(report.to_json())["accuracy"] == [loss.to_dict() for loss in losses]


def test_the_text_shows_the_ten_worst_and_how_many_more(deep: Report) -> None:
    text = deep.to_text()
    table = text[text.index("where the accuracy went") :]
    losses = ranked(deep.passes)
    assert len(losses) == 16
    assert "6 more rewritten values; the JSON report has all" in table
    rows = [line.split() for line in table.splitlines() if line.split()[:1] == ["round-weights"]]
    assert len(rows) == 10
    for row, loss in zip(rows, losses, strict=False):
        error = loss.error
        assert row[:3] == ["round-weights", "round", error.node]
        shown = [sqnr_text(f) for f in (error.own, error.local, error.cumulative)]
        assert row[3:6] == shown
        assert error.constant is not None
        assert error.constant in table


def test_names_and_source_lines_are_shown_as_they_are(deep: Report) -> None:
    error = replace(
        deep.passes[0].node_errors[0],
        own=infinite(-math.inf),
        cumulative=None,
        source="/home/me/[bold]/net.py:100: y = x[0] :smile:",
        constant="a.very.long.dotted.name.of.some.weight",
    )
    entry = replace(deep.passes[0], node_errors=(error,))
    text = replace(deep, passes=(entry,)).to_text(width=140)
    assert "net.py:100: y = x[0] :smile:" in text
    assert "...ted.name.of.some.weight" in text
    row = next(line for line in text.splitlines() if "net.py:100" in line)
    assert row.split()[3] == "-inf"
    assert row.split()[5] == "-"


def test_a_narrow_table_cuts_the_source_line_and_no_name(deep: Report) -> None:
    errors = [
        replace(e, source="/home/me/net.py:100: y = torch.relu(x) + some(other, thing)")
        for e in deep.passes[0].node_errors
    ]
    text = replace(deep, passes=(replace(deep.passes[0], node_errors=tuple(errors)),)).to_text(
        width=70
    )
    table = text[text.index("where the accuracy went") :].splitlines()
    rows = [line.split() for line in table if line.split()[:1] == ["round-weights"]]
    nodes = [loss.error.node for loss in ranked(deep.passes)][:10]
    assert [row[:3] for row in rows] == [["round-weights", "round", node] for node in nodes]
    assert all(row[6].startswith("net") for row in rows)
    assert any("…" in line for line in table)
    assert max(map(len, table)) <= 70


def test_broken_values_come_first_and_equal_ones_last(deep: Report) -> None:
    (one, two, three) = deep.passes[0].node_errors[:3]
    errors: tuple[NodeError, ...] = (
        replace(one, own=infinite(math.inf)),
        replace(two, own=replace(two.own, sqnr_db=20.0)),
        replace(three, own=infinite(-math.inf)),
    )
    found = ranked((replace(deep.passes[0], node_errors=errors),))
    assert [loss.error for loss in found] == [errors[2], errors[1], errors[0]]
    assert isinstance(found[0], Loss)
    assert [sqnr_text(loss.error.own) for loss in found] == ["-inf", "20.0", "equal"]
    assert sqnr_text(None) == "-"
