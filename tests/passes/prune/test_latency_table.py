"""A piecewise linear table fitted to what a timer says of small programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from planish.ir.cost import cost
from planish.ir.program import Program
from planish.passes.prune.latency_table import Shape, Table, fit, measure, points, small_program


def test_known_answer() -> None:
    found = fit(dict(enumerate([1, 1, 1, 1.5, 2, 2.5], 1)))
    assert found == Table(3, 1.0, 0.5, 0.0)
    assert [found(n) for n in (0, 1, 3, 6)] == [0.0, 1.0, 1.0, 2.5]


def test_flat_and_falling_times_have_no_slope() -> None:
    assert fit({1: 2.0, 2: 2.0, 4: 2.0}).slope == 0.0
    assert fit({1: 3.0, 2: 2.0, 4: 1.0}).slope == 0.0


def test_one_measurement() -> None:
    assert fit({4: 2.0}) == Table(4, 2.0, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        fit({})


def test_a_line_from_the_start() -> None:
    found = fit({n: 1.0 + 0.25 * n for n in (1, 10, 20, 40)})
    assert found.flat == 1
    assert found(40) == pytest.approx(11.0)


def test_points_have_both_ends() -> None:
    assert points(12) == list(range(1, 13))
    many = points(1536)
    assert (many[0], many[-1]) == (1, 1536)
    assert len(many) < 12


class MacsTimer:
    """A timer for which a multiply-accumulate takes a microsecond."""

    def __init__(self) -> None:
        self.asked = 0

    def seconds(self, programs: Sequence[tuple[Program, Sequence[Any]]]) -> list[float]:
        """By the cost of each."""
        self.asked += len(programs)
        return [1e-6 * cost(program).macs for program, _ in programs]


def test_tables_of_what_is_measured() -> None:
    neurons = Shape("neurons", 32, (2, 5, 8), 8)
    heads = Shape("heads", 4, (2, 5, 8), 8, width=2)
    timer = MacsTimer()
    found = measure([neurons, heads, Shape("neurons", 32, (2, 5, 8), 8)], timer)
    assert timer.asked == len(points(32)) + 4  # equal shapes once
    assert found[neurons].slope == pytest.approx(1e-6 * 2 * 10 * 8)
    macs = 4 * 10 * 8 * 2 + 2 * 2 * 5 * 5 * 2  # projections, and two products of attention
    assert found[heads].slope == pytest.approx(1e-6 * macs)


def test_small_programs_run() -> None:
    for shape in (Shape("neurons", 6, (2, 3, 8), 4), Shape("heads", 3, (2, 3, 8), 4, width=5)):
        program, (x,) = small_program(shape, 2)
        assert program(x).shape == (2, 3, 4)
