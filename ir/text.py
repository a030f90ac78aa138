"""The canonical text of a program: deterministic, diffable, without addresses or file names.

    program(%x: f32[batch, 3, 224, 224])
      const @conv.weight: f32[8, 3, 3, 3]
      %0: f32[batch, 8, 112, 112] = aten.conv2d(%x, @conv.weight, stride=[2, 2], padding=[1, 1])
      return %0

Values are renumbered in order, defaults are left out, and arguments other than leading values are
named from the operator's schema.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from planish.ir.archive import raw_bytes
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.ir.tensortype import dim_text, dtype_name, tensor_type, type_text


def text(program: Program, *, values: bool = False) -> str:
    """Print a program.

    Args:
        program: what to print.
        values: also print a digest of every constant's value.
    """
    return "\n".join(lines(program, values=values)) + "\n"


def lines(program: Program, *, values: bool = False) -> list[str]:
    """The text as lines; see ``text``."""
    names = value_names(program)
    symbols = program.signature.symbols
    inputs = ", ".join(
        f"{names[n]}: {type_text(n.meta.get('val'), symbols)}" for n in program.placeholders
    )
    result = [f"program({inputs})"]
    for name in sorted({str(n.target) for n in program.graph.find_nodes(op="get_attr")}):
        result.extend(constant_lines(program, name, values=values))
    for node in program.operators:
        result.append("  " + node_text(program, node, names))
    outputs = ", ".join(format_value(v, names, symbols) for v in program.results)
    result.append(f"  return {outputs}")
    return result


def value_names(program: Program) -> dict[Node, str]:
    """The canonical name of every value: ``%x``, ``@conv.weight``, ``%0``, ``%1``."""
    names: dict[Node, str] = {}
    for node, public in zip(program.placeholders, program.signature.tensor_names, strict=True):
        names[node] = f"%{public}"
    count = 0
    for node in program.graph.nodes:
        if node.op == "get_attr":
            names[node] = f"@{node.target}"
        elif node.op == "call_function":
            names[node] = f"%{count}"
            count += 1
    return names


def node_text(program: Program, node: Node, names: dict[Node, str]) -> str:
    """One operator as ``%3: f32[B, 8] = aten.linear(%2, @fc.weight)``."""
    symbols = program.signature.symbols
    call = f"{op_name(node.target)}({_arguments(node, names, symbols)})"
    return f"{names[node]}: {type_text(node.meta.get('val'), symbols)} = {call}"


def constant_lines(program: Program, name: str, *, values: bool) -> list[str]:
    """The line that declares a constant; the whole body, if it is one of a branch."""
    value = program.constants[name]
    symbols = program.signature.symbols
    if isinstance(value, GraphModule):
        return _body_lines(value, name, symbols, "  ")
    printed = tensor_type(value, symbols, program.layouts.get(name))
    line = f"  const @{name}: {printed}"
    return [f"{line} = {digest(value)}" if values else line]


def _body_lines(body: GraphModule, name: str, symbols: Any, indent: str) -> list[str]:  # noqa: ANN401
    """The body of a branch, over inputs ``%a``, ``%b``, ... , with the bodies inside it."""
    names: dict[Node, str] = {}
    inputs: list[str] = []
    lines: list[str] = []
    count = 0
    for node in body.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{_letters(len(inputs))}"
            inputs.append(f"{names[node]}: {type_text(node.meta.get('val'), symbols)}")
        elif node.op == "get_attr":
            names[node] = f"@{node.target}"
            inner = getattr(body, str(node.target), None)
            if isinstance(inner, GraphModule):
                lines.extend(_body_lines(inner, str(node.target), symbols, indent + "  "))
        elif node.op == "call_function":
            names[node], count = f"%{count}", count + 1
            call = f"{op_name(node.target)}({_arguments(node, names, symbols)})"
            kind = type_text(node.meta.get("val"), symbols)
            lines.append(f"{indent}  {names[node]}: {kind} = {call}")
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            returned = ", ".join(format_value(v, names, symbols) for v in results)
            lines.append(f"{indent}  return {returned}")
    return [f"{indent}body @{name}({', '.join(inputs)})", *lines]


def _letters(position: int) -> str:
    """``a``, ``b``, ..., ``z``, ``a1``, ``b1``, ..."""
    letter, round_ = chr(ord("a") + position % 26), position // 26
    return f"{letter}{round_ or ''}"


def digest(tensor: Tensor) -> str:
    """A short hash of a tensor's bytes in row-major order."""
    return hashlib.sha256(raw_bytes(tensor).tobytes()).hexdigest()[:12]


def _arguments(node: Node, names: dict[Node, str], symbols: Any) -> str:  # noqa: ANN401
    target = node.target
    if not isinstance(target, OpOverload):
        plain = [format_value(a, names, symbols) for a in node.args]
        named = [f"{k}={format_value(v, names, symbols)}" for k, v in node.kwargs.items()]
        return ", ".join(plain + named)
    parts: list[str] = []
    positional = True
    for position, declared in enumerate(target._schema.arguments):
        if position < len(node.args):
            value = node.args[position]
        elif declared.name in node.kwargs:
            value = node.kwargs[declared.name]
        else:
            positional = False
            continue
        if declared.has_default_value() and _same(value, declared.default_value):
            positional = False
            continue
        positional = positional and _is_value(value) and not declared.kwarg_only
        printed = format_value(value, names, symbols)
        parts.append(printed if positional else f"{declared.name}={printed}")
    return ", ".join(parts)


def _is_value(value: object) -> bool:
    """Whether an argument is a node, or a list of nodes."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, Node) or v is None for v in value)
    return isinstance(value, Node)


def _same(value: object, default: object) -> bool:
    if isinstance(value, (list, tuple)) or isinstance(default, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and isinstance(default, (list, tuple))
            and not any(isinstance(v, Node) for v in value)
            and list(value) == list(default)
        )
    return not isinstance(value, Node) and type(value) is type(default) and value == default


def format_value(value: object, names: dict[Node, str], symbols: Any) -> str:  # noqa: ANN401
    """Print one argument."""
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_value(v, names, symbols) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, torch.SymInt):
        return str(dim_text(value, symbols))
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    return repr(value)


def excerpt(program: Program, node: Node, *, around: int = 5) -> str:
    """The lines around a node, with an arrow at it."""
    names = value_names(program)
    nodes = program.operators
    if node not in nodes:
        return node.format_node() or node.name
    center = nodes.index(node)
    shown = nodes[max(0, center - around) : center + around + 1]
    return "\n".join(
        ("--> " if n is node else "    ") + node_text(program, n, names) for n in shown
    )
