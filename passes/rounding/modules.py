"""A quantized program cut into modules, each of which is held against its floating-point twin.

A module is a run of operators in program order with a number of quantized products in it. What it
reads from other modules are values; the pairs of quantize and dequantize on them, and all that
hangs on constants, belong to the module that reads them. So a module can be computed from values
of either program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.ir.execute import evaluate
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.quant_ops import dequantize, fake_quantize
from planish.passes.quantize.operands import DEQUANTIZE, QUANTIZE, Operands, operands_of
from planish.passes.quantize.restore import quantized_operators


@dataclass(frozen=True)
class Module:
    """A run of operators.

    Attributes:
        first: where it begins in the program.
        nodes: all that is computed for it, pairs and constants included, in program order.
        products: the quantized products in it.
        inputs: values of other modules that it reads.
        outputs: values of it that others read.
        scales: constants that are the scale of one value or weight, which it alone reads.
    """

    first: Node
    nodes: tuple[Node, ...]
    products: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    scales: tuple[Node, ...]

    def compute(
        self, values: Mapping[Node, Any], program: Program, scales: Mapping[Node, Tensor]
    ) -> list[Tensor]:
        """Its outputs, with gradients that pass straight through rounding.

        Args:
            values: of its inputs.
            program: holds the constants.
            scales: in place of constants.
        """
        env = dict(values)
        for node in self.nodes:
            if node.op == "get_attr":
                held = scales.get(node)
                env[node] = program.constants[str(node.target)] if held is None else held
            elif is_op(node, QUANTIZE):
                continue  # computed with what dequantizes it, which has a derivative
            elif is_op(node, DEQUANTIZE) and is_op(node.args[0], QUANTIZE):
                options: dict[str, Any] = dict(node.kwargs)
                x, scale, zero = (env[n] for n in node.args[0].args[:3])  # type: ignore[index]  # of nodes
                env[node] = fake_quantize(x, scale, zero, **options)
            elif is_op(node, DEQUANTIZE):
                # Called as a function, which has a derivative by the scale; the operator has none.
                options = dict(node.kwargs)
                env[node] = dequantize(*(env[n] for n in node.args), **options)  # type: ignore[index]  # of nodes
            else:
                env[node] = evaluate(node, env)
        return [env[node] for node in self.outputs]


def modules_of(program: Program, products: int) -> list[Module]:
    """Cut a program behind every so many quantized products.

    Args:
        program: quantized.
        products: in each module; 0 for a single module.
    """
    quantized = {n for n in quantized_operators(program) if _multiplies(n, program)}
    runs: list[list[Node]] = [[]]
    count = 0
    for node in program.operators:
        if _belongs_to_readers(node):
            continue
        if node in quantized:
            if count and products and count % products == 0:
                runs.append([])
            count += 1
        runs[-1].append(node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found = [_closed(run, order) for run in runs if run]
    readers: dict[Node, int] = {}
    for nodes in found:
        for node in nodes:
            readers[node] = readers.get(node, 0) + 1
    return [
        _module(run, nodes, quantized, readers, program)
        for run, nodes in zip([r for r in runs if r], found, strict=True)
    ]


def _multiplies(node: Node, program: Program) -> bool:
    return isinstance(operands_of(node, program), Operands)


def _belongs_to_readers(node: Node) -> bool:
    return is_op(node, QUANTIZE, DEQUANTIZE)


def _closed(run: Sequence[Node], order: Mapping[Node, int]) -> list[Node]:
    """A run with the pairs and constants that it reads."""
    found = dict.fromkeys(run)
    todo = list(run)
    while todo:
        for operand in todo.pop().all_input_nodes:
            if operand not in found and (operand.op == "get_attr" or _belongs_to_readers(operand)):
                found[operand] = None
                todo.append(operand)
    return sorted(found, key=order.__getitem__)


def _module(
    run: Sequence[Node],
    nodes: Sequence[Node],
    quantized: set[Node],
    readers: Mapping[Node, int],
    program: Program,
) -> Module:
    own, held = set(run), set(nodes)
    inputs = dict.fromkeys(o for node in nodes for o in node.all_input_nodes if o not in held)
    outputs = [
        n
        for n in run
        if isinstance(n.meta.get("val"), Tensor)
        and n.meta["val"].is_floating_point()
        and any(_read_outside(user, own, held, readers) for user in n.users)
    ]
    scales = [
        node.args[1]
        for node in nodes
        if is_op(node, DEQUANTIZE) and node.kwargs["dtype"] != "int32" and readers[node] == 1
    ]
    return Module(
        run[0],
        tuple(nodes),
        tuple(n for n in run if n in quantized),
        tuple(inputs),
        tuple(outputs),
        tuple(s for s in scales if isinstance(s, Node) and _learnable(s, held, program)),
    )


def _read_outside(user: Node, own: set[Node], held: set[Node], readers: Mapping[Node, int]) -> bool:
    if _belongs_to_readers(user):
        return readers.get(user, 0) > (user in held)
    return user not in own


def _learnable(scale: Node, held: set[Node], program: Program) -> bool:
    """Whether a scale is a constant that one value or weight alone has."""
    pairs = [user for user in scale.users if is_op(user, DEQUANTIZE)]
    return (
        program.constant(scale) is not None
        and len(pairs) == 1
        and all(user in held and user in (pairs[0], pairs[0].args[0]) for user in scale.users)
    )


def integer_biases(products: Sequence[Node], program: Program) -> list[tuple[Node, Node, Node]]:
    """(product, scale of its value, scale of its weight) where the bias is int32."""
    found = []
    for node in products:
        operands = operands_of(node, program)
        if not isinstance(operands, Operands) or operands.bias is None:
            continue
        bias = operands.bias.read(node)
        if is_op(bias, DEQUANTIZE):
            x, w = (slot.read(node) for slot in operands.slots)
            found.append((node, x.args[1], w.args[1]))
    return found
