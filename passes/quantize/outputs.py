"""Judge a program by its outputs on many batches, with padding left out where a mask says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.ir.compare import Accumulator, Fidelity, worst
from planish.ir.errors import UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.spec import suggestion

Batch = Sequence[Any]


@dataclass(frozen=True)
class Padding:
    """Which elements of the outputs count: those that an input mask keeps.

    A mask is an input that holds 0 (or False) where there is padding. It applies to every output
    whose first axes are the mask's own: a mask [B, T] to an output [B, T, D].

    Attributes:
        position: of the mask among the flat inputs; None for no mask.
    """

    position: int | None = None

    @classmethod
    def named(cls, program: Program, name: str | None) -> Padding:
        """The mask of this name: the caller's own, or that of the placeholder.

        Raises:
            UsageError: the program has no such input.
        """
        names = program.signature.tensor_names
        nodes = [node.name for node in program.placeholders]
        if name in nodes and name not in names:
            return cls(nodes.index(name))
        if name is not None and name not in names:
            raise UsageError(
                f"the padding mask {name!r} is no input", hint=suggestion(name, names, "inputs")
            )
        return cls(None if name is None else names.index(name))

    def kept(self, inputs: Batch, output: Tensor) -> Tensor | None:
        """A boolean mask that broadcasts to an output; None where everything counts."""
        if self.position is None:
            return None
        mask = inputs[self.position]
        rank = mask.dim()
        if output.dim() < rank or output.shape[:rank] != mask.shape:
            return None
        kept: Tensor = (mask != 0).reshape(*mask.shape, *[1] * (output.dim() - rank))
        return kept

    def apply(self, inputs: Batch, outputs: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs with padding set to zero, so that it has no part in any difference."""
        found = []
        for output in outputs:
            mask = self.kept(inputs, output) if isinstance(output, Tensor) else None
            found.append(output if mask is None else output * mask.to(output.dtype))
        return tuple(found)


def noise(reference: Sequence[Any], outputs: Sequence[Any]) -> float:
    """Energy of the difference over that of the reference, added up over the outputs."""
    total = 0.0
    for b, a in zip(reference, outputs, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            errors = Accumulator()
            errors.add(b, a)
            found = errors.fidelity()
            total += 0.0 if found.equal else 10.0 ** (-found.sqnr_db / 10.0)
    return total


@dataclass(frozen=True)
class Score:
    """How near a program's outputs are to the reference.

    Attributes:
        fidelity: over all batches together; of several outputs, the worst of each metric.
        metric: mean over the batches of the user's own metric, or what it gives for all batches
            with labels; None where there is none.
    """

    fidelity: Fidelity
    metric: float | None = None

    def __str__(self) -> str:
        text = f"{self.fidelity.sqnr_db:.1f} dB, cosine {self.fidelity.cosine:.5f}"
        return text if self.metric is None else f"{text}, metric {self.metric:.5g}"


class Judge:
    """Compares programs with one reference, on the same batches.

    Args:
        reference: the program in floating point.
        batches: flat inputs; run once through the reference, whose outputs are kept.
        padding: what does not count.
        metric: ``metric(outputs, reference)`` on the model's own output structure.
        labeled: batches with labels; then the metric is ``metric(model, labeled)``, called once for
            a program, which the model runs.
    """

    def __init__(
        self,
        reference: Program,
        batches: Sequence[Batch],
        padding: Padding,
        metric: Callable[[Any, Any], float] | None = None,
        labeled: Iterable[Any] | None = None,
    ):
        self.signature = reference.signature
        self.batches = batches
        self.padding = padding
        self.metric = metric
        self.labeled = labeled
        self.answers = [run(reference, inputs) for inputs in batches]

    def score(self, program: Program) -> Score:
        """Run a program on all batches.

        Raises:
            UsageError: the metric fails, or returns no finite number.
        """
        parts: list[Accumulator] = [Accumulator() for _ in self.signature.output_names]
        metrics: list[float] = []
        for inputs, answer in zip(self.batches, self.answers, strict=True):
            outputs = run(program, inputs)
            masked = (self.padding.apply(inputs, answer), self.padding.apply(inputs, outputs))
            for part, b, a in zip(parts, *masked, strict=False):
                part.add(b, a)
            if self.metric is not None and self.labeled is None:
                unflatten = self.signature.unflatten
                metrics.append(self._metric(unflatten(outputs), unflatten(answer)))
        if self.metric is not None and self.labeled is not None:
            metrics.append(self._metric(program, self.labeled))
        fidelity = worst([part.fidelity() for part in parts[: len(self.answers[0])]])
        assert fidelity is not None  # capture refuses programs without outputs
        return Score(fidelity, sum(metrics) / len(metrics) if metrics else None)

    def _metric(self, one: object, other: object) -> float:
        assert self.metric is not None
        try:
            with torch.no_grad():
                value = float(self.metric(one, other))
        except Exception as error:  # the user's own code
            raise UsageError(
                f"the metric failed: {type(error).__name__}: {error}",
                hint="it is called as metric(outputs, reference), both as the model returns them"
                if self.labeled is None
                else "with labeled data it is called as metric(model, labeled)",
            ) from error
        if not math.isfinite(value):
            raise UsageError(f"the metric returned {value}", hint="return a finite number")
        return value
