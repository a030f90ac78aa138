"""Capture once, prune by several methods, and read what each of them gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.live_bytes import LiveBytes

MULTIPLY = (aten.linear.default, aten.convolution.default, aten.conv2d.default, aten.addmm.default)


@dataclass(frozen=True)
class Outcome:
    """A pruned program.

    Attributes:
        program: with typed sparse constants.
        weights: how many constants were pruned.
        refused: how many were not, for a reason.
        seconds: of the pass, its statistics in it.
        cpu_seconds: of all threads of the process meanwhile.
        peak_bytes: of tensors made by the pass that were alive at once; 0 where not counted.
    """

    program: Program
    weights: int
    refused: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0


def captured(model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None) -> Program:  # noqa: ANN401 - as torch.export takes it
    """The exact program of a model."""
    program = capture(model, args, dynamic_shapes=dynamic_shapes)
    return run_pipeline(program, Recipe.parse("exact")).program


def ends(program: Program) -> tuple[str, str]:
    """Names of the first and the last operator that multiplies by a weight."""
    names = [node.name for node in program.operators if is_op(node, *MULTIPLY)]
    return names[0], names[-1]


def step(score: str, *, exclude: Sequence[str] = (), padding_mask: str = "", **more: object) -> str:
    """A step of a recipe: ``sparsify{...}``."""
    options = {"pattern": "2:4", "score": score, **more}
    if padding_mask and score != "magnitude":
        options["padding_mask"] = padding_mask
    text = ",".join(f"{name}={value}" for name, value in options.items())
    if exclude:
        text += f",where={{exclude=[{','.join(exclude)}]}}"
    return f"sparsify{{{text}}}"


def pruned(
    program: Program, recipe: str, calls: Sequence[tuple[Any, ...]], *, count_bytes: bool = False
) -> Outcome:
    """Run a recipe on a program.

    Args:
        program: is not changed.
        recipe: of one step, ``sparsify``.
        calls: calibration inputs.
        count_bytes: whether to count memory, which costs a little time.
    """
    context = PassContext()
    watch = LiveBytes()
    with spool(calls, program) as context.calibration:
        start, used = time.perf_counter(), time.process_time()
        if count_bytes:
            with watch:
                done = run_pipeline(program, Recipe.parse(recipe), context)
        else:
            done = run_pipeline(program, Recipe.parse(recipe), context)
        seconds, used = time.perf_counter() - start, time.process_time() - used
    record = done.records[-1]
    return Outcome(
        done.program, len(record.changes), len(record.refusals), seconds, used, watch.peak
    )


def outputs(program: Program, batches: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """The first output for every batch."""
    found: list[Tensor] = [run(program, inputs)[0] for inputs in batches]
    return found


def answers(program: Program, inputs: Tensor, batch: int = 250) -> Tensor:
    """Logits of a classifier, ``[N, classes]``."""
    return torch.cat(outputs(program, [(part,) for part in inputs.split(batch)]))
