"""Rows of weights that are shorter than a block."""

from __future__ import annotations

import torch
from torch import nn

import planish
from planish.ir.ops import op_name
from planish.ir.program import Program


def _dtypes(program: Program) -> list[object]:
    return [
        node.kwargs["dtype"]
        for node in program.operators
        if op_name(node.target) == "planish.dequantize"
    ]


def test_blocks_that_rows_do_not_fill_leave_no_budget_for_more_bits() -> None:
    """A row of 8 takes a whole block of 32 in a file, which is 20.5 bits for each number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    result = planish.optimize(model, torch.randn(2, 8), recipe="int4-weight")
    assert _dtypes(result.program) == ["uint4", "uint4"]
    assert "20.50 bits, over the 5.82 allowed: none is written in int8" in " ".join(
        str(result.report).split()
    )
