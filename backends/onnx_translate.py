"""The table of translations, and the walk that applies it to a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_activations import ACTIVATIONS
from planish.backends.onnx_attention import ATTENTION
from planish.backends.onnx_bags import BAGS
from planish.backends.onnx_branch import BRANCHES
from planish.backends.onnx_conv import CONVOLUTIONS
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_grids import ONNX_GRIDS
from planish.backends.onnx_index import INDEXING
from planish.backends.onnx_layers import LAYERS
from planish.backends.onnx_numbers import NUMBER_OPS
from planish.backends.onnx_pointwise import POINTWISE
from planish.backends.onnx_portable import PORTABLE
from planish.backends.onnx_quantize import QUANTIZING
from planish.backends.onnx_recurrent import RECURRENT
from planish.backends.onnx_reduce import REDUCTIONS
from planish.backends.onnx_rotary import ROTARY
from planish.backends.onnx_shapes import SHAPES
from planish.backends.onnx_view import Style, Table, Translator
from planish.backends.ort_attention_int8 import ORT_ATTENTION
from planish.backends.ort_codes import ORT_CODES
from planish.backends.ort_matmul import ORT_MATMUL
from planish.backends.ort_patches import ORT_PATCHES
from planish.backends.ort_recurrent_int8 import ORT_RECURRENT
from planish.backends.ort_weights import ORT_WEIGHTS
from planish.ir.program import Program

TABLE: dict[Any, Translator] = {
    **POINTWISE,
    **ACTIVATIONS,
    **SHAPES,
    **REDUCTIONS,
    **INDEXING,
    **LAYERS,
    **CONVOLUTIONS,
    **RECURRENT,
    **ATTENTION,
    **ROTARY,
    **BRANCHES,
    **BAGS,
    **QUANTIZING,
}

# Whose integer kernels -> what looks back from an operator and makes one kernel of several
# operators; tried in this order before the table, None where it declines.
INTEGER_KERNELS: dict[str, tuple[Table, ...]] = {
    "standard": (ONNX_GRIDS, PORTABLE),
    "onnxruntime": (ORT_CODES, ORT_RECURRENT, ORT_MATMUL, ORT_PATCHES, ORT_ATTENTION, ORT_WEIGHTS),
}

_EAGER_NUMBERS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def emit(program: Program, opset: int, style: Style) -> Emitter:
    """Translate a program node by node.

    Raises:
        UnsupportedError: an operator has no ONNX form; names the node and its source line.
    """
    program = _ready(program, opset)
    while True:
        e = Emitter(program, opset, style)
        e.reserve([*program.signature.tensor_names, *program.signature.output_names])
        try:
            emit_nodes(e)
            return e
        except _UntranslatableError as found:
            # Known in general, but not with these arguments: start again with it taken apart.
            program = _decomposed(program, found.node, opset)


class _UntranslatableError(Exception):
    """A translation declined, and torch's library has none."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


def _decomposed(program: Program, node: Node, opset: int) -> Program:
    """A copy with this node taken apart, and all that ask for the same thing."""
    from planish.backends.onnx_fallback import decompose, in_library, unsupported

    if node.graph is not program.graph:
        raise unsupported(node, "inside a branch, it cannot be taken apart")
    copy = program.clone()
    asked = _request(node)
    alike = [n for n in copy.operators if n.target is node.target and _request(n) == asked]
    decompose(copy, alike, lambda t: t is not node.target and (_known(t) or in_library(t, opset)))
    return copy


def _request(node: Node) -> str:
    """The arguments that are no tensors, as text."""
    plain = [a for a in node.args if not isinstance(a, Node)]
    options = {k: v for k, v in node.kwargs.items() if not isinstance(v, Node)}
    return f"{plain} {options}"


def emit_nodes(e: Emitter) -> None:
    """Translate every node but the output."""
    names = iter(e.program.signature.tensor_names)
    for node in e.program.graph.nodes:
        e.at(node)
        if node.op == "placeholder":
            e.add_input(node, next(names))
        elif node.op == "get_attr":
            tensor = e.known(node)
            if tensor is not None:
                e.hold(node, e.tensor(tensor, str(node.target)))
        elif node.op == "call_function" and node.users:
            emit_operator(e, node)


def emit_operator(e: Emitter, node: Node) -> None:
    """Translate one node: from the table, else with torch's own library."""
    if node.target in NUMBER_OPS and not isinstance(node.meta.get("val"), Tensor):
        if node.target in _EAGER_NUMBERS:
            e.view(node)
        return  # computed when somebody asks, mostly from its expression
    translator = TABLE.get(node.target)
    result = _on_integers(e, node)
    if result is None:
        result = translator(e, node) if translator is not None else None
    if result is None:
        from planish.backends.onnx_fallback import in_library, translate_with_library

        if translator is not None and not in_library(node.target, e.opset):
            raise _UntranslatableError(node)
        result = translate_with_library(e, node)
    e.hold(node, result)


def _on_integers(e: Emitter, node: Node) -> Any:  # noqa: ANN401 - what translations return
    for table in INTEGER_KERNELS[e.style.integers]:
        translator = table.get(node.target)
        result = translator(e, node) if translator is not None else None
        if result is not None:
            return result
    return None


def _ready(program: Program, opset: int) -> Program:
    """The program, or a copy whose operators all have a translation."""
    copied = False
    for _ in range(4):  # a decomposition may contain operators that need one themselves
        missing = [n for n in program.operators if not _known(n.target)]
        if not missing:
            return program
        from planish.backends.onnx_fallback import decompose, in_library

        strange = [n for n in missing if not in_library(n.target, opset)]
        if not strange:
            return program
        if not copied:
            names = {n.name for n in strange}
            program, copied = program.clone(), True
            strange = [n for n in program.operators if n.name in names]
        decompose(program, strange, lambda t: _known(t) or in_library(t, opset))
    return program


def _known(target: Any) -> bool:  # noqa: ANN401
    return target in TABLE or target in NUMBER_OPS
