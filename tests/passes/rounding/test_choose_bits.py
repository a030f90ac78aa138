"""choose-bits: the weights that few bits hurt most take more, within a budget."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.recipe import resolve
from planish.passes.rounding.choose_bits import ChooseBits, affordable, stored_bits
from planish.passes.rounding.gptq import Gptq
from planish.passes.rounding.hqq import Hqq
from planish.passes.rounding.targets import find_weights
from tests.passes.rounding.nets import calibrated, small_lm
from tests.support.check import run_checked


class Branches(nn.Module):
    """Three products of one size; the gains say how much each of them counts."""

    def __init__(self, gains: tuple[float, float, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in gains)
        self.gains = gains

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            total = total + gain * layer(x)
        return total


def program_of(gains: tuple[float, float, float]) -> tuple[Any, PassContext]:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    program = capture(Branches(gains).eval(), (x,))
    return program, PassContext(calibration=spool([x], program))


@pytest.mark.parametrize("loudest", [0, 1, 2])
def test_the_weight_that_counts_most_takes_the_bits(loudest: int) -> None:
    gains = [0.1, 0.1, 0.1]
    gains[loudest] = 3.0
    program, context = program_of((gains[0], gains[1], gains[2]))
    remarks: list[str] = []
    context.remark = remarks.append
    # 64 x 64 each: 8.5 bits in int8 with blocks of 64, 5.125 in uint4: room for one of three.
    options: dict[str, Any] = {"block_size": 64, "mean_bits": 5.125 + 3.375 / 3 + 0.01}
    result = run_checked(program, ChooseBits(**options), context)
    assert len(result.changes) == 1
    assert f"layers.{loudest}.weight" in remarks[0]
    assert "1 of 3 weights are in int8, blocks of 64" in remarks[0]
    assert "6.25 bits" in remarks[0]
    worst = min(result.operators, key=lambda e: e.output_db)
    assert worst.node == ("linear", "linear_1", "linear_2")[loudest]
    rounded = Hqq().run(result.program.clone(), PassContext()).program
    alone = Hqq().run(program.clone(), PassContext()).program
    sample = (torch.randn(50, 64),)
    (exact,) = run(program, sample)
    errors = [float((run(p, sample)[0] - exact).norm()) for p in (rounded, alone)]
    assert errors[0] < errors[1] / 4


def test_bits_of_a_file() -> None:
    weights, _ = find_weights(small_lm())
    up = next(w for w in weights if w.name == "up.weight")  # [144, 72]
    assert stored_bits(up, up.scheme("uint4", 32, None)) == 144 * 3 * (32 * 4 + 32 + 4)
    assert stored_bits(up, up.scheme("int8", 128, None)) == 144 * (128 * 8 + 32)
    assert stored_bits(up, up.scheme("int8", 0, None)) == 144 * (128 * 8 + 32)


def test_the_budget_is_spent_by_noise_per_bit() -> None:
    noise = {"a": 8.0, "b": 3.0, "c": 2.0, "d": 0.0}
    extra = {"a": 100, "b": 10, "c": 10, "d": 1}
    assert affordable(noise, extra, 25) == ("b", "c")  # a does not fit, d makes no noise
    assert affordable(noise, extra, 120) == ("b", "c", "a")
    assert affordable(noise, extra, 0) == ()


def test_without_data_it_goes_by_the_weights_and_says_so() -> None:
    remarks: list[str] = []
    context = PassContext(remark=remarks.append)
    result = ChooseBits(mean_bits=8.0, block_size=32).run(small_lm(), context)
    assert result.changes
    assert not result.operators
    assert "there is no calibration data" in remarks[0]


def test_a_budget_below_four_bits_is_refused() -> None:
    with pytest.raises(PassError, match="mean_bits is 5, and uint4"):
        ChooseBits(mean_bits=5.0).run(small_lm(), PassContext())


def test_gptq_rounds_by_hqq_where_it_may_and_says_so() -> None:
    with pytest.raises(RequirementError):
        Gptq().run(small_lm(), PassContext())
    pass_ = Gptq(without_data="hqq")
    assert pass_.needs() == frozenset()
    remarks: list[str] = []
    found = pass_.run(small_lm(), PassContext(remark=remarks.append)).program
    assert str(found) == str(Hqq().run(small_lm(), PassContext()).program)
    assert remarks == ["there is no calibration data: hqq rounded, not gptq"]
    program = small_lm()
    by_data = pass_.run(program.clone(), calibrated(program)).program
    codes = next(n for n in by_data.constants if n.endswith("up.codes"))
    own, other = by_data.constants[codes], found.constants[codes]
    assert isinstance(own, Tensor)
    assert isinstance(other, Tensor)
    assert not torch.equal(own, other)


def test_the_recipe_and_options_round_trip() -> None:
    assert [p.name for p in resolve("int4-weight").passes][-3:] == [
        "choose-bits",
        "fuse-parallel-linears",
        "gptq",
    ]
    (parsed,) = resolve("choose-bits{mean_bits=6,low_block_size=64}").passes
    assert parsed == ChooseBits(mean_bits=6.0, low_block_size=64)
