"""From an emitter's nodes to a model: outputs, dead nodes, functions, opsets, metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from planish.backends.onnx_dims import dim_text, dims_of
from planish.backends.onnx_file import Initializer, onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import dtype_of
from planish.ir.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# The file format of onnx 1.16, the oldest that has the types used here; opset 23 came with 11.
_IR_VERSIONS = ((23, 11), (21, 10), (0, 9))


def build(
    e: Emitter, metadata: Mapping[str, str]
) -> tuple[onnx.ModelProto, list[Initializer], tuple[str, ...]]:
    """Assemble the file's contents.

    Returns:
        The model without its initializers, the initializers, and the names of the outputs.

    Raises:
        ExportError: the program returns no tensor at all.
    """
    import onnx_ir as ir

    outputs = _outputs(e)
    inputs = [e.view(node).base for node in e.program.placeholders]
    nodes, live = alive(e.nodes, outputs)
    initializers = e.initializers(live)
    for node in nodes:
        node.metadata_props.clear()
        node.name = node.outputs[0].name
    graph = ir.Graph(inputs, outputs, nodes=nodes, name="planish", opset_imports={"": e.opset})
    model = ir.Model(
        graph,
        ir_version=next(v for least, v in _IR_VERSIONS if e.opset >= least),
        producer_name="planish",
    )
    _inline(e, model)
    for node in model.graph.all_nodes():
        if node.domain:
            model.graph.opset_imports.setdefault(node.domain, 1)
    for key, value in metadata.items():
        model.metadata_props[key] = value
    proto = ir.to_proto(model)
    return proto, initializers, tuple(str(value.name) for value in outputs)


def _outputs(e: Emitter) -> list[ir.Value]:
    """The tensor outputs, each a value of its own under the caller's name."""
    import onnx_ir as ir

    outputs: list[ir.Value] = []
    taken = {e.view(node).base for node in e.program.placeholders}
    for result, name in zip(e.program.results, e.program.signature.output_names, strict=True):
        if not isinstance(result, Node):
            continue  # a Python constant of the caller's structure
        value = e.value(result)
        if value in taken or e.is_initializer(value):
            value = e.op("Identity", value)
        taken.add(value)
        value.name = name
        like = result.meta["val"]
        dims = dims_of(like) if hasattr(like, "shape") else ()
        value.dtype = ir.DataType(onnx_dtype(dtype_of(like)))
        value.shape = ir.Shape([dim_text(d, e.names) for d in dims])
        outputs.append(value)
    if not outputs:
        raise ExportError("the program returns no tensor", hint="return one from forward")
    return outputs


def alive(nodes: list[ir.Node], outputs: list[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes that an output depends on, in order, and every value they read."""
    live: set[Any] = set(outputs)
    kept: list[ir.Node] = []
    for node in reversed(nodes):
        if live.isdisjoint(node.outputs):
            for position in range(len(node.inputs)):
                node.replace_input_with(position, None)
            continue
        kept.append(node)
        live.update(value for value in _reads(node) if value is not None)
    kept.reverse()
    return kept, live


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """The values a node reads, those that its subgraphs capture included."""
    import onnx_ir as ir

    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)
            yield from attribute.as_graph().outputs


def _inline(e: Emitter, model: ir.Model) -> None:
    """Write out the functions that torch's translations call."""
    if not e.functions:
        return
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    for identifier, function in e.functions.items():
        if not isinstance(function, ir.Function):
            function = ir.serde.deserialize_function(function.to_function_proto())
        # They are written for opset 18 and use nothing whose meaning changed since; where that is
        # wrong, the checker or the comparison with the program says so.
        function.opset_imports[""] = e.opset
        model.functions[identifier] = function
    InlinePass()(model)


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """Operator -> how many, most frequent first; subgraphs included."""
    counts: Counter[str] = Counter()

    def visit(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            counts[f"{node.domain}.{node.op_type}" if node.domain else node.op_type] += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g)

    visit(model.graph)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
