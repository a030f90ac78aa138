"""correct-bias: known answers, and the mean errors it takes away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.compare import Accumulator, Fidelity
from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.ir.ops import argument
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.outputs import Judge, Score
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe
from planish.passes.rounding.biases import corrected
from planish.passes.rounding.correct_bias import CorrectBias, proven
from tests.support.check import check, refuses

X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0)) + 3


class Convs(nn.Module):
    """A difference filter over large positive values: rounding shifts all of its outputs."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, bias=bias)
        self.second = nn.Conv2d(6, 4, 3, groups=2, bias=bias)
        with torch.no_grad():
            for conv in (self.first, self.second):
                conv.weight -= conv.weight.mean((1, 2, 3), keepdim=True)
                conv.weight[:, 0, 0, 0] *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Linears(nn.Module):
    """A linear without a bias, behind one with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 8)
        self.second = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def _quantized(module: nn.Module, x: Tensor, **options: str) -> tuple[Program, PassContext]:
    """The program as `quantize` leaves it, and a context that knows the one before."""
    floating = capture(module.eval(), (x,), {})
    context = PassContext(calibration=spool([(x,), (x.flip(0),)], floating))
    context.float_program = floating.clone
    quantized = Quantize(weights="int4", **options).run(floating.clone(), context)  # type: ignore[arg-type]  # the caller's options
    return quantized.program, context


def _bias_error(program: Program, context: PassContext, x: Tensor, axis: int) -> float:
    assert context.float_program is not None
    (reference,), (found,) = run(context.float_program(), (x,)), run(program, (x,))
    others = [d for d in range(reference.dim()) if d != axis]
    return float((found - reference).mean(others).abs().max())


# -- known answers --------------------------------------------------------------------------------


def test_an_integer_bias_moves_by_whole_steps() -> None:
    bias, scale = torch.tensor([10, -4], dtype=torch.int32), torch.tensor([0.5, 0.25])
    found = corrected(bias, scale, torch.tensor([1.2, -0.3], dtype=torch.float64))
    assert found is not None
    assert found[0].tolist() == [12, -5]  # 6.2 / 0.5 and -1.3 / 0.25
    torch.testing.assert_close(found[1], torch.tensor([1.0, -0.25], dtype=torch.float64))


def test_what_a_step_does_not_resolve_changes_nothing() -> None:
    bias, scale = torch.tensor([10], dtype=torch.int32), torch.tensor([0.5])
    assert corrected(bias, scale, torch.tensor([0.2], dtype=torch.float64)) is None
    assert corrected(torch.ones(2), None, torch.tensor([1e-7, 0], dtype=torch.float64)) is None


def test_a_float_bias_takes_all_of_it_and_a_missing_one_comes_to_be() -> None:
    error = torch.tensor([0.125, -2.0], dtype=torch.float64)
    found, fresh = corrected(torch.tensor([1.0, 1.0]), None, error), corrected(None, None, error)
    assert found is not None
    assert fresh is not None
    assert found[0].tolist() == [1.125, -1.0]
    assert fresh[0].tolist() == [0.125, -2.0]


def test_integers_that_do_not_fit_are_not_written() -> None:
    bias, scale = torch.zeros(1, dtype=torch.int32), torch.tensor([1e-12])
    assert corrected(bias, scale, torch.tensor([1.0], dtype=torch.float64)) is None


# -- fires ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_lose_their_mean_error(bias: bool) -> None:
    program, context = _quantized(Convs(bias=bias), X)
    before = _bias_error(program, context, X, 1)
    result = check(program, (), CorrectBias(), changes=2, context=context)
    after = _bias_error(result.program, context, X, 1)
    assert after < before / 20
    dtypes = {str(n.kwargs["dtype"]) for n in result.program.operators if "axis" in n.kwargs}
    assert dtypes == {"int4", "int32"}
    assert "its bias moved by" in result.changes[0].detail


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight"])
def test_linears_lose_it_in_every_mode(mode: str) -> None:
    x = X.movedim(1, -1)
    program, context = _quantized(Linears(), x, mode=mode)
    before = _bias_error(program, context, x, 3)
    result = check(program, (), CorrectBias(), changes=2, context=context)
    assert _bias_error(result.program, context, x, 3) < before / 20
    (second,) = [n for n in result.program.operators if n.name == "linear_1"]
    # Where the scale of its input is known the new bias is int32, else it is plain.
    assert str(argument(second, "bias")).startswith("dequantize") == (mode == "static")


def test_later_layers_are_corrected_with_the_earlier_ones_corrected() -> None:
    program, context = _quantized(Convs(), X)
    whole = CorrectBias().run(program.clone(), context).program
    # Correcting the second alone has to make up for the first as well.
    alone = CorrectBias(where=Where(include=("second",))).run(program.clone(), context).program
    names = [n for n in whole.constants if n.startswith("second.bias") and "scale" not in n]
    one, other = ([p.constants[n] for n in names] for p in (whole, alone))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]  # a tensor, no module
    assert _bias_error(alone, context, X, 1) < _bias_error(program, context, X, 1) / 20


def test_padding_has_no_part_in_the_means() -> None:
    class Masked(Linears):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # takes a mask as well
            return super().forward(x) * mask.unsqueeze(-1)

    x, mask = X.flatten(2).transpose(1, 2).contiguous(), torch.ones(8, 100)
    mask[:, 60:] = 0
    loud = x.clone()
    loud[:, 60:] = 40.0
    found = []
    for values in (x, loud):
        floating = capture(Masked().eval(), (values, mask), {})
        context = PassContext(calibration=spool([(values, mask)], floating))
        context.float_program = floating.clone
        program = Quantize(padding_mask="mask").run(floating.clone(), context).program
        found.append(CorrectBias(padding_mask="mask").run(program, context).program)
    same = [torch.equal(a, found[1].constants[n]) for n, a in found[0].constants.items()]  # type: ignore[arg-type]  # a tensor, no module
    assert all(same)


# -- refuses --------------------------------------------------------------------------------------


def test_an_error_below_a_step_is_refused() -> None:
    program, context = _quantized(Convs(), X)
    once = CorrectBias().run(program, context).program
    refuses(once, (), CorrectBias(), "below what its bias resolves", context=context)


def test_it_runs_behind_quantize_only() -> None:
    program = capture(Convs().eval(), (X,), {})
    context = PassContext(calibration=spool([(X,)], program))
    with pytest.raises(PassError, match="nothing is quantized"):
        CorrectBias().run(program.clone(), context)
    quantized = Quantize().run(program.clone(), context).program
    with pytest.raises(PassError, match="not known"):
        CorrectBias().run(quantized, context)
    with pytest.raises(RequirementError, match="correct-bias requires calibrated"):
        run_pipeline(program, Recipe.parse("correct-bias"))


def test_in_a_recipe_it_finds_the_float_program_by_itself() -> None:
    program = capture(Convs().eval(), (X,), {})
    context = PassContext(calibration=spool([(X,)], program))
    text = "quantize{weights=int4},correct-bias{batches=1}"
    done = run_pipeline(program, Recipe.parse(text), context)
    assert str(Recipe.parse(text)) == text
    assert [len(record.changes) > 0 for record in done.records] == [True, True]


def test_one_row_without_a_batch_has_channels_and_no_samples() -> None:
    torch.manual_seed(0)
    x = torch.randn(4)
    program, context = _quantized(nn.Linear(4, 4), x)
    after = CorrectBias().run(program.clone(), context).program
    assert context.float_program is not None
    y, before, now = (
        sum(run(p, (v,))[0] for v in (x, x.flip(0)))
        for p in (context.float_program(), program, after)
    )
    assert float((now - y).abs().max()) < 0.2 * float((before - y).abs().max())


# -- what judges ----------------------------------------------------------------------------------


def _context_of(batches: list[Tensor]) -> tuple[Program, PassContext, list[str]]:
    """A quantized program, a context that knows the one before, and the remarks to come."""
    floating = capture(Convs().eval(), (batches[0],), {})
    remarks: list[str] = []
    context = PassContext(calibration=spool([(b,) for b in batches], floating))
    context.remark = remarks.append
    context.float_program = floating.clone
    program = Quantize(weights="int4").run(floating.clone(), context).program
    return program, context, remarks


def test_what_holds_on_the_last_quarter_is_written_without_a_word() -> None:
    made = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 3, 10, 10, generator=made) + 3 for _ in range(8)]
    program, context, remarks = _context_of(batches)
    result = CorrectBias().run(program.clone(), context)
    assert len(result.changes) == 2
    assert not remarks
    assert not [r for r in result.refusals if "held-out" in r.reason]
    fresh = torch.randn(8, 3, 10, 10, generator=made) + 3
    before = _bias_error(program, context, fresh, 1)
    assert _bias_error(result.program, context, fresh, 1) < before / 5


def test_means_that_others_contradict_are_not_written() -> None:
    made = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 3, 10, 10, generator=made) + 3 for _ in range(6)]
    # The weights that rounding made too small are now read with the other sign.
    batches += [-b for b in batches[:2]]
    program, context, _ = _context_of(batches)
    result = CorrectBias(where=Where(include=("second", "first"))).run(program.clone(), context)
    reasons = [r.reason for r in result.refusals if r.rule == "correct-bias"]
    assert any("on held-out inputs its mean error would grow from" in r for r in reasons)
    assert len(result.changes) < 2


def test_few_batches_are_all_learned_from_and_that_is_said() -> None:
    program, context, remarks = _context_of([X, X.flip(0), X.flip(1)])
    assert len(CorrectBias().run(program, context).changes) == 2
    (remark,) = remarks
    assert "of 3 calibration batches none can be held out" in remark


def test_a_gain_has_to_be_more_than_chance() -> None:
    # Both have a mean of 1; the deviation of the second is 6, over the root of 4 batches 3.
    steady, wild = torch.tensor([1.0, 1.2, 0.8, 1.0]), torch.tensor([6.0, -6.0, 6.0, -2.0])
    assert proven(steady)[0]
    useful, figure = proven(wild)
    assert not useful
    assert figure == "+1.00 +- 3.00 dB"
    assert proven(torch.tensor([0.3]))[0]
    assert not proven(torch.tensor([-0.3]))[0]
    assert proven(torch.zeros(3))[0]  # exact before and after: there is no loss
    assert not proven(torch.tensor([-1.0, -1.0]))[0]


def test_where_the_outputs_do_not_gain_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(1)
    program, context, remarks = _context_of(
        [torch.randn(8, 3, 10, 10, generator=made) + 3 for _ in range(8)]
    )
    figures = iter([20.0, 19.0, 25.0, 18.0, 21.0, 18.2])  # two batches: before, both, the first
    monkeypatch.setattr(Judge, "score", lambda self, program: Score(_fidelity(next(figures))))
    result = CorrectBias().run(program, context)
    assert not result.changes
    (remark,) = remarks
    assert remark.endswith(": none are written")
    assert "with those of the first 2 operators" in remark
    assert "with those of the first 1 operators" in remark
    assert [r.reason for r in result.refusals][-2:] == [
        remark.removesuffix(": none are written")
    ] * 2


def _fidelity(decibels: float) -> Fidelity:
    """Of which only the signal to noise is read."""
    values = torch.ones(4, dtype=torch.float64)
    sums = Accumulator()
    sums.add(values, values + 10 ** (-decibels / 20))
    return sums.fidelity()
