"""adaround where one table is embedding and output layer at once."""

from __future__ import annotations

from planish.ir.execute import run
from planish.passes.quantize.weights import decibels
from planish.passes.rounding.adaround import AdaRound
from planish.passes.rounding.round_weights import RoundWeights
from tests.passes.rounding.nets import calibrated, ids, small_lm
from tests.support.check import check


def test_a_tied_table_is_rounded_once_and_the_layers_between_still_are() -> None:
    program = small_lm(tied=True)
    context = calibrated(program)
    result = check(program, (), AdaRound(dtype="int4", iterations=20), changes=5, context=context)
    plain = RoundWeights(dtype="int4", block_size=0).run(program.clone(), context).program
    inputs = (ids(99),)
    reference = run(program, inputs)[0]
    learned, nearest = (decibels(reference, run(p, inputs)[0]) for p in (result.program, plain))
    assert learned > nearest + 1
