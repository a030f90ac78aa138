"""Operators without a translation of their own: torch's ONNX library, else decomposition.

torch ships some 500 ONNX translations. Loading them takes half a second, so it is done only for a
program that needs one. An operator that they lack too is decomposed into smaller ones, that node
alone: decomposing the whole program would take apart what the other translations keep whole.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from planish.backends.onnx_file import onnx_dtype
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import dtype_of
from planish.ir.errors import UnsupportedError
from planish.ir.ops import op_name
from planish.ir.program import Program

if TYPE_CHECKING:
    import onnx_ir as ir

# On a node that came from a decomposition: the operator the user wrote.
_ORIGIN = "decomposed_from"


@cache
def library(opset: int) -> Any:  # noqa: ANN401 - torch's registry, which publishes no type
    """Torch's table of translations for an opset."""
    from torch.onnx._internal.exporter import _registration

    noisy = logging.getLogger(_registration.__name__)
    level = noisy.level
    # It warns about torchvision's operators when torchvision is not installed.
    noisy.setLevel(logging.ERROR)
    try:
        return _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    finally:
        noisy.setLevel(level)


def in_library(target: Any, opset: int) -> bool:  # noqa: ANN401
    """Whether torch translates this operator."""
    return isinstance(target, OpOverload) and bool(library(opset).is_registered(target))


def translate_with_library(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """Emit a node with torch's own translation.

    Raises:
        UnsupportedError: there is none, or it rejects these arguments.
    """
    import onnxscript
    from torch.onnx._internal.exporter import _building, _core, _dispatching

    function, reason = _dispatching.dispatch(node, library(e.opset))
    if function is None:
        raise unsupported(node, reason)
    opset = onnxscript.values.Opset("", e.opset)
    recorder: Any = _building.OpRecorder(opset, {})  # type: ignore[abstract]
    stand_ins: dict[Any, ir.Value] = {}
    args = [_argument(e, a, opset, stand_ins) for a in _promoted(e, node)]
    kwargs = {k: _argument(e, a, opset, stand_ins) for k, a in node.kwargs.items()}
    if "dtype" in kwargs and kwargs["dtype"] is None:
        kwargs["dtype"] = -1
    previous = _core.current_tracer
    try:
        with onnxscript.evaluator.default_as(recorder):
            _core.current_tracer = recorder
            outputs = function(*args, **kwargs)
    except Exception as error:  # translations fail in many ways; each means "not representable"
        raise unsupported(node, f"torch's translation rejects it: {error}") from error
    finally:
        _core.current_tracer = previous
    for onnx_node in recorder.nodes:
        _replace_inputs(onnx_node, stand_ins)
        e.append(onnx_node)
    e.functions.update(recorder.functions)
    if isinstance(outputs, (list, tuple)):
        return [stand_ins.get(o, o) for o in outputs]
    return stand_ins.get(outputs, outputs)


def _replace_inputs(onnx_node: ir.Node, stand_ins: dict[Any, ir.Value]) -> None:
    """Let a node read the real values, and the bodies of its loops too."""
    import onnx_ir as ir

    for position, value in enumerate(onnx_node.inputs):
        if value in stand_ins:
            onnx_node.replace_input_with(position, stand_ins[value])
    for attribute in onnx_node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                _replace_inputs(inner, stand_ins)


def _promoted(e: Emitter, node: Node) -> list[Any]:
    """The arguments, with mixed dtypes of an elementwise operator made one."""
    from planish.backends.onnx_pointwise import promoted

    args = list(node.args)
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.pointwise not in target.tags:
        return args
    tensors = [a for a in args if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]
    if len({dtype_of(t.meta["val"]) for t in tensors}) < 2:
        return args
    dtype = promoted(*tensors)
    swap = {t: e.operand(t, dtype) for t in tensors if dtype_of(t.meta["val"]) is not torch.bool}
    return [swap.get(a, a) if isinstance(a, Node) else a for a in args]


def _argument(e: Emitter, argument: Any, opset: Any, stand_ins: dict[Any, Any]) -> Any:  # noqa: ANN401
    """An argument as torch's translations take it; tensors become stand-ins with operators."""
    import onnx_ir as ir
    from torch.onnx._internal.exporter import _tensors

    if isinstance(argument, Node):
        held = None if argument.op == "placeholder" else e.held_or_none(argument)
        if isinstance(held, list):
            return [_stand_in(e.materialize(v), opset, stand_ins) for v in held]
        argument = e.value(argument)
    if isinstance(argument, ir.Value):
        return (
            _stand_in(argument, opset, stand_ins)
            if not isinstance(argument, _tensors.SymbolicTensor)
            else argument
        )
    if isinstance(argument, (list, tuple)):
        return [_argument(e, a, opset, stand_ins) for a in argument]
    if isinstance(argument, torch.dtype):
        return ir.DataType(onnx_dtype(argument))
    if isinstance(argument, (torch.device, torch.layout, torch.memory_format)):
        return str(argument)
    return argument


def _stand_in(value: ir.Value, opset: Any, stand_ins: dict[Any, Any]) -> Any:  # noqa: ANN401
    from torch.onnx._internal.exporter import _tensors

    tensor = _tensors.SymbolicTensor(opset, value.name, value.shape, value.type)
    stand_ins[tensor] = value
    return tensor


def unsupported(node: Node, reason: str) -> UnsupportedError:
    """The error for an operator that cannot be written to ONNX."""
    name = node.meta.get(_ORIGIN, op_name(node.target))
    return UnsupportedError(
        f"operator {name} cannot be written to ONNX: {reason}",
        where=node,
        hint="rewrite this line of the model with other operators",
    )


# -- decomposition ----------------------------------------------------------------------------


def decompose(program: Program, nodes: list[Node], keep: Callable[[Any], bool]) -> None:
    """Replace nodes by smaller operators, in place.

    Args:
        program: a private copy; its symbols stay as they are.
        nodes: what to take apart.
        keep: whether an operator may stay in the result.

    Raises:
        UnsupportedError: torch knows no decomposition.
    """
    table = {t: f for t, f in _decompositions().items() if not keep(t)}
    for node in nodes:
        _decompose_one(program, node, table)
    program.touch()


@cache
def _decompositions() -> dict[Any, Any]:
    """All decompositions torch has, the export ones first."""
    found = dict(torch._decomp.decomposition_table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.update(torch.export.default_decompositions().items())
    return {t: f for t, f in found.items() if hasattr(t, "_schema")}


def _decompose_one(program: Program, node: Node, table: dict[Any, Any]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = list(node.all_input_nodes)
    positions = {n: i for i, n in enumerate(inputs)}

    def call(*values: Any) -> Any:  # noqa: ANN401
        args = map_arg(node.args, lambda n: values[positions[n]])
        kwargs = map_arg(node.kwargs, lambda n: values[positions[n]])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    mode = program.fake_mode
    try:
        with mode, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced: GraphModule = make_fx(call, decomposition_table=table)(
                *[n.meta["val"] for n in inputs]
            )
    except Exception as error:  # torch raises whatever the operator's Python form raises
        raise unsupported(node, f"it cannot be decomposed: {error}") from error
    if any(n.target is node.target for n in traced.graph.nodes):
        raise unsupported(node, "neither planish nor torch has a translation or decomposition")
    _splice(program, node, traced, inputs)


def _splice(program: Program, node: Node, traced: GraphModule, inputs: list[Node]) -> None:
    """Put a traced body in the place of a node."""
    env: dict[Node, Any] = {}
    rest = iter(inputs)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(rest)
            continue
        if inner.op == "output":
            _replace(node, map_arg(inner.args[0], lambda n: env[n]))
            break
        with program.graph.inserting_before(node):
            new = program.graph.node_copy(inner, lambda n: env[n])
        new.meta = {
            "val": inner.meta.get("val"),
            "stack_trace": node.meta.get("stack_trace"),
            _ORIGIN: node.meta.get(_ORIGIN, op_name(node.target)),
        }
        if inner.op == "get_attr":
            name = f"{node.name}.{inner.target}"
            tensor = getattr(traced, str(inner.target))
            program.constants[name] = tensor
            new.target = name
            new.meta["val"] = program.fake_mode.from_tensor(tensor, static_shapes=True)
        env[inner] = new
    program.graph.erase_node(node)


def _replace(node: Node, result: Any) -> None:  # noqa: ANN401 - a node, or a list of them
    if isinstance(result, Node):
        node.replace_all_uses_with(result, propagate_meta=False)
        return
    for user in list(node.users):
        part = result[int(user.args[1])]  # type: ignore[arg-type]
        user.replace_all_uses_with(part, propagate_meta=False)
        user.graph.erase_node(user)
