"""Measure what quantizing one operator alone does to the outputs: one run for each operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from planish.ir.compare import Accumulator
from planish.ir.errors import source_line
from planish.ir.execute import evaluate
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.passes.base import OperatorError
from planish.passes.quantize.operands import DEQUANTIZE, DYNAMIC, QUANTIZE
from planish.passes.quantize.outputs import Batch, Padding, noise


@dataclass
class Sums:
    """What the batches add up to, for one operator.

    Attributes:
        own: error of its own output.
        noise: energies at the outputs, relative to that of the outputs.
        count: how many such energies.
    """

    own: Accumulator = field(default_factory=Accumulator)
    noise: float = 0.0
    count: int = 0


def alone(
    floating: Program,
    quantized: Program,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    padding: Padding = Padding(),  # noqa: B008 - frozen
) -> tuple[OperatorError, ...]:
    """Measure the output error of every operator.

    Args:
        floating: the program with these operators in floating point, all of the same names.
        quantized: the quantized program.
        names: which operators.
        batches: flat inputs.
        padding: what does not count in the outputs.

    Returns:
        One entry per operator, the worst first.
    """
    nodes = {node.name: node for node in quantized.operators if node.name in set(names)}
    sums = {name: Sums() for name in nodes}
    for inputs in batches:
        values, reference = _run(floating, inputs, {})
        reference = padding.apply(inputs, reference)
        for name, node in nodes.items():
            moved = fed(quantized, node, values)
            sums[name].own.add(values[name], moved)
            _, outputs = _run(floating, inputs, {name: moved})
            sums[name].noise += noise(reference, padding.apply(inputs, outputs))
            sums[name].count += 1
    return ranked(nodes, sums)


def counted(
    batches: Iterable[Batch], tell: Callable[[int, int], None], total: int
) -> Iterator[Batch]:
    """The batches, told as (batches so far, ``total``): before each, and after the last."""
    done = 0
    for done, batch in enumerate(batches, 1):
        tell(done - 1, total)
        yield batch
    tell(done, total)


def ranked(nodes: Mapping[str, Node], sums: Mapping[str, Sums]) -> tuple[OperatorError, ...]:
    """The errors, the worst at the outputs first."""
    errors = []
    for name, found in sums.items():
        mean = found.noise / found.count if found.count else 0.0
        errors.append(
            OperatorError(
                node=name,
                operator=op_name(nodes[name].target).removeprefix("aten."),
                source=source_line(nodes[name]),
                own=found.own.fidelity(),
                output_db=-10.0 * math.log10(mean) if mean > 0.0 else math.inf,
            )
        )
    return tuple(sorted(errors, key=lambda e: (e.output_db, e.own.sqnr_db)))


def _run(
    program: Program, inputs: Batch, instead: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """All values and the outputs, with some values exchanged."""
    env: dict[Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                env[node] = program.constants[str(node.target)]
            elif node.op == "call_function":
                env[node] = instead[node.name] if node.name in instead else evaluate(node, env)
    outputs = tuple(env[r] if isinstance(r, Node) else r for r in program.results)
    return {node.name: value for node, value in env.items()}, outputs


def fed(quantized: Program, node: Node, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as the operator gives
    """An operator as the quantized program computes it, fed with the values of another one."""
    env: dict[Node, Any] = {}

    def operand(wanted: Node) -> None:
        if wanted in env:
            return
        if wanted.op == "get_attr":
            env[wanted] = quantized.constants[str(wanted.target)]
        elif wanted.target in (QUANTIZE, DEQUANTIZE) or _is_dynamic(wanted):
            for below in wanted.all_input_nodes:
                operand(below)
            env[wanted] = evaluate(wanted, env)
        else:
            env[wanted] = values[wanted.name]

    with torch.no_grad():
        for wanted in node.all_input_nodes:
            operand(wanted)
        return evaluate(node, env)


def _is_dynamic(node: Node) -> bool:
    """Whether it quantizes by the range of its operand, or is a part of what that gives."""
    inputs = node.all_input_nodes
    return node.target is DYNAMIC or (
        getattr(node.target, "__name__", "") == "getitem" and inputs[0].target is DYNAMIC
    )
