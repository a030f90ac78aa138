"""The search alone, on simulated states: it finds the flip, and never looks too often."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.passes.debug.bisect_search import Found, budget, search


def run(bad: list[bool], known: dict[int, bool], *, exhaustive: bool = False) -> Found:
    """Search states 0 to N; ``bad[i]`` is the verdict of state i."""
    return search(len(bad) - 1, lambda point: bad[point], known=known, exhaustive=exhaustive)


def monotone(points: int, flip: int | None) -> list[bool]:
    return [flip is not None and point >= flip for point in range(points + 1)]


@pytest.mark.parametrize("points", range(1, 70))
def test_every_flip_is_found_within_the_budget(points: int) -> None:
    allowed = math.ceil(math.log2(points)) + 1
    assert budget(points) == allowed
    for flip in range(1, points + 1):
        for known in ({0: False}, {points: True}, {0: False, points: True}):
            found = run(monotone(points, flip), known)
            assert found.at == flip
            assert found.monotone
            assert len(found.asked) <= allowed
            assert len({point for point, _ in found.asked}) == len(found.asked)


@pytest.mark.parametrize("points", range(1, 70))
def test_a_row_that_is_bad_from_the_start_says_so(points: int) -> None:
    found = run(monotone(points, 0), {points: True})
    assert found.at == 0
    assert len(found.asked) <= budget(points)


@pytest.mark.parametrize("points", range(41))
def test_nothing_bad_is_found_where_nothing_is(points: int) -> None:
    found = run(monotone(points, None), {0: False})
    assert found.at is None
    assert found.monotone
    assert len(found.asked) <= budget(points)


rows = st.lists(st.booleans(), min_size=1, max_size=70)


@given(rows)
def test_whatever_is_found_is_a_flip(row: list[bool]) -> None:
    bad = [False, *row]
    found = run(bad, {0: False})
    assert len(found.asked) <= budget(len(row))
    assert all(bad[point] == verdict for point, verdict in found.asked)
    if found.at is None:
        assert not bad[-1]
    else:
        assert bad[found.at]
        assert not bad[found.at - 1]
        contrary = {p for p, verdict in found.asked if verdict != (p >= found.at)}
        assert set(found.against) == contrary
        if not bad[-1]:
            assert len(row) in found.against


@given(rows)
def test_looking_at_everything_finds_the_first_flip(row: list[bool]) -> None:
    bad = [False, *row]
    found = run(bad, {0: False}, exhaustive=True)
    assert found.at == next((p for p, verdict in enumerate(bad) if verdict), None)
    assert len(found.asked) == len(row)
    if found.at is not None:
        assert found.monotone == all(bad[found.at :])
        assert found.against == tuple(p for p in range(found.at, len(bad)) if not bad[p])


def test_the_last_state_is_looked_at_first() -> None:
    assert run(monotone(20, 7), {0: False}).asked[0] == (20, True)


def test_a_good_end_does_not_hide_a_bad_middle() -> None:
    bad = [False] * 8 + [True] * 8 + [False] * 17  # 32 states
    found = run(bad, {0: False})
    assert found.at == 8
    assert not found.monotone
    assert 32 in found.against


def test_what_is_left_goes_far_from_the_answer() -> None:
    bad = monotone(9, 9)
    bad[1] = True
    found = run(bad, {9: True})  # the end is free, so there is one look to spare
    assert found.at == 9
    assert found.against == (1,)
    assert not found.monotone


def test_an_end_must_be_known() -> None:
    with pytest.raises(ValueError, match="neither end is known"):
        run([False, True], {})
