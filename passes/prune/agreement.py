"""Whether a classifier decides as before: the share of inputs whose largest score is the same."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.observe.feeding import Batches


def decisions(program: Program, batches: Batches) -> Tensor | None:
    """Which class each input gets, int64 ``[inputs]``; None of what is no classifier.

    A classifier gives one value, of floating point, ``[batch, classes]``.
    """
    found = []
    for inputs in batches:
        outputs = run(program, inputs)
        scores = outputs[0] if len(outputs) == 1 else None
        if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < 2:
            return None
        if not scores.is_floating_point():
            return None
        found.append(scores.argmax(1))
    return torch.cat(found) if found else None


def agreement(before: Tensor, after: Tensor | None) -> tuple[float, int]:
    """The share of decisions that are equal, and of how many.

    Raises:
        ValueError: there are not as many after as before.
    """
    if after is None or len(after) != len(before):
        raise ValueError("decisions on other inputs cannot be compared")
    return float((before == after).double().mean()), len(before)
