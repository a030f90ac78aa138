"""LSTM layers with int8 weights, as DynamicQuantizeLSTM of ONNX Runtime.

    lstm(x, dq(W), dq(R))  ->  DynamicQuantizeLSTM(x, W, R)

The kernel multiplies by the codes themselves. For that it writes the input once, and the hidden
state at every step, as uint8 by the range they have there: an error the program does not show,
which the comparison of the file with the program does. The cell state and the gates stay in float.

A GRU stays in float, on dequantized weights: this runtime has no integer kernel for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_recurrent import Layer, Rows, emit_layers, read_layers
from planish.backends.onnx_view import Table
from planish.backends.ort_codes import MICROSOFT

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

aten = torch.ops.aten


def _lstm(e: Emitter, node: Node) -> Any:  # noqa: ANN401 - whatever the translation or the call gives
    layers = read_layers(e, node, "LSTM")
    if layers is None or any(r.plain_scale is None for x in layers for r in (x.w, x.r)):
        return None
    return emit_layers(e, node, layers, _cell)


def _cell(e: Emitter, layer: Layer, x: ir.Value, starts: list[ir.Value | None]) -> list[ir.Value]:
    bias = None if layer.bias is None else e.tensor(layer.bias, f"{layer.name}.B")
    w, r = (_operands(e, layer, rows, n) for rows, n in ((layer.w, "W"), (layer.r, "R")))
    return e.ops(
        1 + len(starts), "DynamicQuantizeLSTM", x, w[0], r[0], bias, None, *starts, None,
        *w[1:], *r[1:], domain=MICROSOFT, **layer.attributes,
    )  # fmt: skip


def _operands(e: Emitter, layer: Layer, rows: Rows, name: str) -> list[ir.Value]:
    """Codes [directions, .., gates * H], scales and zero points [directions, gates * H]."""
    plain = rows.plain_scale
    assert plain is not None
    codes = rows.values.reshape(layer.directions, -1, rows.values.shape[1]).transpose(1, 2)
    scale = plain.reshape(layer.directions, -1)
    label = f"{layer.name}.{name}"
    return [
        e.tensor(codes.contiguous(), label),
        e.tensor(scale, f"{label}.scale"),
        e.tensor(torch.zeros(scale.shape, dtype=torch.int8), f"{label}.zero"),
    ]


def on_real_states(graph: onnx.GraphProto) -> None:
    """Write the kernel's layers as LSTM on the numbers that its codes stand for.

    A program does not say how the kernel rounds input and state. What can be proved is what it
    multiplies by: codes, scales and their layout.
    """
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == "DynamicQuantizeLSTM":
            graph.node.extend(_plain(node))
        else:
            graph.node.append(node)


def _plain(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper

    given = [*node.input]
    made: list[onnx.NodeProto] = []

    def add(operator: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 - numbers, texts and lists
        name = f"{node.output[0]}.plain{len(made)}"
        made.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    axis = add("Constant", value_ints=[1])
    for position, scale in ((1, given[8]), (2, given[10])):
        codes = add("Cast", given[position], to=TensorProto.FLOAT)
        numbers = add("Mul", codes, add("Unsqueeze", scale, axis))
        given[position] = add("Transpose", numbers, perm=[0, 2, 1])
    plain = helper.make_node("LSTM", given[:8], list(node.output))
    plain.attribute.extend(node.attribute)
    return [*made, plain]


ORT_RECURRENT: Table = {aten.lstm.input: _lstm}
