"""Timing on a target: order and errors, never seconds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planish.backends.timer import TargetTimer
from planish.ir.capture import capture
from planish.ir.errors import PlanishError


@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
def test_each_program_gets_its_seconds(target: str) -> None:
    x = torch.randn(64, 512)
    large, small = nn.Linear(512, 2048), nn.Linear(512, 4)
    programs = [(capture(m.eval(), (x,)), (x,)) for m in (large, small)]
    seconds = TargetTimer(target).seconds(programs)
    assert len(seconds) == 2
    assert all(0 < each < float("inf") for each in seconds)


def test_an_unknown_target_is_an_error_at_once() -> None:
    with pytest.raises(PlanishError, match="unknown target"):
        TargetTimer("onyx")
