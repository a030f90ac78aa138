"""The recipe `exact`: it comes to rest, and its work grows with the nodes."""

from typing import Any

import pytest

from planish.ir import Program, text
from planish.passes.base import Contract
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.scaling import KINDS, build, count_calls, measure, table

EXACT = Recipe.parse("exact")


def test_exact_holds_exact_passes_only() -> None:
    assert {pass_.contract for pass_ in EXACT.passes} == {Contract.EXACT}
    assert all(not pass_.requires for pass_ in EXACT.passes)


@pytest.fixture(scope="module", params=list(KINDS))
def small(request: pytest.FixtureRequest) -> Program:
    return build(request.param, 40)


def test_a_second_run_of_exact_changes_nothing(small: Program) -> None:
    first = run_pipeline(small, EXACT, instruments=default_instruments())
    assert any(record.changed for record in first.records)
    again = run_pipeline(first.program, EXACT)
    assert [(r.name, len(r.changes)) for r in again.records if r.changed] == []
    assert again.program is first.program


def test_two_runs_of_exact_agree_in_every_character(small: Program) -> None:
    first, second = (run_pipeline(small, EXACT) for _ in range(2))
    assert text(first.program, values=True) == text(second.program, values=True)
    assert [r.changes for r in first.records] == [r.changes for r in second.records]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_work_of_exact_is_linear_in_nodes(kind: str) -> None:
    small, large = build(kind, 300), build(kind, 1200)
    count_calls(small, EXACT)  # imports and caches are paid here
    per_node = [count_calls(p, EXACT) / len(p.graph.nodes) for p in (small, large)]
    assert per_node[1] < 1.05 * per_node[0]
    # 540 to 680 today, which is 0.12 to 0.14 ms a node; twice that would be felt.
    assert per_node[1] < 1000


def test_the_curve_is_printed_with_its_growth() -> None:
    small = measure("mlp", 40, EXACT, 1, None)
    large: Any = measure("mlp", 80, EXACT, 1, small)
    assert large.exponent is not None
    assert large.nodes > small.nodes
    lines = table([small, large]).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["mlp", str(small.nodes)],
        ["mlp", str(large.nodes)],
    ]
    assert lines[3] == f"at {large.nodes} nodes, by wall time:"
