"""Which layer gives up how much, on curves whose answer is known or can be searched for."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import MisusedPassError
from planish.passes.sparsify.allocation import Curve, allocate, least_harm


def curve(name: str, *errors: float, step: int = 10, unit: int = 1) -> Curve:
    """Zeros in even steps; what is left of 10 steps can never go."""
    points = [(step * place, error) for place, error in enumerate((0.0, *errors))]
    return Curve(name, 10 * step, unit, tuple(points))


def test_the_cheaper_segments_go_first_and_the_last_one_in_part() -> None:
    flat, steep = curve("flat", 1, 2, 3), curve("steep", 5, 30, 90)
    # by error: flat 1 1 1, steep 5 25 60; of 200 entries 35 go: three of flat, half of steep's
    assert allocate([steep, flat], 0.175) == {"steep": 5, "flat": 30}


def test_equal_curves_share_alike_where_the_error_bends() -> None:
    curves = [curve(name, 1, 4, 9, 16) for name in "abc"]
    assert allocate(curves, 0.2) == {"a": 20, "b": 20, "c": 20}


def test_a_point_above_the_hull_is_passed_over() -> None:
    bump = curve("bump", 9, 10, 30)  # 9 for the first step, 10 for both: 5 each on the hull
    assert bump.hull() == [(0, 0.0), (20, 10.0), (30, 30.0)]
    assert bump.error(10) == 5
    assert bump.error(25) == 20
    even = curve("even", 6, 12, 18)
    assert allocate([bump, even], 0.1) == {"bump": 20, "even": 0}


def test_an_error_that_falls_is_a_segment_like_others() -> None:
    odd = curve("odd", 3, 1, 8)
    assert odd.hull() == [(0, 0.0), (20, 1.0), (30, 8.0)]


def test_zeros_are_whole_units_and_what_is_left_goes_to_smaller_ones() -> None:
    blocks = Curve("blocks", 160, 16, ((0, 0.0), (96, 1.0)))
    free = Curve("free", 100, 1, ((0, 0.0), (90, 50.0)))
    found = allocate([blocks, free], 0.2)  # 52 of 260
    assert found == {"blocks": 48, "free": 4}


def test_bounds_are_kept() -> None:
    cheap = Curve("cheap", 100, 1, ((20, 0.0), (60, 0.1)))
    dear = Curve("dear", 100, 1, ((20, 5.0), (60, 50.0)))
    assert allocate([cheap, dear], 0.5) == {"cheap": 60, "dear": 40}
    with pytest.raises(MisusedPassError, match=r"nearest is 0\.6000.* gives up most"):
        allocate([cheap, dear], 0.7)
    with pytest.raises(MisusedPassError, match=r"nearest is 0\.2000.* gives up least"):
        allocate([cheap, dear], 0.1)


SLOPES = st.lists(st.floats(0, 100), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(SLOPES, min_size=1, max_size=4), st.integers(0, 12))
def test_no_other_choice_of_steps_is_better_on_convex_curves(
    drawn: list[list[float]], steps: int
) -> None:
    curves = []
    for number, slopes in enumerate(drawn):
        low, mid, high = sorted(slopes)
        curves.append(curve(str(number), low, low + mid, low + mid + high))
    steps = min(steps, 3 * len(curves))
    ratio = steps / (10 * len(curves))
    found = allocate(curves, ratio)
    assert sum(found.values()) == 10 * steps
    reached = sum(c.error(found[c.name]) for c in curves)
    best = min(
        sum(c.points[k][1] for c, k in zip(curves, chosen, strict=True))
        for chosen in product(range(4), repeat=len(curves))
        if sum(chosen) == steps
    )
    assert reached <= best + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(SLOPES, st.sampled_from([1, 4, 16])), min_size=1, max_size=5),
    st.floats(0, 0.3),
)
def test_the_budget_is_spent_to_the_last_whole_unit(
    drawn: list[tuple[list[float], int]], ratio: float
) -> None:
    curves = [
        curve(str(n), *errors, step=16 * (n + 1), unit=unit)
        for n, (errors, unit) in enumerate(drawn)
    ]
    found = allocate(curves, ratio)
    target = int(sum(c.numel for c in curves) * ratio + 1e-9)
    left = target - sum(found.values())
    assert left >= 0
    for c in curves:
        assert found[c.name] % c.unit == 0
        assert 0 <= found[c.name] <= c.points[-1][0]
        assert left < c.unit or found[c.name] == c.points[-1][0]
    assert found == allocate(curves, ratio)


def test_the_layers_of_least_harm_get_the_pattern() -> None:
    zeros = {"a": 50, "b": 50, "c": 50}
    errors = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert least_harm(zeros, errors, 300, 1 / 6) == ("b",)
    assert least_harm(zeros, errors, 300, 0.2) == ("b", "c")
    assert least_harm(zeros, errors, 300, 0.5) == ("a", "b", "c")
    with pytest.raises(MisusedPassError, match=r"in every one of them gives 0\.5000"):
        least_harm(zeros, errors, 300, 0.6)


def test_a_small_layer_that_a_large_one_makes_needless_stays_dense() -> None:
    zeros = {"small": 10, "large": 90}
    assert least_harm(zeros, {"small": 0.1, "large": 9.0}, 200, 0.45) == ("large",)


def test_a_large_layer_is_no_answer_where_a_small_one_is_enough() -> None:
    zeros = {"first": 90, "large": 90, "small": 20}
    errors = {"first": 1.0, "large": 9.0, "small": 3.0}  # per weight large is the cheaper one
    assert least_harm(zeros, errors, 400, 0.27) == ("first", "small")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=7), st.floats(0.01, 0.5))
def test_of_equal_layers_the_choice_is_the_best_there_is(drawn: list[float], ratio: float) -> None:
    names = [str(n) for n in range(len(drawn))]
    zeros, errors = dict.fromkeys(names, 8), dict(zip(names, drawn, strict=True))
    numel = 16 * len(names)
    chosen = least_harm(zeros, errors, numel, ratio)
    assert 8 * len(chosen) >= ratio * numel * (1 - 1e-6)
    others = (
        sum(errors[n] for n in subset)
        for count in range(len(names) + 1)
        for subset in combinations(names, count)
        if 8 * count >= ratio * numel
    )
    assert sum(errors[n] for n in chosen) <= min(others) + 1e-9
