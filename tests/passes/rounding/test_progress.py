"""Passes that take long say how far they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.passes.base import Pass, PassContext
from planish.passes.calibrate import spool
from planish.passes.equalize.smooth_quant import SmoothQuant
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.keep_float import KeepFloat
from planish.passes.quantize.quantize import Quantize
from planish.passes.recipe import Recipe
from planish.passes.rounding.adaround import AdaRound
from planish.passes.rounding.awq import Awq
from planish.passes.rounding.choose_bits import ChooseBits
from planish.passes.rounding.correct_bias import CorrectBias
from planish.passes.rounding.gptq import Gptq
from planish.passes.rounding.hqq import Hqq
from planish.passes.rounding.split_outliers import SplitOutliers

LONG: dict[str, Pass] = {
    "gptq": Gptq(block_size=4),
    "adaround": AdaRound(iterations=2),
    "awq": Awq(block_size=4),
    "hqq": Hqq(block_size=4),
    "smooth-quant": SmoothQuant(),
    "split-outliers": SplitOutliers(),
    "choose-bits": ChooseBits(mean_bits=20.0, batches=4),
    "correct-bias": CorrectBias(),
    "keep-float": KeepFloat(min_sqnr_db=30.0),
}


class Net(nn.Module):
    """A norm, two linears that read it, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


@pytest.mark.parametrize("name", LONG)
def test_a_long_pass_tells_its_steps_from_none_to_all(name: str) -> None:
    program = capture(Net().eval(), (torch.randn(3, 8),))
    told: list[tuple[int, int]] = []
    with spool([torch.randn(3, 8) for _ in range(4)], program) as batches:
        context = PassContext(calibration=batches)
        if name in ("correct-bias", "keep-float"):
            quantized = run_pipeline(program, Recipe((Quantize(),)), context).program
            context = replace(context, float_program=program.clone)
            program = quantized
        tell = replace(context, tell=lambda done, total: told.append((done, total)))
        LONG[name].run(program.clone(), tell)
    assert len({total for _, total in told}) == 1
    done = [number for number, _ in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == told[-1][1]
    assert len(set(done)) > 3
