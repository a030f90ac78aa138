"""What the checks hold a run to where several passes, samples or types come together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir import Program, Rewriter, capture
from planish.ir.compare import measure, worst
from planish.ir.errors import PassError, VerificationError
from planish.ir.execute import run as execute
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.instruments import CompareEach, VerifyEach
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.steps import Instrument, Step
from tests.support.example_passes import Everything, RoundWeights, SwapActivation, calling

aten = torch.ops.aten
Edit = Callable[[Program, Rewriter], None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + 0.5


@pytest.fixture(scope="module")
def program() -> Program:
    """Two samples, of which the second is larger."""
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch")},)
    found = capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes=shapes)
    found.samples = (*found.samples, (20 * torch.randn(5, 4),))
    return found


def go(program: Program, *passes: Pass, instruments: Any, **context: Any) -> Run:
    return run_pipeline(program, Recipe(passes), PassContext(**context), instruments)


def edits(*made: Edit, contract: Contract = Contract.EXACT) -> Pass:
    """A pass of one site per edit."""

    def behave(p: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(p, "calls", context.sites)
        for edit in made:
            with rewriter.site("edit", p.operators[-1]):
                edit(p, rewriter)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    return calling(behave, contract=contract)


def shift(by: float) -> Edit:
    """Add to every element of the output."""

    def edit(p: Program, rewriter: Rewriter) -> None:
        add: Any = p.operators[-1]
        rewriter.set_args(add, (add.args[0], add.args[1] + by))

    return edit


def fails(p: Program, context: PassContext) -> PassResult:
    raise PassError("it gave up")


def mistyped(p: Program, context: PassContext) -> PassResult:
    done = SwapActivation().run(p, context)
    node = done.program.operators[1]
    node.meta["val"] = node.meta["val"].to(torch.float64)
    return done


# -- the end of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("instrument", [VerifyEach, CompareEach])
def test_the_result_of_a_failed_run_is_not_checked(program: Program, instrument: Any) -> None:
    with pytest.raises(VerificationError):
        go(program, calling(mistyped), instruments=[VerifyEach(at_end=True)])
    wrong = (calling(mistyped), edits(shift(1.0)), calling(fails, name="fails"))
    with pytest.raises(PassError, match="it gave up") as caught:
        go(program, *wrong, instruments=[instrument(at_end=True)])
    assert not getattr(caught.value, "__notes__", [])


def test_the_drift_of_a_failed_run_is_not_checked(program: Program) -> None:
    nudges = [edits(shift(6e-5))] * 8
    with pytest.raises(VerificationError, match="not all together: at the sample inputs output 0"):
        go(program, *nudges, instruments=[CompareEach()])
    compare = CompareEach()
    with pytest.raises(PassError, match="it gave up") as caught:
        go(program, *nudges, calling(fails, name="fails"), instruments=[compare])
    assert not getattr(caught.value, "__notes__", [])
    assert compare.answers is None


def test_a_lossy_pass_that_changed_nothing_excuses_no_other(program: Program) -> None:
    idle = calling(lambda p, c: PassResult(p), contract=Contract.LOSSY)
    with pytest.raises(VerificationError, match="the recipe changed what the program computes"):
        go(program, idle, edits(shift(0.1)), instruments=[CompareEach(at_end=True)])
    with pytest.raises(VerificationError, match="each pass kept its bound"):
        go(program, idle, *[edits(shift(6e-5))] * 8, instruments=[CompareEach()])


def test_a_lossy_pass_excuses_drift(program: Program) -> None:
    nudges = [edits(shift(6e-5))] * 8
    found = go(program, *nudges, RoundWeights(), instruments=[CompareEach()])
    assert found.records[-1].cumulative is not None


def test_at_the_end_a_lossy_result_is_measured_and_must_be_usable(program: Program) -> None:
    compare = CompareEach(at_end=True)
    found = go(program, RoundWeights(), SwapActivation(), Everything(), instruments=[compare])
    expected = [measure(execute(program, s), execute(found.program, s)) for s in program.samples]
    assert [r.cumulative for r in found.records] == [None, worst(expected), None]
    assert [r.fidelity for r in found.records] == [None] * 3
    explode = edits(shift(float("inf")), contract=Contract.LOSSY)
    with pytest.raises(VerificationError, match="at the sample inputs an output is not finite"):
        go(program, explode, instruments=[compare])
    assert compare.answers is None


@pytest.mark.parametrize("at_end", [False, True])
def test_the_answers_are_of_all_samples_and_of_the_result(program: Program, at_end: bool) -> None:
    compare = CompareEach(at_end=at_end)
    passes = (SwapActivation(), RoundWeights(step=1 / 4), edits(shift(1e-5)))
    found = go(program, *passes, instruments=[compare])
    assert compare.answers is not None
    wanted = [[execute(p, s)[0] for s in program.samples] for p in (program, found.program)]
    for answers, values in zip(compare.answers, wanted, strict=True):
        assert len(answers) == len(values) == 2
        assert all(torch.equal(a, b) for a, b in zip(answers, values, strict=True))
    assert not torch.equal(wanted[0][0], wanted[1][0])


# -- bounds ---------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Returns float32, and computes in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.to(torch.bfloat16)).to(torch.float32) + 0.5


def test_the_bound_is_of_the_coarsest_type_of_the_original() -> None:
    program = capture(Halves().eval(), (torch.rand(8, 4),))
    for at_end in (False, True):
        go(program, *[edits(shift(0.02))] * 3, instruments=[CompareEach(at_end=at_end)])
        with pytest.raises(VerificationError, match=r"not all together|changed what"):
            go(program, *[edits(shift(0.06))] * 3, instruments=[CompareEach(at_end=at_end)])

    def coarser(p: Program, rewriter: Rewriter) -> None:
        """Looser for itself, if the bounds were those of the result."""
        add = p.operators[-1]
        rewriter.insert_before(p.output)
        half = rewriter.call(aten.to.dtype, (add, torch.bfloat16), like=add)
        back = rewriter.call(aten.to.dtype, (half, torch.float32), like=add)
        rewriter.set_args(p.output, ((back,),))

    exact = capture(Net().eval(), (torch.rand(8, 4),))
    with pytest.raises(VerificationError, match=r"the bound for f32 is 0\.0001"):
        go(exact, edits(coarser), instruments=[CompareEach()])


# -- samples and probes ---------------------------------------------------------------------------


def test_a_later_sample_is_named() -> None:
    program = capture(nn.ReLU().eval(), (torch.ones(3, 4),))
    program.samples = (*program.samples, (-torch.ones(3, 4),))

    def leaky(p: Program, rewriter: Rewriter) -> None:
        (relu,) = [n for n in p.operators if n.target is aten.relu.default]
        rewriter.replace(relu, relu.args[0])

    with pytest.raises(VerificationError, match="it is exact, and at sample 1 output 0"):
        go(program, edits(leaky), instruments=[CompareEach()])


def test_an_exact_pass_is_measured_on_samples_only(program: Program) -> None:
    found = go(program, edits(shift(4e-5)), edits(shift(4e-5)), instruments=[CompareEach()])
    first, second = found.records
    between = go(program, edits(shift(4e-5)), instruments=[]).program
    pairs = ((between, found.program), (program, found.program))
    local, total = (
        worst([measure(execute(b, s), execute(a, s)) for s in program.samples]) for b, a in pairs
    )
    assert (second.fidelity, second.cumulative) == (local, total)
    assert first.fidelity == first.cumulative
    assert second.fidelity != second.cumulative


def test_a_size_that_a_pass_fixed_is_still_varied(program: Program) -> None:
    class Fixes(Instrument):
        def after_pass(self, step: Step, result: PassResult) -> None:
            size = step.run.original.placeholders[0].meta["val"].shape[0]
            assert size == 3  # torch writes down that it is

    compare = CompareEach()
    fresh = capture(
        Net().eval(), (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    go(fresh, SwapActivation(), instruments=[compare, Fixes()])
    assert compare.reference is not None
    assert compare.reference.sizes == {"batch": 4}
    assert compare.reference.resized


def test_the_seed_is_of_the_second_probe(program: Program) -> None:
    inputs = []
    for seed in (1, 1, 2):
        compare = CompareEach(seed=seed)
        go(program, SwapActivation(), instruments=[compare])
        assert compare.reference is not None
        assert compare.reference.inputs is not None
        inputs.append(compare.reference.inputs[0])
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])
    go(program, instruments=[compare])
    assert compare.reference is None


@pytest.mark.parametrize("at_end", [False, True])
def test_a_program_without_samples_is_said_not_to_be_compared(
    program: Program, at_end: bool
) -> None:
    bare = program.clone()
    bare.samples = ()
    passes = (Everything(), SwapActivation(), edits(shift(1.0)))
    found = go(bare, *passes, instruments=[CompareEach(at_end=at_end)])
    said = ("no outputs were compared: the program has no sample inputs",)
    assert [r.remarks for r in found.records] == [(), *([(), said] if at_end else [said, ()])]


class Drawing(nn.Module):
    """Draws, and gives no finite number where the batch is odd."""

    def forward(self, x: Tensor) -> Tensor:
        odd = torch.full((), x.shape[0] % 2, dtype=x.dtype)
        return torch.relu(x + torch.rand_like(x)) + torch.log(1.0 - odd)


def test_a_rejected_attempt_leaves_the_random_numbers_of_the_next_as_they_are() -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = capture(Drawing().eval(), (torch.randn(4, 3),), dynamic_shapes=shapes)
    compare = CompareEach()
    found = go(program, SwapActivation(), instruments=[compare])
    assert compare.reference is not None
    assert len(compare.reference.rejected) >= 1
    assert compare.reference.inputs is not None
    assert len(found.records[0].remarks) == len(compare.reference.rejected)
    again = go(program, SwapActivation(), SwapActivation(), instruments=[compare])
    assert again.records[1].remarks == ()


# -- what messages and remarks name ---------------------------------------------------------------


def test_three_rewrites_are_named_and_the_others_counted(program: Program) -> None:
    for count, more in ((3, ""), (4, "; and 1 more rewrites"), (6, "; and 3 more rewrites")):
        with pytest.raises(VerificationError) as caught:
            go(program, edits(*[shift(0.1)] * count), instruments=[CompareEach()])
        (where,) = [line for line in str(caught.value).splitlines() if "edit at add" in line]
        assert where.count("edit at add") == 3
        assert where.count("return torch.relu(self.linear(x)) + 0.5)") == 3
        assert where.endswith(f"+ 0.5){more}")
        assert "\n-  %" in str(caught.value).replace("    ", "")


def test_a_rewrite_of_no_source_is_named_alone(program: Program) -> None:
    def unsourced(p: Program, context: PassContext) -> PassResult:
        p.operators[-1].meta.pop("stack_trace")
        return edits(shift(0.1)).run(p, context)

    with pytest.raises(VerificationError) as caught:
        go(program, calling(unsourced), instruments=[CompareEach()])
    assert "edit at add\n" in str(caught.value)


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, ", and 1 more")])
def test_rewrites_that_left_nothing_to_measure_are_named(
    program: Program, count: int, more: str
) -> None:
    def outputs(p: Program, context: PassContext) -> PassResult:
        """Rewrite one value again and again: only the last one is left."""
        rewriter = Rewriter(p, "calls", context.sites)
        for number in range(count + 1):
            add: Any = p.operators[-1]
            with rewriter.site("edit", add):
                new = rewriter.call(add.target, (add.args[0], 0.5 + number / 8), like=add)
                rewriter.replace(add, new)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    found = go(program, calling(outputs, contract=Contract.LOSSY), instruments=[CompareEach()])
    record = found.records[0]
    shown = ", ".join(f"edit at {c.node}" for c in record.changes[: min(count, 3)])
    assert record.remarks == (
        f"{count} of {count + 1} rewrites left no value that could be measured by itself: "
        f"{shown}{more}",
    )


# -- what lossy passes may and may not give -------------------------------------------------------


class Edges(nn.Module):
    """Infinite where x is 0, and not a number where it is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x) + 0.5


def test_what_was_not_finite_before_may_be_anything_after() -> None:
    program = capture(Edges().eval(), (torch.tensor([0.0, 1.0, 2.0, -1.0]),))
    found = go(program, edits(shift(0.1), contract=Contract.LOSSY), instruments=[CompareEach()])
    fidelity = found.records[0].fidelity
    assert fidelity is not None
    assert fidelity.max_abs == pytest.approx(0.1)

    def finite(p: Program, rewriter: Rewriter) -> None:
        add: Any = p.operators[-1]
        whole = rewriter.call(aten.nan_to_num.default, (add.args[0],), like=add)
        rewriter.set_args(add, (whole, 0.5))

    found = go(program, edits(finite, contract=Contract.LOSSY), instruments=[CompareEach()])
    fidelity = found.records[0].fidelity
    assert fidelity is not None
    assert fidelity.max_abs == float("inf")


def test_a_value_of_another_shape_than_its_type_is_told_as_it_is(program: Program) -> None:
    def lies(p: Program, context: PassContext) -> PassResult:
        (relu,) = [n for n in p.operators if n.target is aten.relu.default]
        relu.target = aten.mean.default
        return PassResult(p)

    with pytest.raises(VerificationError, match="has shape"):
        go(program, calling(lies, contract=Contract.LOSSY), instruments=[CompareEach()])


# -- which value of the original a value stands for -----------------------------------------------


@pytest.fixture(scope="module")
def early() -> Program:
    """What is rewritten comes first, so that a proof is enough; two samples."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.ReLU(), *(nn.Linear(4, 4) for _ in range(4)))
    found = capture(layers.eval(), (torch.randn(3, 4),))
    found.samples = (*found.samples, (torch.randn(3, 4),))
    return found


def test_values_are_followed_over_exact_and_lossy_passes(early: Program) -> None:
    passes = (SwapActivation(), RoundWeights(), SwapActivation(to="relu"), RoundWeights(step=1 / 8))
    found = go(early, *passes, instruments=[CompareEach()])
    for record in (found.records[1], found.records[3]):
        assert len(record.node_errors) == 8
        assert all(error.cumulative is not None for error in record.node_errors)


@pytest.mark.parametrize("before", [(), (RoundWeights(),)], ids=["first", "after a lossy pass"])
def test_a_value_that_is_scaled_stands_for_no_value_of_the_original(
    early: Program, before: tuple[Pass, ...]
) -> None:
    def scale(p: Program, rewriter: Rewriter) -> None:
        """Twice as large before the activation, and halved behind it."""
        (relu,) = [n for n in p.operators if n.target is aten.relu.default]
        rewriter.insert_before(relu)
        twice = rewriter.call(aten.mul.Tensor, (relu.args[0], 2), like=relu)
        high = rewriter.call(aten.relu.default, (twice,), like=relu)
        rewriter.replace(relu, rewriter.call(aten.mul.Tensor, (high, 0.5), like=relu))

    def clip(p: Program, rewriter: Rewriter) -> None:
        (relu,) = [n for n in p.operators if n.target is aten.relu.default]
        rewriter.insert_before(relu)
        rewriter.replace(relu, rewriter.call(aten.relu6.default, relu.args, like=relu))

    lossy = edits(clip, contract=Contract.LOSSY)
    plain = go(early, *before, lossy, instruments=[CompareEach()]).records[-1].node_errors
    scaled = go(early, *before, edits(scale), lossy, instruments=[CompareEach()])
    assert [error.cumulative is None for error in plain] == [False]
    assert [error.cumulative is None for error in scaled.records[-1].node_errors] == [True]
