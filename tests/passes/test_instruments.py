"""Instruments: what they catch at the guilty pass, and what they show."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish.passes.checking as checking
from planish.ir import Program, Rewriter, capture, text
from planish.ir.compare import Fidelity, measure, worst
from planish.ir.errors import UsageError, VerificationError
from planish.ir.execute import run as execute
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.calibrate import spool
from planish.passes.instruments import (
    CompareEach,
    Event,
    PrintAfter,
    Progress,
    StartFrom,
    Timing,
    VerifyEach,
    default_instruments,
)
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe
from tests.support.example_passes import Everything, RoundWeights, SwapActivation, calling

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.relu(self.linear(x) * mask)
        return torch.relu(hidden.reshape(x.shape[0], 2, 3)) + 0.5


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "mask": {0: batch}}
    return capture(Net().eval(), (torch.randn(3, 4), torch.ones(3, 1)), dynamic_shapes=shapes)


def run(program: Program, *passes: Pass, instruments: Any, **context: Any) -> Run:
    return run_pipeline(program, Recipe(passes), PassContext(**context), instruments)


def rewriting(edit: Callable[[Program, Rewriter], None], rule: str = "edit") -> Pass:
    """A pass that makes one recorded edit."""

    def behave(p: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(p, "calls", context.sites)
        with rewriter.site(rule, p.operators[-1]):
            edit(p, rewriter)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    return calling(behave)


def drop_mask(p: Program, rewriter: Rewriter) -> None:
    """Right where the mask is all ones, as in the sample."""
    (mul,) = [n for n in p.operators if n.target is aten.mul.Tensor]
    rewriter.replace(mul, mul.args[0])


def freeze_batch(p: Program, rewriter: Rewriter) -> None:
    """Right where the batch is the sample's."""
    (view,) = [n for n in p.operators if n.target is aten.reshape.default]
    rewriter.set_args(view, (view.args[0], [3, 2, 3]))


def transpose(p: Program, rewriter: Rewriter) -> None:
    """Another shape than the caller was promised."""
    out = p.results[0]
    rewriter.insert_before(p.output)
    p.output.args = ((rewriter.call(aten.transpose.int, (out, 1, 2), like=out),),)


# -- checks ---------------------------------------------------------------------------------------


def test_a_wrong_rewrite_is_caught_at_its_pass_with_site_output_and_diff(
    program: Program,
) -> None:
    with pytest.raises(VerificationError) as caught:
        run(program, Everything(), SwapActivation(to="gelu"), instruments=default_instruments())
    message = str(caught.value)
    assert "pass swap-activation: it is exact, and at the sample inputs output 0" in message
    assert "the bound for f32 is 0.0001" in message
    assert "relu-to-gelu at relu" in message
    assert "hidden = torch.relu(self.linear(x) * mask)" in message
    assert re.search(r"-  %(\d): f32\[batch, 6\] = aten\.relu\(%\d\)", message)
    assert re.search(r"\+  %(\d): f32\[batch, 6\] = aten\.gelu\(%\d\)", message)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (drop_mask, r"at the second probe \(batch=4\) output 0 \(output_0\) differs by"),
        (freeze_batch, r"the program no longer runs on the second probe \(batch=4\)"),
    ],
)
def test_what_holds_for_the_sample_only_is_caught_by_the_second_probe(
    program: Program, edit: Any, what: str
) -> None:
    with pytest.raises(VerificationError, match="pass calls: .*" + what):
        run(program, rewriting(edit), instruments=[CompareEach()])


def test_a_broken_invariant_is_caught_before_any_number_is_compared(program: Program) -> None:
    with pytest.raises(VerificationError, match=r"pass calls: rule same-results: "):
        run(program, rewriting(transpose), instruments=default_instruments())


def test_a_wrong_type_is_caught(program: Program) -> None:
    def lie(p: Program, context: PassContext) -> PassResult:
        done = SwapActivation().run(p, context)
        node = done.program.operators[2]
        node.meta["val"] = node.meta["val"].to(torch.float64)
        return done

    with pytest.raises(VerificationError, match="pass calls: rule operator-types"):
        run(program, calling(lie), instruments=[VerifyEach()])


def test_right_passes_are_measured_and_let_through(program: Program) -> None:
    found = run(program, Everything(), SwapActivation(), instruments=default_instruments())
    same = Fidelity(float("inf"), 1.0, 0.0, 0.0, equal=True)
    assert [r.fidelity for r in found.records] == [None, same]


def test_every_changed_program_runs_once_per_probe(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Program] = []

    def counted(p: Program, inputs: tuple[Any, ...], observe: Any = None) -> tuple[Any, ...]:
        seen.append(p)
        return execute(p, inputs, observe=observe)

    monkeypatch.setattr(checking, "run", counted)
    passes = (Everything(), SwapActivation(), Everything(), SwapActivation(), rewriting(halve))
    with pytest.raises(VerificationError):
        run(program, *passes, instruments=[CompareEach()])
    # The original on the sample (the second probe brings its answer along), then twice each.
    assert [seen.count(p) for p in dict.fromkeys(seen)] == [1, 2, 2]


def test_errors_within_the_bound_may_not_add_up_beyond_it(program: Program) -> None:
    def nudge(p: Program, rewriter: Rewriter) -> None:
        add = p.operators[-1]
        rewriter.set_args(add, (add.args[0], add.args[1] + 4e-5))  # type: ignore[operator]

    once = rewriting(nudge)
    assert run(program, once, instruments=[CompareEach()]).records[0].changed
    with pytest.raises(VerificationError, match="kept its bound, but not all together"):
        run(program, *[once] * 8, instruments=[CompareEach()])


def halve(p: Program, rewriter: Rewriter) -> None:
    add = p.operators[-1]
    rewriter.set_args(add, (add.args[0], 0.25))


def test_a_lossy_pass_is_measured_against_the_program_before_and_the_original(
    program: Program,
) -> None:
    first, second = RoundWeights(step=1 / 8), RoundWeights(step=1 / 2)
    found = run(program, first, second, instruments=default_instruments())
    one, two = found.records
    assert one.fidelity == one.cumulative
    between = run(program, first, instruments=[]).program
    sample = program.samples[0]
    expected = measure(execute(between, sample), execute(found.program, sample))
    assert two.fidelity == expected
    assert two.cumulative == measure(execute(program, sample), execute(found.program, sample))
    assert two.fidelity != two.cumulative
    assert one.fidelity is not None
    assert one.fidelity.sqnr_db > expected.sqnr_db


def test_a_lossy_pass_is_also_measured_on_calibration_data(program: Program) -> None:
    batches = [(torch.randn(2, 4), torch.ones(2, 1)), (50 * torch.randn(7, 4), torch.ones(7, 1))]
    pass_ = RoundWeights(step=1 / 8)
    with spool(batches, program) as held:
        found = run(program, pass_, instruments=[CompareEach()], calibration=held)
        first = run(program, pass_, instruments=[CompareEach(batches=1)], calibration=held)
    each = [measure(execute(program, i), execute(found.program, i)) for i in batches]
    sample = program.samples[0]
    each.append(measure(execute(program, sample), execute(found.program, sample)))
    assert found.records[0].fidelity == worst(each)
    assert first.records[0].fidelity == worst([each[0], each[2]])


def test_a_lossy_pass_without_anything_to_measure_it_on_is_an_error(program: Program) -> None:
    bare = program.clone()
    bare.samples = ()
    with pytest.raises(VerificationError, match="there is no input to measure its error on"):
        run(bare, RoundWeights(), instruments=[CompareEach()])


def test_a_lossy_pass_may_not_give_infinities_or_other_shapes(program: Program) -> None:
    def explode(p: Program, rewriter: Rewriter) -> None:
        add = p.operators[-1]
        rewriter.set_args(add, (add.args[0], float("inf")))

    for edit, what in ((explode, "not finite"), (transpose, "has shape")):
        inner = rewriting(edit)
        lossy = calling(inner.run, contract=Contract.LOSSY)
        with pytest.raises(VerificationError, match=f"it is lossy, and at the sample .*{what}"):
            run(program, lossy, instruments=[CompareEach()])


def test_checks_at_the_end_name_the_recipe(program: Program) -> None:
    wrong = SwapActivation(to="gelu")
    with pytest.raises(VerificationError, match=r"^the recipe changed what the program computes"):
        run(program, wrong, instruments=default_instruments(verify="end"))
    with pytest.raises(VerificationError, match=r"^rule same-results"):
        run(program, rewriting(transpose), instruments=default_instruments(verify="end"))
    found = run(program, SwapActivation(), instruments=default_instruments(verify="end"))
    assert found.records[0].cumulative is not None
    assert found.records[0].cumulative.equal


def test_no_checks_let_everything_through(program: Program) -> None:
    found = run(program, SwapActivation(to="gelu"), instruments=default_instruments(verify="off"))
    assert found.records[0].fidelity is None
    with pytest.raises(UsageError, match="verify is 'on'"):
        default_instruments(verify="on")  # type: ignore[arg-type]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + torch.rand_like(x))


def test_a_program_that_draws_random_numbers_raises_no_false_alarm() -> None:
    program = capture(Noisy().eval(), (torch.randn(3, 4),))
    state = torch.get_rng_state()
    found = run(program, SwapActivation(), instruments=default_instruments())
    assert found.records[0].fidelity is not None
    assert found.records[0].fidelity.equal
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(VerificationError):
        run(program, SwapActivation(to="gelu"), instruments=default_instruments())


class Brittle(nn.Module):
    """Its answer is a number on the sample itself only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.log(1.0 - (x - 2.0).abs() * 1e9))


def test_a_weakened_second_probe_is_remarked() -> None:
    program = capture(Brittle().eval(), (torch.full((2, 2), 2.0),))
    found = run(program, Everything(), SwapActivation(), instruments=default_instruments())
    (remark,) = found.records[1].remarks
    assert remark.startswith("the second probe was weakened: the program itself gives no finite")


# -- shows ----------------------------------------------------------------------------------------


def test_timing_has_one_entry_per_step_also_of_one_that_failed(program: Program) -> None:
    timing = Timing()
    run(program, Everything(), SwapActivation(), instruments=[timing, *default_instruments()])
    assert [(t.index, t.name) for t in timing.times] == [(1, "everything"), (2, "swap-activation")]
    assert all(t.seconds > 0 and t.checking >= 0 for t in timing.times)
    assert timing.times[1].checking > timing.times[0].checking
    count = len(program.operators)
    assert [(t.nodes_before, t.nodes_after) for t in timing.times] == [(count, count)] * 2
    assert "swap-activation" in timing.table().splitlines()[1]
    assert timing.table().splitlines()[-1].startswith("total")
    with pytest.raises(VerificationError):
        run(program, SwapActivation(to="gelu"), instruments=[timing, *default_instruments()])
    assert [t.name for t in timing.times] == ["swap-activation"]


@pytest.mark.parametrize(
    ("pattern", "changed", "shown"),
    [
        (".*", False, [1, 2]),
        (".*", True, [2]),
        ("swap-.*", False, [2]),
        ("fold-.*|swap-.*", True, [2]),
        ("everything|swap-activation", False, [1, 2]),
    ],
)
def test_print_after_prints_where_the_whole_name_matches(
    program: Program, pattern: str, changed: bool, shown: list[int]
) -> None:
    stream = io.StringIO()
    printer = PrintAfter(pattern, changed=changed, stream=stream)
    found = run(program, Everything(count=2), SwapActivation(), instruments=[printer])
    heads = [line for line in stream.getvalue().splitlines() if line.startswith("//")]
    assert [int(line.split()[3].rstrip(",")) for line in heads] == shown
    if 2 in shown:
        assert stream.getvalue().endswith(text(found.program) + "\n")


def test_print_after_shows_what_was_rejected(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VerificationError):
        run(
            program,
            SwapActivation(to="gelu"),
            instruments=[PrintAfter(), *default_instruments()],
        )
    printed = capsys.readouterr().out
    assert "which failed: pass swap-activation: it is exact" in printed
    assert "aten.gelu" in printed
    with pytest.raises(UsageError, match="no regular expression"):
        PrintAfter("(")


def test_print_after_nothing_is_an_error_or_a_remark(program: Program) -> None:
    passes = (Everything(), SwapActivation())
    with pytest.raises(UsageError, match="'swap' matches no pass of the recipe") as caught:
        run(program, *passes, instruments=[PrintAfter("swap")])
    assert "the whole name counts: '.*swap.*'" in str(caught.value)
    stream = io.StringIO()
    printer = PrintAfter("everything", changed=True, stream=stream)
    remarks = run(program, *passes, instruments=[printer]).records[0].remarks
    assert remarks == ("nothing was printed after 'everything': no such pass changed the program",)
    printer = PrintAfter("everything", stream=stream)
    remarks = run(program, *passes, instruments=[printer, StartFrom(2)]).records[0].remarks
    assert remarks == ("nothing was printed after 'everything': it was left out",)
    assert not stream.getvalue()


def test_progress_tells_of_every_step(program: Program) -> None:
    events: list[Event] = []
    run(program, Everything(), SwapActivation(), instruments=[Progress(events.append)])
    kinds = [(e.kind, e.total, e.index, e.name) for e in events]
    assert kinds == [
        ("begin", 2, 0, ""),
        ("pass", 2, 1, "everything"),
        ("done", 2, 1, "everything"),
        ("pass", 2, 2, "swap-activation"),
        ("done", 2, 2, "swap-activation"),
        ("end", 2, 0, ""),
    ]
    events.clear()
    instruments = default_instruments(progress=events.append)
    with pytest.raises(VerificationError):
        run(program, SwapActivation(to="gelu"), instruments=instruments)
    assert [e.kind for e in events] == ["begin", "pass", "failed", "end"]
