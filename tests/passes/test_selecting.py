"""Instruments that choose what runs: what they leave out, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir import Program, capture
from planish.ir.errors import UsageError
from planish.passes.base import Pass
from planish.passes.instruments import (
    DisablePass,
    ExcludeSites,
    Instrument,
    SiteLimit,
    StartFrom,
    StopAfter,
)
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.selecting import check_selection
from tests.support.example_passes import Everything, RoundWeights, SwapActivation, calling

# 1 everything, 2 swap-activation, 3 everything{count=2}, 4 round-weights
PASSES = (Everything(), SwapActivation(), Everything(count=2), RoundWeights())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(torch.relu(x)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(3, 4),))


def run(program: Program, *instruments: Instrument, passes: tuple[Pass, ...] = PASSES) -> Run:
    return run_pipeline(program, Recipe(passes), None, instruments)


def ran(found: Run) -> list[int]:
    return [record.index for record in found.records if record.ran]


def sites(found: Run) -> list[tuple[int, str, str]]:
    return [(c.number, c.rule, c.node) for record in found.records for c in record.changes]


@pytest.mark.parametrize(
    ("instruments", "expected"),
    [
        ([StopAfter("swap-activation")], [1, 2]),
        ([StopAfter(3)], [1, 2, 3]),
        ([StartFrom("swap-activation")], [2, 3, 4]),
        ([StartFrom("4")], [4]),
        ([StartFrom(2), StopAfter(3)], [2, 3]),
        ([StartFrom(3), StopAfter(3)], [3]),
        ([DisablePass("everything")], [2, 4]),
        ([DisablePass(["round-weights", 1])], [2, 3]),
        ([DisablePass([1, 2, 3, 4])], []),
        # A name that stands twice: all from the first on, and all up to the last.
        ([StartFrom("everything")], [1, 2, 3, 4]),
        ([StopAfter("everything")], [1, 2, 3]),
        # The text of a step tells apart what has one name.
        ([StopAfter("tests.support.example_passes:Everything")], [1]),
        ([DisablePass(["tests.support.example_passes:Everything{count=2}"])], [1, 2, 4]),
    ],
)
def test_what_runs(program: Program, instruments: list[Instrument], expected: list[int]) -> None:
    found = run(program, *instruments)
    assert ran(found) == expected
    for record in found.records:
        if not record.ran:
            assert (record.changes, record.changed, record.seconds) == ((), False, 0.0)


def test_a_name_that_stands_twice_is_remarked(program: Program) -> None:
    (remark,) = run(program, StopAfter("everything")).records[2].remarks
    assert remark == "it stands at steps 1, 3; stop-after took step 3"
    (remark,) = run(program, StartFrom("everything")).records[0].remarks
    assert remark == "it stands at steps 1, 3; start-from took step 1"


@pytest.mark.parametrize(
    ("instrument", "what"),
    [
        (StopAfter("swap-activatoin"), "stop-after names 'swap-activatoin'"),
        (StartFrom("swap-activatoin"), "start-from names 'swap-activatoin'"),
        (DisablePass(["everything", "swap-activatoin"]), "disable-pass names 'swap-activatoin'"),
    ],
)
def test_an_unknown_pass_names_the_nearest(
    program: Program, instrument: Instrument, what: str
) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        run(program, instrument)
    assert caught.value.hint == "did you mean 'swap-activation'?"


def test_numbers_beyond_the_recipe_and_empty_recipes_are_refused(program: Program) -> None:
    for number in (0, 5):
        with pytest.raises(UsageError, match=f"'{number}'.*no such pass") as caught:
            run(program, StopAfter(number))
        hint = "it has steps 1 to 4: everything, swap-activation, round-weights"
        assert caught.value.hint == hint
    with pytest.raises(UsageError) as caught:
        run(program, DisablePass("everything"), passes=())
    assert caught.value.hint == "it has no passes at all"


def test_a_start_behind_the_stop_is_refused_before_anything_runs(program: Program) -> None:
    called: list[int] = []
    spy = calling(lambda p, c: called.append(1))
    with pytest.raises(UsageError, match="no pass was left to run: stop-after chose step 1 of 2"):
        run(program, StartFrom(2), StopAfter(1), passes=(spy, spy))
    assert not called
    recipe = Recipe(PASSES)
    with pytest.raises(UsageError, match=r"start from 4, step 4, and stop after 'swap-.*step 2"):
        check_selection(recipe, start_from=4, stop_after="swap-activation")
    check_selection(recipe, start_from=2, stop_after="swap-activation", disable=["everything"])
    with pytest.raises(UsageError, match="disable-pass names 'x'"):
        check_selection(recipe, disable=["x"])


def test_a_limit_rewrites_the_first_sites_of_the_whole_run(program: Program) -> None:
    every = sites(run(program))
    assert every == [
        (1, "relu-to-clamp", "relu"),
        (2, "relu-to-clamp", "relu_1"),
        (3, "round", "p_linear_weight"),
    ]
    for limit in range(4):
        assert sites(run(program, SiteLimit(limit))) == every[:limit]


@pytest.mark.parametrize(
    ("limit", "step", "remark"),
    [
        (0, 1, "the limit of rewrite sites is 0: all 3 were denied"),
        (1, 2, "the limit of 1 rewrite sites denied 2; the last done is 1, relu-to-clamp@relu"),
        (2, 2, "the limit of 2 rewrite sites denied 1; the last done is 2, relu-to-clamp@relu_1"),
        (3, 4, "the limit of 3 rewrite sites denied none of 3"),
        (9, 4, "the limit of 9 rewrite sites denied none of 3"),
    ],
)
def test_a_limit_says_where_it_cut(program: Program, limit: int, step: int, remark: str) -> None:
    found = run(program, SiteLimit(limit))
    remarks = {record.index: record.remarks for record in found.records if record.remarks}
    assert remarks == {step: (remark,)}


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="the limit of rewrite sites is -1"):
        SiteLimit(-1)


def test_excluded_sites_stay_and_the_numbers_of_the_others_too(program: Program) -> None:
    found = run(program, ExcludeSites(["relu-to-clamp@relu"]))
    assert sites(found) == [
        (2, "relu-to-clamp", "relu_1"),
        (3, "round", "p_linear_weight"),
    ]
    assert "relu" in {n.name for n in found.program.operators}


@pytest.mark.parametrize("site", ["relu-to-clamp", "@relu", "relu-to-clamp@"])
def test_what_names_no_site_is_refused(site: str) -> None:
    with pytest.raises(UsageError, match="names no rewrite site"):
        ExcludeSites(site)


def test_a_site_that_never_came_up_is_an_error_with_the_nearest(program: Program) -> None:
    with pytest.raises(UsageError, match="no rule wanted to rewrite at relu-to-clamp@relu_2") as c:
        run(program, ExcludeSites(["relu-to-clamp@relu", "relu-to-clamp@relu_2"]))
    assert c.value.hint is not None
    assert c.value.hint.startswith("did you mean relu-to-clamp@relu_1?")


def test_a_failure_is_not_hidden_by_what_had_no_effect(program: Program) -> None:
    def fail(p: Any, c: Any) -> None:
        raise ValueError("broken")

    instruments = (ExcludeSites("a@b"), SiteLimit(9), StopAfter(1))
    with pytest.raises(Exception, match="broken"):
        run(program, *instruments, passes=(calling(fail),))
