"""``bisect`` on recipes with a planted fault: the right pass, the right site, few looks."""

from __future__ import annotations

import math

import pytest
import torch

from planish.ir.capture import capture
from planish.ir.changes import SiteCounter
from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.debug.bisect import Evaluation, bisect
from planish.passes.debug.predicates import MaxAbs, MinSqnr, NonFinite
from planish.passes.instruments import Instrument
from planish.passes.pipeline import OUTSIDE, run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.selecting import ExcludeSites, SiteLimit
from tests.passes.debug.damaging import Damage, How, chain, sound
from tests.support.example_passes import RoundWeights, calling

aten = torch.ops.aten


def allowed(candidates: int) -> int:
    return math.ceil(math.log2(candidates)) + 1


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_the_site_is_found_within_the_budget(length: int, part: float) -> None:
    guilty = round(part * (length - 1))
    recipe = Recipe((Damage(), Damage(at=(guilty,)), Damage()))
    found = bisect(chain(length), recipe, MaxAbs(1e-3))
    assert (found.step, found.pass_name) == (2, "damage")
    assert found.site == length + guilty + 1  # those of the step before count too
    assert found.rule == "rectify"
    assert found.monotone
    assert found.remarks == ()
    assert found.count("pass") <= allowed(3)
    assert found.count("site") <= allowed(length)
    assert found.count("confirm") == 1
    sound(found)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_the_pass_is_found_within_the_budget(count: int) -> None:
    for guilty in {0, count // 2, count - 1}:
        passes = [Damage(at=(0,), how="scale" if i == guilty else "undo") for i in range(count)]
        passes = [p if i == guilty else Damage() for i, p in enumerate(passes)]
        found = bisect(chain(1), Recipe(tuple(passes)), MinSqnr(60))
        changed = 1 + (guilty > 0)  # a second Damage() makes the same clamp once more
        assert found.step == guilty + 1
        assert found.count("pass") <= allowed(max(count, changed))
        sound(found)


def test_the_numbers_are_those_of_the_whole_run() -> None:
    program, recipe = chain(6), Recipe((Damage(), Damage(at=(3,))))
    found = bisect(program, recipe, MaxAbs(1e-3))
    assert found.site is not None

    def deviation(*instruments: Instrument) -> float:
        result = run_pipeline(program, recipe, PassContext(), instruments).program
        sample = program.samples[0][0]
        return float((result(sample) - program(sample)).abs().max())

    assert deviation(SiteLimit(found.site - 1)) == 0.0
    assert deviation(SiteLimit(found.site)) > 1e-3
    assert deviation(ExcludeSites([f"{found.rule}@{found.node}"])) == 0.0


def test_the_answer_says_all_that_is_known() -> None:
    program, recipe = chain(4), Recipe((RoundWeights(step=0.25), Damage(at=(2,))))
    found = bisect(program, recipe, MaxAbs(1e-3))
    assert found.found
    assert (found.step, found.site, found.rule, found.node) == (2, 4, "rectify", "relu_2")
    assert found.source is not None
    assert found.source.endswith("x = torch.relu(x + self.weight)")
    assert found.options == ("--exclude rectify@relu_2", "--disable-pass damage")
    assert found.suggestion == "--exclude rectify@relu_2, or the whole pass: --disable-pass damage"
    assert found.before is not None
    assert found.after is not None
    assert "aten.mul" not in str(found.before)
    assert str(found.after).count("aten.mul") == 1
    assert found.symptom.startswith("max abs ")
    assert found.to_dict()["evaluations"][0]["level"] == "baseline"


def test_a_pass_that_runs_twice_is_named_by_its_number() -> None:
    found = bisect(chain(3), Recipe((Damage(), Damage(at=(0,)))), MaxAbs(1e-3))
    assert found.options[-1] == "--disable-pass 2"


def test_every_look_is_told_as_it_happens() -> None:
    told: list[Evaluation] = []
    worked: list[str] = []
    recipe = Recipe((Damage(at=(1,)),))
    found = bisect(chain(3), recipe, MinSqnr(40), tell=told.append, working=worked.append)
    assert tuple(told) == found.evaluations
    assert str(told[0]) == "baseline: the original program: SQNR inf dB  good"
    assert str(told[1]).startswith("pass 1/1: after 1 of 1 passes (damage): SQNR ")
    assert str(told[1]).endswith(" dB  BAD")
    assert str(told[2]).startswith("site 1/3: with 1 of 3 sites of damage, up to 1 (rectify@relu)")
    assert told[-1].level == "confirm"
    assert worked[0] == "looking at the original program"


def test_nothing_bad() -> None:
    found = bisect(chain(3), Recipe((Damage(), RoundWeights(step=0.25))), MinSqnr(40))
    assert not found.found
    assert found.suggestion is None
    assert (found.step, found.site, found.before) == (None, None, None)


def test_nothing_changed() -> None:
    idle = calling(lambda program, context: PassResult(program))
    found = bisect(chain(3), Recipe((idle,)), MinSqnr(40))
    assert not found.found
    assert found.remarks == ("no pass of the recipe changed the program",)


# -- what is no site ------------------------------------------------------------------------------


def test_an_edit_behind_the_rewriters_back_has_no_exclusion() -> None:
    recipe = Recipe((Damage(), Damage(at=(1,), how="outside")))
    found = bisect(chain(3), recipe, MaxAbs(1e-3))
    assert (found.step, found.rule) == (2, OUTSIDE)
    assert found.options == ("--disable-pass 2",)
    assert not found.evaluations[-1].bad


def test_a_pass_that_counts_no_sites_is_to_blame_as_a_whole() -> None:
    found = bisect(chain(3), Recipe((Damage(at=(1,), how="silent"),)), MaxAbs(1e-3))
    assert (found.step, found.site) == (1, None)
    assert found.options == ("--disable-pass damage",)
    assert found.before is not None
    assert found.after is not None
    assert any("to blame as a whole" in remark for remark in found.remarks)


# -- not monotone ---------------------------------------------------------------------------------


def test_a_fault_that_a_later_pass_hides_is_found() -> None:
    recipe = Recipe((Damage(), Damage(at=(1,)), Damage(at=(1,), how="undo")))
    found = bisect(chain(4), recipe, MaxAbs(1e-3))
    assert (found.step, found.site) == (2, 6)
    assert not found.monotone
    assert "good after pass 3" in found.remarks[0]
    assert "--exhaustive looks at all" in found.remarks[0]
    assert "up to step 2" in found.evaluations[-1].text
    assert not found.evaluations[-1].bad
    sound(found)


def test_a_good_site_after_a_bad_one_is_reported() -> None:
    def behave(program: Program, context: PassContext) -> PassResult:
        first = Damage(at=(0,), only=True).run(program, context)
        second = Damage(at=(0,), how="undo", only=True).run(first.program, context)
        third = Damage(at=(2,), only=True).run(second.program, context)
        return PassResult(third.program, first.changes + second.changes + third.changes)

    found = bisect(chain(3), Recipe((calling(behave),)), MaxAbs(1e-3), exhaustive=True)
    assert (found.step, found.site) == (1, 1)
    assert found.count("site") == 3  # none, and the first two; that all are bad is known
    assert not found.monotone
    assert "good after site 2" in found.remarks[0]
    assert "exhaustive" not in found.remarks[0]  # it was; to advise it again would lead nowhere


def test_looking_at_everything_finds_what_few_looks_miss() -> None:
    # The second pass is bad, the third hides it, and the last is bad again.
    passes: tuple[Pass, ...] = (
        Damage(),
        Damage(at=(0,)),
        Damage(at=(0,), how="undo"),
        *(RoundWeights(step=0.25) for _ in range(5)),  # changes tensors, and no value
        Damage(at=(1,)),
    )
    quick = bisect(chain(2), Recipe(passes), MaxAbs(1e-3))
    thorough = bisect(chain(2), Recipe(passes), MaxAbs(1e-3), exhaustive=True)
    assert quick.step == 9
    assert thorough.step == 2
    assert not thorough.monotone
    assert "good after pass" in thorough.remarks[0]


def test_a_second_fault_is_told() -> None:
    found = bisect(chain(5), Recipe((Damage(at=(1, 3)),)), MaxAbs(1e-3))
    assert found.node == "relu_1"
    assert found.evaluations[-1].bad
    assert any("without rectify@relu_1 the result is still bad" in r for r in found.remarks)
    again = bisect(
        chain(5),
        Recipe((Damage(at=(1, 3)),)),
        MaxAbs(1e-3),
        context_factory=lambda: PassContext(
            sites=SiteCounter(excluded=frozenset({"rectify@relu_1"}))
        ),
    )
    assert again.node == "relu_3"
    assert not again.evaluations[-1].bad


# -- lossy passes, seeds, the call ----------------------------------------------------------------


def test_a_lossy_pass() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(6)]
    for number, layer in enumerate(layers):
        layer.weight.data = (layer.weight.data * 64).round() / 64
        layer.bias.data = (layer.bias.data * 64).round() / 64
        if number == 3:
            layer.weight.data += 0.007  # the only one that rounding changes
    program = capture(torch.nn.Sequential(*layers).eval(), (torch.randn(3, 8),))
    recipe = Recipe((RoundWeights(step=1 / 64),))
    assert recipe.passes[0].contract is Contract.LOSSY
    found = bisect(program, recipe, MinSqnr(80))
    assert (found.step, found.rule) == (1, "round")
    assert found.node is not None
    assert "3_weight" in found.node
    assert not found.evaluations[-1].bad


def test_a_random_pass_draws_the_same_numbers_alone_as_in_the_recipe() -> None:
    def draw(program: Program, context: PassContext) -> PassResult:
        picked = int(torch.randint(6, (1,), generator=context.generator))
        return Damage(at=(picked,)).run(program, context)

    passes = (Damage(), calling(draw, name="first"), calling(draw, name="second"))
    found = bisect(chain(6), Recipe(passes, seed=5), MaxAbs(1e-3))
    assert found.pass_name == "first"
    assert found.site is not None
    assert not any("another result" in remark for remark in found.remarks)


def test_a_pass_that_does_not_repeat_itself_is_told() -> None:
    runs: list[int] = []

    def moody(program: Program, context: PassContext) -> PassResult:
        runs.append(1)
        return Damage(at=(0,) if len(runs) == 1 else ()).run(program, context)

    found = bisect(chain(3), Recipe((calling(moody),)), MaxAbs(1e-3))
    assert (found.step, found.site) == (1, None)
    assert any("gave another result when it ran again" in remark for remark in found.remarks)


def test_a_pass_that_asks_for_fewer_sites_each_time_is_told() -> None:
    runs: list[int] = []

    def shrinking(program: Program, context: PassContext) -> PassResult:
        runs.append(1)
        wrong = (5 - len(runs),) if len(runs) < 6 else (0,)
        return Damage(at=wrong, only=True).run(program, context)

    def twice(program: Program, context: PassContext) -> PassResult:
        first = shrinking(program, context)
        if len(runs) > 2:
            return first
        second = Damage(at=(0,), only=True).run(first.program, context)
        return PassResult(second.program, first.changes + second.changes)

    found = bisect(chain(6), Recipe((calling(twice),)), MaxAbs(1e-3))
    assert found.step == 1
    assert any("another result" in remark for remark in found.remarks)
    assert any("did not come up again" in e.text for e in found.evaluations)
    sound(found)


@pytest.mark.parametrize("how", ["scale", "crash", "type"])
def test_the_program_is_left_as_it_was(how: How) -> None:
    program = chain(3)
    before = str(program)
    bisect(program, Recipe((Damage(at=(1,), how=how),)), NonFinite())
    assert str(program) == before


def test_steps_left_out_stay_out_and_keep_their_numbers() -> None:
    recipe = Recipe((Damage(at=(0,)), RoundWeights(step=0.25), Damage(at=(1,))))
    found = bisect(chain(3), recipe, MaxAbs(1e-3), disabled=[1])
    assert (found.step, found.site) == (3, 3)  # rounding is site 1, and changes nothing


def test_a_site_to_leave_out_must_exist() -> None:
    def context() -> PassContext:
        return PassContext(sites=SiteCounter(excluded=frozenset({"rectify@nowhere"})))

    with pytest.raises(UsageError, match="no rule wanted to rewrite at rectify@nowhere"):
        bisect(chain(2), Recipe((Damage(),)), MaxAbs(1e-3), context_factory=context)


def test_an_original_that_is_bad_is_an_error() -> None:
    with pytest.raises(UsageError, match="bad already: SQNR inf dB"):
        bisect(chain(2), Recipe((Damage(),)), MinSqnr(math.nan))  # nothing is at least that
