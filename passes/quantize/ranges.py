"""Scales and zero points of values, from what calibration saw; one for all that must agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.passes.base import PassContext
from planish.passes.observe import RangeMethod, observe
from planish.passes.quantize.operands import QUANTIZE

AUTO = "auto"


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


def grid_of(ranges: Sequence[tuple[float, float]], scheme: QuantScheme) -> Grid:
    """One grid for values of these ranges (low, high)."""
    low, high = (torch.tensor(bounds) for bounds in zip(*ranges, strict=True))
    scale, zero = scheme.qparams(low.amin(), high.amax())
    return Grid(scale, zero, scheme)


def existing_grid(value: Node, scheme: QuantScheme, program: Program) -> Grid | None:
    """The grid by which an earlier pass has written a value in these integers, if one has."""
    for codes in value.users:
        if codes.target is not QUANTIZE or codes.kwargs.get("dtype") != scheme.dtype:
            continue
        scale, zero = program.constant(codes.args[1]), program.constant(codes.args[2])
        if scale is not None and zero is not None and scale.dim() == 0:
            return Grid(scale, zero, scheme)
    return None


def padding_input(program: Program) -> str | None:
    """The input that marks padding by the name it has everywhere: ``attention_mask``.

    It must be of rank 2 and hold integers or booleans; masks to add are none.
    """
    for name, node in zip(program.signature.tensor_names, program.placeholders, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
            continue
        if name.rpartition(".")[2] == "attention_mask":
            return node.name
    return None


def find_grids(
    program: Program,
    values: Sequence[Node],
    agree: Sequence[tuple[Node, Node]],
    scheme: QuantScheme,
    method: RangeMethod,
    context: PassContext,
    padding_mask: str | None = None,
) -> dict[str, Grid]:
    """How each value is written, by name: from one sweep over the calibration inputs.

    Args:
        program: what is run.
        values: in program order.
        agree: pairs of values whose grids must be the same.
        scheme: per tensor.
        method: how a range follows from what was seen.
        context: gives the calibration, and takes remarks.
        padding_mask: the input that is 0 at padding; "auto" looks for one.

    Raises:
        RequirementError: there is no calibration.
        PassError: a value was NaN or infinite.
    """
    groups = groups_of(values, agree)
    held = {value: existing_grid(value, scheme, program) for value in values}
    fresh = [v.name for group in groups if not any(held[v] for v in group) for v in group]
    found: dict[str, Grid] = {}
    statistics = None
    if fresh:
        if padding_mask == AUTO:
            padding_mask = padding_input(program)
            if padding_mask is not None:
                context.remark(f"ranges leave out padding, where {padding_mask} is 0")
        statistics = observe(
            program, fresh, context.calibration, padding_mask=padding_mask, tell=context.tell
        )
        for sentence in statistics.remarks:
            context.remark(sentence)
    for group in groups:
        grid = next((held[v] for v in group if held[v]), None)
        if grid is None:
            assert statistics is not None
            grid = grid_of([statistics.range(v.name, method, scheme) for v in group], scheme)
        found.update((value.name, grid) for value in group)
    return found
