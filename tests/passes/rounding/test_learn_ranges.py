"""learn-ranges: scales by module-wise reconstruction; what teacher forcing promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext, PassResult
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.operands import QUANTIZE
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.restore import quantized_operators
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe, resolve
from planish.passes.rounding.learn_ranges import LearnRanges
from planish.passes.rounding.modules import modules_of
from planish.passes.rounding.side_by_side import Batch
from tests.support.check import run_checked

NAMES = ("linear", "linear_1", "linear_2")


class Net(nn.Module):
    """Three layers of different values, each behind a relu, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x)))) + x
        return self.c(y)


def _batches(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 12, generator=generator) for _ in range(count)]


def _setting() -> tuple[Program, PassContext]:
    """A program quantized by ranges ten times too wide, and a context that knows what it was."""
    floating = capture(Net().eval(), (torch.randn(16, 12),))
    wide = PassContext(calibration=spool([10 * x for x in _batches(0, 8)], floating))
    program = run_pipeline(floating, Recipe((Quantize(range="minmax"),)), wide).program
    near = spool(_batches(0, 8), floating)
    return program, PassContext(calibration=near, float_program=floating.clone)


def _scales(program: Program) -> dict[str, float]:
    """The scale of the value that each product reads."""
    found = {}
    for node in quantized_operators(program):
        scale = program.constant(node.args[0].args[1])  # type: ignore[union-attr]  # a node
        assert scale is not None
        found[node.name] = float(scale)
    return found


def _learned(pass_: LearnRanges, **where: tuple[str, ...]) -> dict[str, float]:
    program, context = _setting()
    result = pass_.run(program, context) if not where else _only(pass_, program, context, **where)
    return _scales(result.program)


def _only(pass_: LearnRanges, program: Program, context: PassContext, **where: Any) -> PassResult:
    return replace(pass_, where=Where(**where)).run(program, context)


# -- known answers --------------------------------------------------------------------------------


def test_lambda_falls_from_the_teacher_to_the_quantized_inputs() -> None:
    decay = LearnRanges(forcing="decay", steps=8)
    assert [decay.share(t) for t in (0, 1, 2, 4, 8)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert {LearnRanges(forcing="teacher").share(t) for t in range(9)} == {1.0}
    assert {LearnRanges(forcing="none").share(t) for t in range(9)} == {0.0}
    node = capture(Net().eval(), (torch.randn(2, 12),)).placeholders[0]
    batch = Batch({node: torch.tensor([4.0])}, {node: torch.tensor([8.0])}, ())
    assert [float(batch.mixed(s)[node]) for s in (1.0, 0.75, 0.0)] == [4.0, 5.0, 8.0]


def test_with_lambda_one_every_module_is_a_problem_of_its_own() -> None:
    """Learned alone, first or last: each module finds the scale that it finds among all."""
    pass_ = LearnRanges(products=1, forcing="teacher", steps=20, rate=0.05)
    before, together = _scales(_setting()[0]), _learned(pass_)
    for name in NAMES:
        alone = _learned(pass_, include=(name,))
        assert alone[name] == together[name] != before[name]
        assert all(alone[other] == before[other] for other in NAMES if other != name)


def test_without_the_teacher_a_module_depends_on_those_before_it() -> None:
    pass_ = LearnRanges(products=1, forcing="none", steps=20, rate=0.05)
    together, alone = _learned(pass_), _learned(pass_, include=("linear_2",))
    assert alone["linear_2"] != together["linear_2"]


# -- fires ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forcing", ["teacher", "decay", "none"])
@pytest.mark.parametrize("products", [0, 1, 2])
def test_the_error_falls_on_inputs_that_it_has_not_seen(forcing: Any, products: int) -> None:
    program, context = _setting()
    pass_ = LearnRanges(products=products, forcing=forcing, steps=40, rate=0.05)
    result = run_checked(program, pass_, context)
    assert result.changes
    assert context.float_program is not None
    floating = context.float_program()
    errors = [0.0, 0.0]
    for x in _batches(1, 8):
        (exact,) = run(floating, (x,))
        for i, one in enumerate((program, result.program)):
            errors[i] += float((run(one, (x,))[0] - exact).square().sum())
    assert errors[1] < 0.9 * errors[0]


def _biases(program: Program) -> dict[str, tuple[Tensor, Tensor]]:
    """The value of each int32 bias, and its step, which is the product of two scales."""
    found = {}
    for node in quantized_operators(program):
        x, w, b = (node.args[i].args for i in range(3))  # type: ignore[union-attr]  # nodes
        parts = [program.constant(n) for n in (x[1], w[1], b[1], b[0])]
        s_x, s_w, s_b, codes = (part for part in parts if part is not None)
        assert codes.dtype == torch.int32
        torch.testing.assert_close(s_b, (s_x * s_w).expand_as(s_b))
        found[node.name] = codes * s_b, s_b
    return found


def test_integer_biases_keep_their_values_under_the_new_scales() -> None:
    program, context = _setting()
    before = _biases(program)
    pass_ = LearnRanges(products=1, steps=20, rate=0.05)
    after = _biases(run_checked(program, pass_, context).program)
    for name, (value, step) in after.items():
        assert not torch.equal(step, before[name][1])
        assert bool(((value - before[name][0]).abs() <= 0.5001 * step).all())


def test_one_seed_gives_one_answer() -> None:
    pass_ = LearnRanges(products=1, steps=5, rate=0.05)
    assert _learned(pass_) == _learned(pass_)


# -- refuses --------------------------------------------------------------------------------------


def test_what_does_not_hold_on_other_batches_is_not_kept() -> None:
    program, context = _setting()
    before = _scales(program)
    result = run_checked(program, LearnRanges(products=1, steps=3, rate=3.0), context)
    assert _scales(result.program) == before
    assert {r.reason for r in result.refusals} == {
        "what it learned does not hold on batches that it did not learn from"
    }


def test_it_needs_quantize_before_it_calibration_and_two_batches() -> None:
    program, context = _setting()
    assert context.float_program is not None
    with pytest.raises(PassError, match="nothing is quantized"):
        LearnRanges().run(context.float_program(), context)
    with pytest.raises(PassError, match="came to it quantized"):
        LearnRanges().run(program, replace(context, float_program=None))
    one = spool(_batches(0, 1), program)
    with pytest.raises(PassError, match="none to judge by"):
        LearnRanges().run(program, replace(context, calibration=one))
    with pytest.raises(RequirementError):
        run_pipeline(program, Recipe((LearnRanges(),)))


# -- neighbors ------------------------------------------------------------------------------------


def test_modules_cover_every_product_once() -> None:
    program, _ = _setting()
    for products, sizes in ((0, [3]), (1, [1, 1, 1]), (2, [2, 1])):
        modules = modules_of(program, products)
        assert [len(m.products) for m in modules] == sizes
        assert [n.name for m in modules for n in m.products] == list(NAMES)
        assert {q for m in modules for q in m.nodes if q.target is QUANTIZE} == {
            n for n in program.operators if n.target is QUANTIZE
        }


def test_in_a_recipe_it_finds_the_float_program_and_options_round_trip() -> None:
    floating = capture(Net().eval(), (torch.randn(16, 12),))
    recipe = resolve("quantize{range=minmax},learn-ranges{products=1,steps=5},correct-bias")
    with spool(_batches(0, 8), floating) as batches:
        done = run_pipeline(floating, recipe, PassContext(calibration=batches))
    assert [r.name for r in done.records] == ["quantize", "learn-ranges", "correct-bias"]
    (parsed,) = resolve("learn-ranges{forcing=teacher,rate=0.1}").passes
    assert parsed == LearnRanges(forcing="teacher", rate=0.1)
    with pytest.raises(ValueError, match="above 0"):
        LearnRanges(steps=0)
