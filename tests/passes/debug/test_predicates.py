"""What each predicate calls bad, and what it says it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.compare import bounds_of
from planish.ir.errors import PassError, UsageError, VerificationError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.debug.predicates import (
    Crashes,
    KeepsContract,
    MaxAbs,
    MinSqnr,
    NonFinite,
    Predicate,
)
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from tests.passes.debug.damaging import Damage, How, chain


class Shift(nn.Module):
    """One addition."""

    def __init__(self, by: float = 0.0):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Log(nn.Module):
    """Finite only for positive inputs."""

    def __init__(self, by: float = 0.0):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, torch.log(x + self.by)


def traced(module: nn.Module, x: Tensor | None = None) -> Program:
    x = torch.tensor([[1.0, 2.0, 2.0, 4.0]]) if x is None else x
    return capture(module.eval(), (x,), dynamic_shapes=({0: Dim("batch", max=8)},))


def damaged(length: int, how: How) -> Program:
    recipe = Recipe((Damage(at=(0,), how=how),))
    return run_pipeline(chain(length), recipe, PassContext()).program


@pytest.mark.parametrize(
    ("predicate", "by", "bad", "text"),
    [
        (MinSqnr(20), 0.5, True, "SQNR 14.0 dB"),  # sqrt(25) against 4 times 0.5
        (MinSqnr(13), 0.5, False, "SQNR 14.0 dB"),
        (MinSqnr(300), 0.0, False, "SQNR inf dB"),
        (MaxAbs(0.4), 0.5, True, "max abs 0.5"),
        (MaxAbs(0.5), 0.5, False, "max abs 0.5"),
        (MaxAbs(0.5), float("nan"), True, "max abs inf"),
        (MinSqnr(20), float("nan"), True, "SQNR -inf dB"),
    ],
)
def test_numbers(predicate: Predicate, by: float, bad: bool, text: str) -> None:
    assert not predicate.prepare(traced(Shift())).bad
    verdict = predicate.judge(traced(Shift(by)))
    assert (verdict.bad, verdict.text) == (bad, text)


@pytest.mark.parametrize("predicate", [MinSqnr(20), MaxAbs(1.0)])
def test_another_shape_is_bad(predicate: Predicate) -> None:
    predicate.prepare(traced(Shift()))
    verdict = predicate.judge(traced(nn.Flatten(0)))
    assert verdict.bad
    assert "shape" in verdict.text


def test_calibration_batches_count_too() -> None:
    original, other = traced(Log(1.0)), traced(Log(1.001))
    near: list[tuple[Any, ...]] = [(torch.full((2, 4), -0.9995),)]
    alone, more = MinSqnr(40), MinSqnr(40, calibration=near)
    for predicate in (alone, more):
        predicate.prepare(original)
    assert not alone.judge(other).bad
    assert more.judge(other).bad


def test_a_calibration_iterable_is_read_again_for_every_program() -> None:
    class Batches:
        reads = 0

        def __iter__(self) -> Any:
            Batches.reads += 1
            return iter([(torch.ones(1, 4),)])

    predicate = MaxAbs(1.0, calibration=Batches())
    predicate.prepare(traced(Shift()))
    predicate.judge(traced(Shift(0.5)))
    assert Batches.reads == 2


def test_answers_beyond_the_limit_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.passes.debug import bisect_predicate

    monkeypatch.setattr(bisect_predicate, "_KEPT_BYTES", 0)
    predicate = MaxAbs(0.4)
    predicate.prepare(traced(Shift()))
    assert predicate.judge(traced(Shift(0.5))).text == "max abs 0.5"


def test_non_finite_names_the_output_and_the_inputs() -> None:
    predicate = NonFinite()
    assert not predicate.prepare(traced(Log())).bad
    assert not predicate.judge(traced(Log(1.0))).bad
    verdict = predicate.judge(traced(Log(-1.5)))
    assert verdict.bad
    assert verdict.text == "1 values of output_1 are not finite at the sample inputs"


def test_non_finite_takes_what_the_original_has_for_given() -> None:
    x = torch.tensor([[-1.0, 2.0, 2.0, 4.0]])
    predicate = NonFinite()
    assert not predicate.prepare(traced(Log(), x)).bad  # NaN at one place
    assert not predicate.judge(traced(Log(), x)).bad
    assert predicate.judge(traced(Log(-3.0), x)).bad  # and at others


def test_a_crash_is_raised_and_says_where() -> None:
    predicate = Crashes()
    assert not predicate.prepare(traced(Shift())).bad
    broken = traced(Shift())
    weight = broken.operators[0]
    weight.args = (weight.args[0], torch.ones(3))  # of no use for 4 columns
    with pytest.raises(PassError, match="no longer runs on the sample inputs"):
        predicate.judge(broken)


def test_a_crash_at_other_sizes_counts() -> None:
    """A size that became a constant is only seen at another size."""
    predicate = Crashes()
    predicate.prepare(traced(Shift()))
    fixed = traced(Shift())
    add = fixed.operators[0]
    add.args = (add.args[0], torch.ones(1, 4).expand(1, 4))
    assert not predicate.judge(fixed).bad  # broadcasts at any size
    add.args = (add.args[0], torch.ones(3, 4))
    run(fixed, (torch.ones(1, 4),))
    with pytest.raises(PassError, match="the second probe"):
        predicate.judge(fixed)


def watch(predicate: Predicate, program: Program, recipe: Recipe) -> Callable[[], object]:
    predicate.prepare(program)
    return lambda: run_pipeline(program, recipe, PassContext(), predicate.watchers())


@pytest.mark.parametrize(
    ("how", "crashes", "breaks"),
    [("scale", False, True), ("type", False, True), ("crash", True, True), ("drift", False, False)],
)
def test_what_stops_a_watched_run(how: How, crashes: bool, breaks: bool) -> None:
    recipe = Recipe((Damage(at=(1,), how=how),))
    for predicate, stops in ((Crashes(), crashes), (KeepsContract(), breaks)):
        go = watch(predicate, chain(3), recipe)
        if stops:
            with pytest.raises((PassError, VerificationError)):
                go()
        else:
            go()


def test_the_contract_takes_given_bounds() -> None:
    recipe = Recipe((Damage(at=(1,)),))
    predicate = KeepsContract(bounds=(10.0,))
    watch(predicate, chain(3), recipe)()  # anything goes
    assert KeepsContract().watches


def test_the_contract_of_all_passes_together() -> None:
    predicate = KeepsContract()
    assert predicate.prepare(chain(2)).text == "it is a valid program, and runs"
    assert not predicate.judge(damaged(2, "drift")).bad
    verdict = predicate.judge(damaged(2, "scale"))
    assert verdict.bad
    assert "the bound for f32 is 0.0001" in verdict.text
    assert predicate.bounds == bounds_of(chain(2))


def test_the_contract_refuses_an_invalid_original() -> None:
    program = chain(2)
    node = program.operators[0]
    node.meta["val"] = node.meta["val"].to(torch.float64)
    with pytest.raises(VerificationError):
        KeepsContract().prepare(program)


@pytest.mark.parametrize(
    "predicate", [MinSqnr(20), MaxAbs(1.0), NonFinite(), Crashes(), KeepsContract()]
)
def test_without_samples_nothing_can_be_asked(predicate: Predicate) -> None:
    program = chain(2)
    program.samples = ()
    with pytest.raises(UsageError, match="no sample inputs"):
        predicate.prepare(program)


@pytest.mark.parametrize(
    ("predicate", "text"),
    [
        (MinSqnr(20), "SQNR of every output against the original is at least 20 dB"),
        (MaxAbs(0.5), "no output differs from the original's by more than 0.5"),
        (NonFinite(), "outputs are finite where the original's are"),
        (Crashes(), "no pass fails, and the program runs"),
        (KeepsContract(), "every pass keeps its contract"),
    ],
)
def test_each_says_what_it_demands(predicate: Predicate, text: str) -> None:
    assert predicate.text == text
