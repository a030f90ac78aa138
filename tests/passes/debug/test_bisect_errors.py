"""``bisect`` where passes raise, and where the default verification rejects what they return."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.errors import RequirementError
from planish.ir.ops import is_op
from planish.ir.pattern import Match, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext, PassResult
from planish.passes.debug.bisect import bisect
from planish.passes.debug.predicates import Crashes, KeepsContract, MaxAbs, MinSqnr, Predicate
from planish.passes.recipe import Recipe
from tests.passes.debug.damaging import Chain, Damage, chain, sound
from tests.support.example_passes import NeedsCalibration, RoundWeights, calling

aten = torch.ops.aten


def allowed(candidates: int) -> int:
    return math.ceil(math.log2(candidates)) + 1


WATCHING: dict[str, Callable[[], Predicate]] = {"crash": Crashes, "contract": KeepsContract}


@pytest.mark.parametrize("predicate", WATCHING)
@pytest.mark.parametrize("guilty", [0, 3, 5])
def test_a_crash_in_the_middle_of_the_sites(predicate: str, guilty: int) -> None:
    recipe = Recipe((Damage(), Damage(at=(guilty,), how="crash"), Damage()))
    found = bisect(chain(6), recipe, WATCHING[predicate]())
    assert (found.step, found.site, found.rule) == (2, 7 + guilty, "rectify")
    assert found.node is not None
    assert found.after is None
    assert found.before is not None
    assert "KeyError: 'planted'" in found.symptom
    assert found.count("pass") == 1
    assert found.count("site") <= allowed(1 + guilty)
    assert found.evaluations[-1].level == "confirm"
    assert not found.evaluations[-1].bad


@pytest.mark.parametrize("predicate", WATCHING)
def test_a_crash_before_any_site_is_the_whole_pass(predicate: str) -> None:
    recipe = Recipe((RoundWeights(step=0.25), Damage(at=(0,), how="match")))
    found = bisect(chain(3), recipe, WATCHING[predicate]())
    assert (found.step, found.site) == (2, None)
    assert found.options == ("--disable-pass damage",)
    assert "KeyError: 'relu'" in found.symptom
    assert any("to blame as a whole" in remark for remark in found.remarks)


def test_a_crash_between_sites_that_no_site_caused() -> None:
    found = bisect(chain(4), Recipe((Damage(at=(2,), how="match"),)), Crashes())
    assert (found.step, found.site) == (1, None)
    assert any("outside of its rewrite sites" in remark for remark in found.remarks)
    assert not found.evaluations[-1].bad
    sound(found)


def test_an_error_names_its_rule_and_node() -> None:
    class Clumsy(Rule):
        name = "clumsy"
        roots = frozenset({torch.ops.aten.relu.default})

        def match(self, node: torch.fx.Node, program: Program) -> Match | None:
            if node.name == "relu_1":
                raise IndexError("none there")
            return None

        def rewrite(self, match: Match, rewriter: Rewriter) -> None:
            raise AssertionError

    def behave(program: Program, context: PassContext) -> PassResult:
        return calling(lambda p, c: PassResult(p)).apply_rules(program, context, [Clumsy()])

    found = bisect(chain(3), Recipe((calling(behave),)), Crashes())
    assert (found.rule, found.node, found.site) == ("clumsy", "relu_1", None)
    assert found.source is not None
    assert "torch.relu" in found.source


def test_an_invalid_program_is_found_by_the_verifier() -> None:
    recipe = Recipe((Damage(), Damage(at=(4,), how="type")))
    found = bisect(chain(6), recipe, KeepsContract())
    assert (found.step, found.site) == (2, 11)
    assert found.after is not None
    assert not found.evaluations[-1].bad
    sound(found)


def test_the_contract_is_kept_by_each_but_not_by_all_together() -> None:
    recipe = Recipe(tuple(Damage(at=(i,), how="drift", only=True) for i in range(6)))
    found = bisect(chain(6), recipe, KeepsContract())
    assert found.step is not None
    assert found.step > 1  # 6e-5 alone is allowed, twice is too much
    assert found.site == found.step
    assert found.count("pass") <= allowed(6)


def test_a_numeric_question_takes_a_failure_for_bad() -> None:
    recipe = Recipe((Damage(), Damage(at=(2,), how="crash")))
    found = bisect(chain(4), recipe, MinSqnr(40))
    assert (found.step, found.site) == (2, 7)
    failed = [e for e in found.evaluations if e.level == "pass" and e.bad]
    assert "KeyError: 'planted'" in failed[0].text
    assert not found.evaluations[-1].bad


@pytest.mark.parametrize("predicate", [MaxAbs(1e-3), KeepsContract(), Crashes()])
def test_a_pass_that_writes_into_the_weights_is_found_by_its_error(predicate: MaxAbs) -> None:
    recipe = Recipe((Damage(), Damage(at=(2,), how="write"), Damage()))
    found = bisect(chain(5), recipe, predicate)
    assert (found.step, found.site) == (2, 8)
    assert "wrote into" in found.symptom
    if isinstance(predicate, MaxAbs):
        assert "outputs tell nothing any more" in found.remarks[0]


def test_a_missing_fact_is_the_callers_affair() -> None:
    with pytest.raises(RequirementError, match="calibrated"):
        bisect(chain(2), Recipe((NeedsCalibration(),)), Crashes())


def test_a_size_that_a_pass_fixed_is_free_again_in_every_run() -> None:
    """Asking for a dynamic size fixes it for all versions of the program."""

    def fix(program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, "fix", context.sites)
        for number, node in enumerate(n for n in program.operators if is_op(n, aten.relu.default)):
            with rewriter.site("fix", node) as granted:
                if not granted:
                    continue
                new = rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)
                if number == 2:
                    size = int(node.meta["val"].shape[0])
                    new = rewriter.call(aten.reshape.default, (new, [size, 4]), like=node)
                rewriter.replace(node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    shapes = ({0: Dim("batch", max=8)},)
    program = capture(Chain(5).eval(), (torch.ones(2, 4),), dynamic_shapes=shapes)
    found = bisect(program, Recipe((calling(fix),)), KeepsContract())
    assert (found.step, found.site, found.node) == (1, 3, "relu_2")
    assert not found.evaluations[-1].bad
