"""How far a sweep is reaches whoever watches the run."""

import pytest
import torch
from torch import nn

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.passes.base import PassContext, PassResult
from planish.passes.calibrate import spool
from planish.passes.instruments import Event, Progress
from planish.passes.observe import observe
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.quantize import Quantize
from planish.passes.recipe import Recipe
from tests.support.example_passes import calling


def sweep(program: Program, context: PassContext) -> PassResult:
    observe(program, ["linear"], context.calibration, tell=context.tell)
    return PassResult(program)


@pytest.mark.parametrize("pass_", [calling(sweep), Quantize()], ids=["observe", "quantize"])
def test_batches_are_told_between_begin_and_end_of_a_pass(pass_: object) -> None:
    program = capture(nn.Linear(16, 16).eval(), (torch.randn(3, 16),))
    events: list[Event] = []
    told: list[tuple[int, int]] = []
    with spool([torch.randn(3, 16) for _ in range(4)], program) as batches:
        context = PassContext(
            calibration=batches, tell=lambda done, total: told.append((done, total))
        )
        run_pipeline(program, Recipe((pass_,)), context, [Progress(events.append)])  # type: ignore[arg-type]  # both are passes
    assert [e.kind for e in events] == ["begin", "pass", *["batch"] * 5, "done", "end"]
    batch_events = [e for e in events if e.kind == "batch"]
    assert [(e.batch, e.batches) for e in batch_events] == [(n, 4) for n in range(5)] == told
    assert {(e.index, e.total) for e in batch_events} == {(1, 1)}
