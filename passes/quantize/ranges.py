"""Scales and zero points of values, from what calibration saw; one for all that must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.passes.calibrate import Spool

RangeMethod = Literal["minmax", "average", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class Grid:
    """How one value is written: scale ``[]`` float32, zero point ``[]`` of the storage dtype."""

    scale: Tensor
    zero_point: Tensor
    scheme: QuantScheme


def groups_of(values: Iterable[Node], agree: Sequence[tuple[Node, Node]]) -> list[list[Node]]:
    """Split values into groups that must share one scale.

    Args:
        values: in program order.
        agree: pairs that must; they may name values besides.
    """
    parent: dict[Node, Node] = {}

    def find(node: Node) -> Node:
        while parent.get(node, node) is not node:
            node = parent[node]
        return node

    for one, other in agree:
        parent[find(other)] = find(one)
    groups: dict[Node, list[Node]] = {}
    for value in values:
        groups.setdefault(find(value), []).append(value)
    return list(groups.values())


def grid_of(ranges: Sequence[tuple[float, float]], scheme: QuantScheme) -> Grid | None:
    """One grid for values of these ranges; None where one is not finite."""
    low = torch.tensor([r[0] for r in ranges]).amin()
    high = torch.tensor([r[1] for r in ranges]).amax()
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        return None
    scale, zero = scheme.qparams(low, high)
    return Grid(scale, zero, scheme)


Ranges = Callable[[Node], tuple[float, float]]


def observe_ranges(
    program: Program,
    values: Sequence[Node],
    calibration: Spool,
    method: RangeMethod,
    scheme: QuantScheme,
) -> Ranges:
    """Smallest and largest value of each."""
    bounds: dict[str, tuple[float, float]] = {}
    names = {value.name for value in values}

    def see(name: str, value: Any) -> None:  # noqa: ANN401
        if name in names:
            low, high = bounds.get(name, (0.0, 0.0))
            bounds[name] = min(low, float(value.amin())), max(high, float(value.amax()))

    for inputs in calibration:
        for placeholder, value in zip(program.placeholders, inputs, strict=True):
            see(placeholder.name, value)
        run(program, inputs, observe=lambda node, value: see(node.name, value))
    return lambda node: bounds[node.name]
