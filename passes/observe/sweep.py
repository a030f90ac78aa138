"""``observe``: one streamed pass over the calibration inputs, keeping only sketches."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError, RequirementError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.observe.feeding import Batches, Padding, Tell, required
from planish.passes.observe.histogram import Workspace
from planish.passes.observe.layout import Layout
from planish.passes.observe.sketch import ChannelSketch, Sketch
from planish.passes.observe.statistics import Statistics


@dataclass
class Observed:
    """One value under observation."""

    node: Node
    layout: Layout
    sketch: Sketch = field(default_factory=Sketch)
    channels: list[ChannelSketch] = field(default_factory=list)


def observe(
    program: Program,
    values: Iterable[str],
    calibration: Batches | None,
    *,
    padding_mask: str | None = None,
    per_channel: Iterable[str | tuple[str, int]] = (),
    tell: Tell | None = None,
) -> Statistics:
    """Run the program once over all calibration inputs and sketch the values named.

    Args:
        program: what to run.
        values: names of operators or inputs that are tensors of numbers.
        calibration: a spool.
        padding_mask: the input that is 1 (true) for tokens and 0 for padding, [batch, tokens];
            padding is left out of all statistics of values that have axes of both.
        per_channel: values of which statistics per channel are wanted as well: of their last axis,
            or of another as (name, axis).
        tell: called with (batches done, batches in all), first with 0.

    Raises:
        RequirementError: there is no calibration, or all of a value is padding.
        UsageError: a name is none of the program, or the mask is no input of two axes.
        PassError: a value holds NaN or infinity, or has another number of channels than before.
    """
    spool = required(calibration)
    padding = Padding.of(program, padding_mask)
    watched = _watched(program, values, per_channel, padding)
    sweep = _Sweep(program, watched, padding)
    tell = tell or (lambda done, total: None)
    tell(0, len(spool))
    for number, inputs in enumerate(spool):
        sweep.batch(number, inputs)
        tell(number + 1, len(spool))
    return sweep.statistics()


def _watched(
    program: Program,
    values: Iterable[str],
    per_channel: Iterable[str | tuple[str, int]],
    padding: Padding,
) -> dict[Node, Observed]:
    """The nodes to look at, with empty sketches."""
    by_name = {n.name: n for n in program.nodes if n.op in ("placeholder", "call_function")}
    watched: dict[Node, Observed] = {}
    for name in values:
        node = tensor_node(by_name, name)
        watched.setdefault(node, Observed(node, padding.layout(node)))
    for entry in per_channel:
        name, axis = (entry, -1) if isinstance(entry, str) else entry
        node = tensor_node(by_name, name)
        held = watched.setdefault(node, Observed(node, padding.layout(node)))
        rank = node.meta["val"].dim()
        if not -rank <= axis < rank or held.layout.axis(axis, rank) is None:
            raise UsageError(f"value {name!r} has no channels along axis {axis}", where=node)
        axis %= rank
        if all(sketch.axis != axis for sketch in held.channels):
            held.channels.append(ChannelSketch(axis))
    return watched


def tensor_node(by_name: dict[str, Node], name: str) -> Node:
    """The node of that name.

    Raises:
        UsageError: there is none, or its value is no tensor of numbers.
    """
    node = by_name.get(name)
    if node is None:
        close = difflib.get_close_matches(name, by_name, 3)
        raise UsageError(
            f"the program has no value {name!r}",
            hint="did you mean " + " or ".join(close) if close else None,
        )
    declared = node.meta.get("val")
    if not isinstance(declared, Tensor) or declared.dtype == torch.bool or declared.is_complex():
        raise UsageError(f"the value {name!r} is no tensor of real numbers", where=node)
    return node


class _Sweep:
    """The state of one pass over the batches."""

    def __init__(self, program: Program, watched: dict[Node, Observed], padding: Padding):
        self.program = program
        self.watched = watched
        self.padding = padding
        self.workspace = Workspace()
        self.number = 0
        self.samples = 0
        self.in_batch = 1
        self.mask: Tensor | None = None

    def batch(self, number: int, inputs: tuple[Any, ...]) -> None:
        """Run one batch."""
        self.number = number
        self.in_batch, self.mask = self.padding.read(inputs)
        self.samples += self.in_batch
        for node, value in zip(self.program.placeholders, inputs, strict=True):
            self.see(node, value)
        run(self.program, inputs, observe=self.see)

    def see(self, node: Node, value: Any) -> None:  # noqa: ANN401 - of any operator
        """Sketch the value if it is watched."""
        held = self.watched.get(node)
        if held is None:
            return
        rank = value.dim()
        value = value.to(torch.float32)
        for piece in held.layout.pieces(value, self.mask, self.in_batch):
            if not held.sketch.add(piece, self.workspace):
                raise PassError(
                    f"calibration batch {self.number} makes {node.name} NaN or infinite",
                    where=node,
                    hint="such inputs say nothing about ranges: look at this batch, or leave the "
                    "operator in float",
                )
            for channels in held.channels:
                axis = held.layout.axis(channels.axis, rank)
                assert axis is not None  # refused before the sweep
                if not channels.add(piece, axis):
                    raise PassError(
                        f"calibration batch {self.number} gives {node.name} another number of "
                        f"channels along axis {channels.axis} than the batches before",
                        where=node,
                    )

    def statistics(self) -> Statistics:
        """What was seen.

        Raises:
            RequirementError: of some value nothing was.
        """
        problems: dict[str, list[str]] = {}
        for node, held in self.watched.items():
            held.sketch.flush(self.workspace)
            if not held.sketch.samples:
                raise RequirementError(
                    f"calibration never reached the value {node.name}: it is empty or all padding",
                    where=node,
                    hint="give calibration inputs with content",
                )
            if held.layout.problem is not None:
                problems.setdefault(held.layout.problem, []).append(node.name)
        remarks = tuple(
            f"padding is part of the statistics of {_listed(names)}: {problem}"
            for problem, names in problems.items()
        )
        return Statistics(
            {node.name: held.sketch for node, held in self.watched.items()},
            {
                (node.name, sketch.axis): sketch.stats()
                for node, held in self.watched.items()
                for sketch in held.channels
            },
            {node.name: node.meta["val"].dim() for node in self.watched},
            samples=self.samples,
            remarks=remarks,
        )


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:4]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
