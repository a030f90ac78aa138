"""The pipeline: private clones, changes as they are and not as claimed, named errors."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from planish.ir import Program, Rewriter, SiteCounter, capture, text
from planish.ir.errors import PassError, RecipeError, RequirementError, VerificationError
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.instruments import CompareEach, VerifyEach
from planish.passes.pipeline import OUTSIDE, Instrument, Run, Step, run_pipeline
from planish.passes.recipe import Recipe
from tests.support.example_passes import (
    Everything,
    RoundWeights,
    SwapActivation,
    Unwritable,
    calling,
)

aten = torch.ops.aten


class Net(nn.Module):
    """Three relus, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(torch.relu(self.linear(x)) - 0.1) - 0.1)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    return capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: batch}})


def run(program: Program, *passes: Pass, **options: Any) -> Run:
    instruments = options.pop("instruments", ())
    return run_pipeline(program, Recipe(passes), PassContext(**options), instruments)


def count(program: Program, target: Any) -> int:
    return sum(n.target is target for n in program.operators)


# -- what a run is --------------------------------------------------------------------------------


def test_a_run_holds_the_result_and_one_record_per_pass(program: Program) -> None:
    shown = text(program, values=True)
    found = run(program, Everything(count=3), SwapActivation(), RoundWeights())
    assert count(found.program, aten.clamp_min.default) == 3
    assert count(found.program, aten.relu.default) == 0
    assert [r.name for r in found.records] == ["everything", "swap-activation", "round-weights"]
    assert [r.options for r in found.records] == ["{count=3}", "", ""]
    assert [r.contract for r in found.records] == [Contract.EXACT, Contract.EXACT, Contract.LOSSY]
    assert [r.changed for r in found.records] == [False, True, True]
    assert [len(r.changes) for r in found.records] == [0, 3, 2]
    assert [r.sites for r in found.records] == [None, (1, 3), (4, 5)]
    assert all(r.ran and r.seconds >= 0 and r.remarks == () for r in found.records)
    assert found.seconds >= sum(r.seconds for r in found.records)
    assert found.original is program
    assert text(program, values=True) == shown


def test_no_passes_give_the_program_back(program: Program) -> None:
    assert run(program).program is program


def test_a_clone_is_made_only_after_a_change(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    clone = Program.clone

    def counted(self: Program) -> Program:
        made.append(self)
        return clone(self)

    monkeypatch.setattr(Program, "clone", counted)
    run(program, Everything(), Everything(), SwapActivation(), Everything(), Everything())
    assert len(made) == 2


def test_costs_are_those_before_and_after_each_pass(program: Program) -> None:
    def halve(p: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(p, "halve", context.sites)
        (linear,) = [n for n in p.operators if n.target is aten.linear.default]
        with rewriter.site("drop-bias", linear):
            rewriter.set_args(linear, linear.args[:2])
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    skipped = Skip("everything")
    first, second, third = run(
        program, Everything(), calling(halve), Everything(), instruments=[skipped]
    ).records
    assert first.cost_before == first.cost == second.cost_before
    assert second.cost_before.parameters - second.cost.parameters == 4
    assert third.cost == second.cost
    assert not third.ran


class Skip(Instrument):
    """Keeps the passes of one name from running."""

    def __init__(self, name: str):
        self.name = name

    def should_run(self, step: Step) -> bool:
        return step.name != self.name


# -- private clones -------------------------------------------------------------------------------


def test_a_pass_that_fails_half_way_leaves_the_program_as_it_was(program: Program) -> None:
    seen: dict[str, Any] = {}

    def break_off(p: Program, context: PassContext) -> PassResult:
        p.output.args = ((p.placeholders[0],),)
        raise ValueError("half way")

    class Look(Instrument):
        def after_failure(self, step: Step, error: BaseException) -> None:
            seen.update(before=step.before, after=step.after, current=step.run.program)

    shown = text(program)
    with pytest.raises(PassError):
        run(program, calling(break_off), instruments=[Look()])
    assert seen == {"before": program, "after": None, "current": program}
    assert text(program) == shown


def test_a_pass_never_gets_hold_of_the_program_before(program: Program) -> None:
    held: list[Program] = []

    def keep(p: Program, context: PassContext) -> PassResult:
        held.append(p)
        return SwapActivation().run(p, context)

    class Look(Instrument):
        def after_pass(self, step: Step, result: PassResult) -> None:
            assert step.before is not None
            assert count(step.before, aten.relu.default) == 3
            assert step.before is not held[-1]
            assert not set(step.before.nodes) & set(held[-1].nodes)

    run(program, calling(keep), instruments=[Look()])
    assert len(held) == 1


@pytest.mark.parametrize("what", ["the constant 'linear.weight'", "the input 'x' of sample 0"])
def test_a_write_into_a_shared_tensor_is_an_error(what: str) -> None:
    program = capture(Net().eval(), (torch.randn(3, 4),))

    def write(p: Program, context: PassContext) -> PassResult:
        tensor = p.constants["linear.weight"] if "constant" in what else p.samples[0][0]
        assert isinstance(tensor, Tensor)
        tensor.mul_(2.0)
        return PassResult(p)

    with pytest.raises(PassError, match=f"pass calls: it wrote into {what}"):
        run(program, calling(write))


# -- changes --------------------------------------------------------------------------------------


def through_module(p: Program, context: PassContext) -> PassResult:
    """Replace the last relu by a gelu the way torch.fx passes do."""
    module = p.graph_module
    last = [n for n in module.graph.nodes if n.target is aten.relu.default][-1]
    with module.graph.inserting_before(last):
        new = module.graph.call_function(aten.gelu.default, last.args)
    last.replace_all_uses_with(new)
    module.graph.erase_node(last)
    module.recompile()
    return PassResult(p)


def set_constant(p: Program, context: PassContext) -> PassResult:
    """Give the module another weight."""
    linear: Any = p.graph_module.linear
    with torch.no_grad():
        linear.weight = linear.weight * 2
    return PassResult(p)


def test_a_pass_that_asks_for_a_dynamic_size_does_not_fix_it() -> None:
    def look(program: Program, context: PassContext) -> PassResult:
        assert int(program.placeholders[0].meta["val"].shape[0]) == 3
        return PassResult(program)

    dynamic = {"x": {0: torch.export.Dim("batch")}}
    given = capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes=dynamic)
    before = text(given)
    found = run(given, calling(look))
    (remark,) = found.records[0].remarks
    assert remark.startswith("it asked for dynamic sizes as if they were those of the sample")
    assert text(found.program) == text(given) == before


def test_a_pass_that_types_by_the_size_of_the_sample_is_at_fault() -> None:
    def fix(program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, "calls", context.sites)
        node = next(n for n in program.operators if n.target is aten.relu.default)
        with rewriter.site("clamp", node):
            assert int(node.meta["val"].shape[0]) == 3
            new = rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)
            rewriter.replace(node, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    dynamic = {"x": {0: torch.export.Dim("batch")}}
    given = capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes=dynamic)
    with pytest.raises(VerificationError, match=r"pass calls: rule operator-types"):
        run(given, calling(fix), instruments=[VerifyEach()])


@pytest.mark.parametrize("behavior", [through_module, set_constant])
def test_an_edit_behind_the_rewriter_counts_as_one_site_and_is_remarked(
    program: Program, behavior: Any
) -> None:
    said: list[str] = []
    context = {"remark": said.append}
    (record,) = run(program, calling(behavior), **context).records
    assert record.changed
    (change,) = record.changes
    assert (change.number, change.rule) == (1, OUTSIDE)
    assert "it edited the program without the rewriter" in record.remarks[0]
    assert said == [f"calls: {record.remarks[0]}"]


def test_an_edit_behind_the_rewriter_is_typed_stamped_and_verified(program: Program) -> None:
    found = run(program, calling(through_module), instruments=[VerifyEach()])
    (gelu,) = [n for n in found.program.operators if n.target is aten.gelu.default]
    assert gelu.meta["from"] == ("calls", OUTSIDE, ())
    assert found.records[0].changes[0].added == (gelu.name,)
    with pytest.raises(VerificationError, match="pass calls: it is exact, and at the sample"):
        run(program, calling(set_constant), instruments=[CompareEach(), VerifyEach()])


def test_an_edit_beside_recorded_ones_is_found(program: Program) -> None:
    def both(p: Program, context: PassContext) -> PassResult:
        through_module(p, context)
        return SwapActivation().run(p, context)

    (record,) = run(program, calling(both)).records
    assert [c.rule for c in record.changes] == ["relu-to-clamp", "relu-to-clamp", OUTSIDE]
    assert "gelu" in record.remarks[0]


def test_a_claim_without_effect_is_remarked_and_counts_for_nothing(program: Program) -> None:
    def boast(p: Program, context: PassContext) -> PassResult:
        done = SwapActivation().run(p.clone(), context)
        return PassResult(p, done.changes)

    found = run(program, calling(boast))
    (record,) = found.records
    assert not record.changed
    assert record.changes == ()
    assert record.remarks == ("it claimed 3 changes, but the program is the same",)
    assert found.program is program


@pytest.mark.parametrize("limit", range(5))
def test_a_limit_stops_after_that_many_sites(program: Program, limit: int) -> None:
    found = run(program, SwapActivation(), sites=SiteCounter(limit))
    assert count(found.program, aten.clamp_min.default) == min(limit, 3)
    assert [c.number for c in found.records[0].changes] == list(range(1, min(limit, 3) + 1))
    assert found.records[0].sites == (1, 3)


@pytest.mark.parametrize(("limit", "changed"), [(0, False), (1, True)])
def test_a_limit_holds_for_edits_behind_the_rewriter(
    program: Program, limit: int, changed: bool
) -> None:
    found = run(program, calling(through_module), Everything(), sites=SiteCounter(limit))
    assert (found.program is not program) is changed
    assert found.records[0].changed is changed
    assert ("beyond the limit" in found.records[0].remarks[0]) is not changed


def test_a_pass_draws_the_same_numbers_wherever_it_stands(program: Program) -> None:
    drawn: list[float] = []

    def draw(p: Program, context: PassContext) -> PassResult:
        drawn.append(float(torch.rand(1, generator=context.generator)))
        return PassResult(p)

    run(program, calling(draw), calling(draw, name="other"))
    run(program, Everything(), calling(draw))
    run_pipeline(program, Recipe((calling(draw),), seed=1))
    first, other_name, later, other_seed = drawn
    assert first == later == other_name  # the class is one, so its text is
    assert first != other_seed


# -- errors ---------------------------------------------------------------------------------------


def test_requirements_are_checked_before_anything_runs(program: Program) -> None:
    ran = []

    def watch(p: Program, context: PassContext) -> PassResult:
        ran.append(p)
        return PassResult(p)

    needs = calling(watch, name="needs", requires=frozenset({Fact.CALIBRATED, Fact.LABELS}))
    with pytest.raises(RequirementError, match="needs requires calibrated and labels") as caught:
        run(program, calling(watch), needs)
    assert "pass calibration=..." in str(caught.value)
    assert "pass labeled=..." in str(caught.value)
    assert ran == []
    run(program, calling(watch), needs, instruments=[Skip("needs")])
    assert len(ran) == 1
    with pytest.raises(RequirementError, match="requires labels"):
        run(program, needs, calibration=[1])


def test_an_error_names_pass_rule_and_node(program: Program) -> None:
    def fail(p: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(p, "calls", context.sites)
        with rewriter.site("my-rule", p.operators[1]):
            raise KeyError("nowhere")

    with pytest.raises(PassError) as caught:
        run(program, calling(fail))
    assert "pass calls: rule my-rule failed: KeyError: 'nowhere'" in str(caught.value)
    assert "relu = aten.relu.default" in str(caught.value)
    assert "torch.relu(torch.relu(" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_outside_of_any_rule_names_the_line(program: Program) -> None:
    def fail(p: Program, context: PassContext) -> PassResult:
        empty: dict[str, PassResult] = {}
        return empty["missing"]

    with pytest.raises(PassError, match=r'(?s)pass calls: it failed: KeyError.*empty\["missing"\]'):
        run(program, calling(fail))


def test_a_deliberate_error_keeps_its_kind_and_gains_the_name(program: Program) -> None:
    def refuse(p: Program, context: PassContext) -> PassResult:
        raise VerificationError("it is off", where="somewhere", hint="do something")

    with pytest.raises(VerificationError) as caught:
        run(program, Everything(), calling(refuse), calling(refuse))
    expected = "pass calls (step 2): it is off\n  at: somewhere\n  try: do something"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda p: None, "it returned a NoneType, not a PassResult"),
        (lambda p: p, "it returned a Program, not a PassResult"),
        (lambda p: PassResult(p.graph_module), "holds a GraphModule, not a program"),
        (lambda p: PassResult(p, cast(Any, [1])), "something else than a tuple of Changes"),
        (
            lambda p: PassResult(p, (), cast(Any, ("no",))),
            "something else than a tuple of Refusals",
        ),
    ],
)
def test_what_is_no_result_is_refused(program: Program, returned: Any, what: str) -> None:
    with pytest.raises(PassError, match=f"pass calls: .*{what}"):
        run(program, calling(lambda p, c: returned(p)))


def test_a_result_with_another_signature_is_refused(program: Program) -> None:
    other = capture(nn.ReLU().eval(), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="it changed the inputs or the outputs"):
        run(program, calling(lambda p, c: PassResult(other)))


def test_options_that_cannot_be_written_stop_the_run(program: Program) -> None:
    with pytest.raises(RecipeError, match=r"pass 1, .*Unwritable"):
        run(program, Unwritable(weight=torch.ones(1)))
