"""The mean error that quantizing makes in each output channel, operator after operator.

Calibration inputs are in two parts: one that corrections are learned from, and one that says
whether they hold on others. Both go through the program together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.execute import evaluate, last_uses, run
from planish.ir.program import Program
from planish.passes.observe.feeding import Padding
from planish.passes.observe.layout import rows_of
from planish.passes.rounding.biases import NewBias, new_bias

Tell = Callable[..., None]  # takes (batches done, operators done)
_FEWEST = 4  # batches, so that some can be spared
BELOW = "its mean error is below what its bias resolves"


@dataclass
class Mean:
    """Mean of the channels of a value over all samples, padding left out."""

    total: Tensor
    count: int = 0

    @classmethod
    def of(cls, channels: int) -> Mean:
        """Of nothing yet."""
        return cls(torch.zeros(channels, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Take [n, C] in."""
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """[C], float64."""
        return self.total / max(self.count, 1)


@dataclass(frozen=True)
class Batches:
    """Calibration inputs in two parts.

    Attributes:
        inputs: flat, of all batches.
        learned: the first so many are learned from; the others are judged by.
        padding: where their padding is.
    """

    inputs: Sequence[Any]
    learned: int
    padding: Padding

    @classmethod
    def split(cls, inputs: Sequence[Any], padding: Padding) -> Batches:
        """Hold the last quarter out; nothing where there are fewer than four.

        Neighbors are often alike (frames of a film, crops of a picture), so that a part from
        between the others would agree with them whatever is to come.
        """
        held = len(inputs) // 4 if len(inputs) >= _FEWEST else 0
        return cls(inputs, len(inputs) - held, padding)

    @property
    def held(self) -> Sequence[Any]:
        """What is judged by."""
        return self.inputs[self.learned :]

    def add(self, means: tuple[Mean, Mean], number: int, node: Node, x: Tensor, axis: int) -> None:
        """Take the value that an operator has for one batch into the mean of its part."""
        samples, mask = self.padding.read(self.inputs[number])
        for rows in rows_of(self.padding.layout(node), x, mask, samples, axis):
            means[number >= self.learned].add(rows)


def means(
    program: Program, axes: Mapping[str, int], batches: Batches, tell: Tell
) -> dict[str, tuple[Mean, Mean]]:
    """Means of the channels of some operators over each part, in one sweep.

    Args:
        program: what to run.
        axes: operator -> axis of its channels.
        batches: calibration inputs.
        tell: called with the batches that are done.
    """
    found: dict[str, tuple[Mean, Mean]] = {}
    for number, inputs in enumerate(batches.inputs):
        tell(number)

        def see(node: Node, value: Any, number: int = number) -> None:  # noqa: ANN401 - of any operator
            if node.name in axes:
                channels = value.shape[axes[node.name]]
                pair = found.setdefault(node.name, (Mean.of(channels), Mean.of(channels)))
                batches.add(pair, number, node, value, axes[node.name])

        run(program, inputs, observe=see)
    return found


def corrections(
    program: Program,
    targets: Mapping[Node, int],
    reference: Mapping[str, tuple[Mean, Mean]],
    batches: Batches,
    tell: Tell,
) -> dict[Node, NewBias | str]:
    """The new bias of each target, found with all those before it in force.

    Args:
        program: quantized; stays as it is.
        targets: operator -> axis of its channels.
        reference: their means in floating point.
        batches: calibration inputs.
        tell: called with the batches and the operators that are done.

    Returns:
        The biases that lower the error on the part that is held out (all, if there is none); for
        the others the reason, with its number.
    """
    states = [dict(zip(program.placeholders, inputs, strict=True)) for inputs in batches.inputs]
    frees, found = last_uses(program), dict[Node, NewBias | str]()
    varying = set(program.placeholders)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op not in ("get_attr", "call_function"):
                continue
            if varying.isdisjoint(node.all_input_nodes):  # the same for all batches
                value = (
                    program.constants[str(node.target)]
                    if node.op == "get_attr"
                    else evaluate(node, states[0])
                )
                for state in states:
                    state[node] = value
            else:
                varying.add(node)
                for state in states:
                    state[node] = evaluate(node, state)
            if node in targets:
                tell(len(states), len(found))
                found[node] = new = _correction(
                    program, node, targets[node], reference[node.name], batches, states
                )
                for state in states if isinstance(new, NewBias) else ():
                    value, shape = state[node], [1] * state[node].dim()
                    shape[targets[node]] = -1
                    state[node] = value + new.added.to(value.dtype).reshape(shape)  # type: ignore[union-attr] # the loop is empty for a reason
            for dead in frees[node]:
                for state in states:
                    state.pop(dead, None)
    tell(len(states), len(found))
    return found


def _correction(
    program: Program,
    node: Node,
    axis: int,
    reference: tuple[Mean, Mean],
    batches: Batches,
    states: Sequence[Mapping[Node, Any]],
) -> NewBias | str:
    """The new bias of one operator, or why it has none."""
    channels = len(reference[0].total)
    now = Mean.of(channels), Mean.of(channels)
    for number, state in enumerate(states):
        batches.add(now, number, node, state[node], axis)
    learned, held = (b.mean - a.mean for b, a in zip(reference, now, strict=True))
    new = new_bias(program, node, learned)
    if new is None:
        return BELOW
    # A bias moves nothing but the mean: the error of an element changes by as much as that does.
    before, after = (float(e.square().mean().sqrt()) for e in (held, held - new.added))
    if now[1].count and after >= before:
        return (
            f"on held-out inputs its mean error would grow from {before:.3g} to {after:.3g} "
            "(root mean square)"
        )
    return new
