"""What runs each quantized operator: an integer kernel of the runtime, or float, and why.

A quantized operator of a program is one that reads a dequantized value. Which kernel runs it says
the graph that the runtime made of the file: a kernel of the file belongs to the node of the
program in whose name its result was emitted, and where the runtime, or a translation that looks
back, merged an operator into a later one, to the first later node that is still there.

So nothing is taken on trust: a file whose operators the runtime fused back to float is reported
as float, whatever the file says.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import KernelUse
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import View
from planish.ir.errors import source_line
from planish.ir.ops import aten, is_op, is_view, op_name
from planish.ir.program import Program

if TYPE_CHECKING:
    import onnx

QUANTIZE = torch.ops.planish.quantize.default
DEQUANTIZE = torch.ops.planish.dequantize.default
DYNAMIC = torch.ops.planish.dynamic_quantize.default

# Kernels that compute on integers, or unpack integer weights as they go.
INTEGER_KERNELS = frozenset(
    {
        "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GatherBlockQuantized",
        "MatMulBnb4", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits",
        "QAttention", "QEmbedLayerNormalization", "QGemm", "QLinearAdd", "QLinearAveragePool",
        "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu",
        "QLinearMatMul", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax",
        "QLinearWhere", "QMoE", "QOrderedMatMul",
    }
)  # fmt: skip
# Kernels that run on whatever they are given: on integers where these are codes.
_AGNOSTIC = frozenset(
    {
        "Clip", "Concat", "DepthToSpace", "Gather", "GatherElements", "GatherND", "Max", "MaxPool",
        "Min", "NhwcMaxPool", "Pad", "Relu", "Resize", "SpaceToDepth", "Tile", "Where",
    }
)  # fmt: skip
# Of these, what only shows a value in another form: the kernel is the one that made the value.
_FORMS = frozenset(
    {
        "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_MAKES_CODES = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
_MAKES_REALS = frozenset({"DequantizeLinear"})
_TYPES_OF_CODES = ("INT8", "UINT8", "INT4", "UINT4", "INT16", "UINT16")
# They move elements of a tensor around, and run as they are on integers and real numbers.
_MOVES = frozenset({aten.contiguous.default, aten.clone.default, aten.reshape.default})


def quantized_operators(program: Program) -> list[Node]:
    """The nodes that compute with dequantized values, in order.

    What only moves values around is not one: its readers are.
    """
    return [
        node
        for node in program.operators
        if not is_op(node, QUANTIZE, DEQUANTIZE, DYNAMIC)
        and not _moves(node)
        and any(_from_codes(n) for n in node.all_input_nodes)
    ]


def _moves(node: Node) -> bool:
    return node.op == "call_function" and (node.target in _MOVES or is_view(node.target))


def _from_codes(node: Node) -> bool:
    """Whether a value is a dequantized one, perhaps moved around."""
    while _moves(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_op(node, DEQUANTIZE)


def kernel_uses(emitter: Emitter, model: onnx.ModelProto) -> tuple[KernelUse, ...]:
    """Say of every quantized operator what runs it.

    Args:
        emitter: of the file; knows which value stands for which node of the program.
        model: the graph that runs: what the runtime made of the file.
    """
    graph = _RuntimeGraph(model)
    owners = _Owners(emitter, graph)
    uses = []
    for node in quantized_operators(emitter.program):
        kernel, reason = _kernel(node, owners, graph)
        uses.append(
            KernelUse(
                node=node.name,
                operator=op_name(node.target),
                source=source_line(node),
                kernel=kernel,
                reason=reason,
            )
        )
    return tuple(uses)


def _kernel(node: Node, owners: _Owners, graph: _RuntimeGraph) -> tuple[str | None, str]:
    """The integer kernel of an operator, or why there is none."""
    found = graph.working(owners.running(node))
    kernels = [k for k in map(graph.integer_kernel, found) if k is not None]
    if kernels:
        return max(kernels, key=lambda kernel: kernel.split(" (")[0] in INTEGER_KERNELS), ""
    plain = [n for n in node.all_input_nodes if not _from_codes(n) and _is_data(n)]
    because = f"its operand {plain[0].name} is not quantized" if plain else ""
    if not found:
        return None, because or "the runtime computed it when it loaded the file"
    names = dict.fromkeys(n.op_type for n in found if n.op_type not in _MAKES_REALS)
    floats = ", ".join(names) or "DequantizeLinear"
    runs = f"the runtime runs {floats} in float"
    return None, f"{runs}: {because}" if because else f"{runs}, on dequantized values"


def _is_data(node: Node) -> bool:
    """Whether an operand is a computed real value, as opposed to a constant or an index."""
    value = node.meta.get("val")
    real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return real and node.op != "get_attr"


class _Owners:
    """Which nodes of the runtime's graph do the work of which node of the program."""

    def __init__(self, emitter: Emitter, graph: _RuntimeGraph):
        self._emitter = emitter
        self._graph = graph
        self._inner: dict[str, list[onnx.NodeProto]] = {}
        names = {node.name for node in emitter.program.graph.nodes}
        for node in graph.nodes:
            for output in node.output:
                owner = _owner_of(output, names)
                if owner is not None:
                    self._inner.setdefault(owner, []).append(node)

    def running(self, node: Node) -> list[onnx.NodeProto]:
        """The runtime's nodes for a node, or for the first later one it was merged into."""
        queue, seen = deque([node]), {node}
        while queue:
            current = queue.popleft()
            found = self._of(current)
            if found and not (current is node and self._only_leftovers(found, node)):
                return found
            for user in current.users:
                if user.op == "call_function" and user not in seen:
                    seen.add(user)
                    queue.append(user)
        return self._of(node)

    def _of(self, node: Node) -> list[onnx.NodeProto]:
        held = self._emitter.held_or_none(node)
        views = held if isinstance(held, list) else [held]
        found = {}
        for view in views:
            if isinstance(view, View):
                producer = self._graph.producers.get(str(view.base.name))
                if producer is not None:
                    found[producer.output[0]] = producer
        found.update({n.output[0]: n for n in self._inner.get(node.name, ())})
        return list(found.values())

    def _only_leftovers(self, found: list[onnx.NodeProto], node: Node) -> bool:
        """Whether all that is left of a node is what prepares operands for a later kernel."""
        return all(n.op_type in _MAKES_REALS for n in found) and bool(node.users)


def _owner_of(output: str, names: set[str]) -> str | None:
    """The node of the program that a value was emitted for; see ``Emitter.append``."""
    matched = re.match(r"_(.+?)\.[A-Za-z]", output)
    if matched and matched[1] in names:
        return matched[1]
    return None


class _RuntimeGraph:
    """A graph as the runtime runs it."""

    def __init__(self, model: onnx.ModelProto):
        self.nodes = list(_nodes(model.graph))
        self.producers = {output: node for node in self.nodes for output in node.output if output}
        self._stored = {t.name for t in model.graph.initializer if _is_codes_type(t.data_type)}
        self._inputs = {
            i.name for i in model.graph.input if _is_codes_type(i.type.tensor_type.elem_type)
        }

    def working(self, found: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Leave out what only shows a value in another form, or go back to what made the value."""
        working = [node for node in found if node.op_type not in _FORMS]
        if working:
            return working
        origins = {}
        for node in found:
            current: onnx.NodeProto | None = node
            while current is not None and current.op_type in _FORMS:
                current = self.producers.get(current.input[0])
            if current is not None:
                origins[current.output[0]] = current
        return list(origins.values())

    def integer_kernel(self, node: onnx.NodeProto) -> str | None:
        """How an integer kernel is called; None for a node that computes with real numbers."""
        if node.op_type in INTEGER_KERNELS:
            return str(node.op_type) + _packing(node)
        if node.op_type in _AGNOSTIC and self._carries_codes(node):
            return f"{node.op_type} on integers"
        return None

    def _carries_codes(self, node: onnx.NodeProto) -> bool:
        """Whether an operator that runs on anything is given codes."""
        current: onnx.NodeProto | None = node
        while current is not None and current.op_type in _AGNOSTIC | _FORMS:
            data = current.input[1 if current.op_type == "Where" else 0]
            if data in self._stored or data in self._inputs:
                return True
            current = self.producers.get(data)
        return current is not None and _gives_codes(current)


def _packing(node: onnx.NodeProto) -> str:
    """How a kernel of packed weights reads them: " (4 bits, blocks of 32)"."""
    numbers = {a.name: a.i for a in node.attribute}
    if "bits" not in numbers or "block_size" not in numbers:
        return ""
    return f" ({numbers['bits']} bits, blocks of {numbers['block_size']})"


def _gives_codes(node: onnx.NodeProto) -> bool:
    return node.op_type in _MAKES_CODES or (
        node.op_type.startswith("QLinear") and node.op_type in INTEGER_KERNELS
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _is_codes_type(number: int) -> bool:
    from onnx import TensorProto

    return number in {getattr(TensorProto, name) for name in _TYPES_OF_CODES}
