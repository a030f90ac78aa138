"""Regions of quantized operators that hand each other integers.

Two operators belong to one region where the one quantizes what the other gives, with at most
clamps and views in between. Regions of the same operators on weights of the same shapes behave
alike, and are listed together.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import is_op, op_name
from planish.ir.program import Program
from planish.passes.quantize.between import CLAMPS, MOVERS
from planish.passes.quantize.operands import DEQUANTIZE
from planish.passes.quantize.restore import float_value, quantized_operators


def islands(program: Program) -> list[tuple[str, ...]]:
    """The regions, those that are alike in one entry, by the work in them, the least first.

    Returns:
        Names of operators, in program order within an entry.
    """
    nodes = quantized_operators(program)
    quantized = set(nodes)
    leader = {node: node for node in nodes}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in nodes:
        for source in _sources(node, quantized):
            leader[find(node)] = find(source)
    regions: dict[Node, list[Node]] = {}
    for node in nodes:
        regions.setdefault(find(node), []).append(node)
    same: dict[tuple[str, ...], list[Node]] = {}
    for region in regions.values():
        same.setdefault(tuple(sorted(map(_kind, region))), []).extend(region)
    order = {node: position for position, node in enumerate(nodes)}
    found = sorted(same.values(), key=lambda region: sum(map(_work, region)))
    return [tuple(n.name for n in sorted(region, key=order.__getitem__)) for region in found]


def alike(program: Program) -> list[tuple[str, ...]]:
    """The quantized operators by what they are, wherever they stand; the least work first."""
    kinds: dict[str, list[Node]] = {}
    for node in quantized_operators(program):
        kinds.setdefault(_kind(node), []).append(node)
    found = sorted(kinds.values(), key=lambda nodes: sum(map(_work, nodes)))
    return [tuple(node.name for node in nodes) for nodes in found]


def _sources(node: Node, quantized: set[Node]) -> Iterator[Node]:
    """The quantized operators whose results an operator reads as integers."""
    for operand in node.all_input_nodes:
        if not is_op(operand, DEQUANTIZE):
            continue
        value = float_value(operand)
        while value is not None and value not in quantized:
            passes = value.target in CLAMPS | MOVERS and len(value.all_input_nodes) == 1
            value = value.all_input_nodes[0] if passes else None
        if value is not None:
            yield value


def _kind(node: Node) -> str:
    """What an operator is: its name, and the shapes of its weights, or else of its result."""
    shapes = [
        list(operand.meta["val"].shape)
        for operand in node.all_input_nodes
        if is_op(operand, DEQUANTIZE) and float_value(operand) is None
    ]
    return f"{op_name(node.target)} {shapes or _shape(node)}"


def _shape(node: Node) -> list[str]:
    value = node.meta.get("val")
    return [str(n) for n in value.shape] if isinstance(value, Tensor) else []


def _work(node: Node) -> int:
    """About the size of the operator: of its weights, where it has some."""
    sizes = [
        operand.meta["val"].numel()
        for operand in node.all_input_nodes
        if is_op(operand, DEQUANTIZE) and float_value(operand) is None
    ]
    return int(sum(sizes))
