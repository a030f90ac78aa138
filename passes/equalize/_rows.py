"""A fixed-size random sample of the rows that values hold over all calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.observe.feeding import Batches, Padding, Tell, required
from planish.passes.observe.layout import Layout, rows_of
from planish.passes.quantize.ranges import AUTO, padding_input


def padding_name(program: Program, option: str | None) -> str | None:
    """The input that an option ``padding_mask`` means: "auto" takes an ``attention_mask``."""
    return padding_input(program) if option == AUTO else option


@dataclass
class Rows:
    """What is kept of one value.

    Attributes:
        rows: float32 [n, C], a uniform sample of all rows (vectors along the last axis).
        absmax: [C], the largest absolute value of each channel over all rows.
        count: how many rows there were.
    """

    rows: Tensor
    absmax: Tensor
    count: int


class _Reservoir:
    """Keeps the rows of the smallest random keys: a uniform sample, whatever the batches are."""

    def __init__(self, layout: Layout, size: int):
        self.layout = layout
        self.size = size
        self.keys = torch.empty(0)
        self.rows: Tensor | None = None
        self.absmax: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor, generator: torch.Generator) -> None:
        """Look at rows [n, C]."""
        absmax = rows.abs().amax(0)
        keys = torch.rand(len(rows), generator=generator)
        self.count += len(rows)
        if self.rows is None or self.absmax is None:
            self.rows, self.keys, self.absmax = rows, keys, absmax
        else:
            self.rows, self.keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
            self.absmax = torch.maximum(self.absmax, absmax)
        if len(self.keys) > self.size:
            self.keys, kept = self.keys.topk(self.size, largest=False)
            self.rows = self.rows[kept]


def sample_rows(
    program: Program,
    values: Iterable[Node],
    calibration: Batches | None,
    size: int,
    generator: torch.Generator,
    *,
    padding_mask: str | None = None,
    tell: Tell | None = None,
) -> dict[Node, Rows]:
    """Run the program once over the calibration inputs and sample the rows of some values.

    Args:
        program: what to run.
        values: operators or inputs with channels along their last axis.
        calibration: a spool.
        size: how many rows of each value are kept at most.
        generator: draws them.
        padding_mask: the input that is 0 at padding, whose rows are left out; or "auto".
        tell: called with (batches done, batches in all).

    Raises:
        RequirementError: there is no calibration, or nothing but padding reaches a value.
        PassError: a value holds NaN or infinity.
    """
    spool = required(calibration)
    padding = Padding.of(program, padding_name(program, padding_mask))
    kept = {node: _Reservoir(padding.layout(node), size) for node in values}
    tell = tell or (lambda done, total: None)
    tell(0, len(spool))
    for number, inputs in enumerate(spool):
        samples, mask = padding.read(inputs)

        def see(
            node: Node,
            value: Any,  # noqa: ANN401 - of any operator
            samples: int = samples,
            mask: Tensor | None = mask,
            number: int = number,
        ) -> None:
            held = kept.get(node)
            if held is None:
                return
            for piece in rows_of(held.layout, value, mask, samples):
                rows = piece.to(torch.float32)
                if not bool(rows.isfinite().all()):
                    raise PassError(
                        f"calibration batch {number} makes {node.name} NaN or infinite", where=node
                    )
                held.add(rows, generator)

        for node, value in zip(program.placeholders, inputs, strict=True):
            see(node, value)
        run(program, inputs, observe=see)
        tell(number + 1, len(spool))
    return {node: _result(node, held) for node, held in kept.items()}


def _result(node: Node, held: _Reservoir) -> Rows:
    if held.rows is None or held.absmax is None:
        raise RequirementError(
            f"calibration never reached the value {node.name}: it is empty or all padding",
            where=node,
            hint="give calibration inputs with content",
        )
    return Rows(held.rows, held.absmax, held.count)
