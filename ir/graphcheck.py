"""What a graph read from a file may hold: nothing that could make torch's reader run code.

Torch's reader evaluates symbolic sizes as Python expressions, runs guards as code, resolves any
attribute of ``torch`` as an operator, and writes names into the code it generates. Here, sizes must
be arithmetic over symbols, operators must be operators, and names must be names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

# Names that may stand in a symbolic size, as sympy's ``srepr`` writes it.
_SIZE_FUNCTIONS = frozenset(
    "Symbol Integer Rational Float Add Mul Pow Abs Max Min Mod floor ceiling Piecewise "
    "ExprCondPair Tuple Eq Ne Equality Unequality GreaterThan LessThan StrictGreaterThan "
    "StrictLessThan And Or Not FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt "
    "FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat "
    "TruncToInt RoundToInt RoundDecimal ToFloat Identity".split()
)
_SIZE_VALUES = frozenset({"true", "false", "oo", "int_oo"})
_ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative", "real", "finite", "precision"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_LARGEST_EXPRESSION = 20_000
_LARGEST_POWER = 64
_DEEPEST_POWER = 2  # (x**64)**64 is read in no time; each further level takes 64 times the memory

_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?", re.ASCII)
# It maps any file it is told to into memory, and creates it if asked to.
_FORBIDDEN = frozenset({"torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out"})


# Keys whose values are names of values, or are objects keyed by such names.
_NAMED = frozenset(
    {"name", "as_name", "tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"}
)


class UnsafeGraphError(Exception):
    """A graph holds what no graph that planish or torch writes holds."""


def check_graph(data: Any) -> None:  # noqa: ANN401 - any JSON
    """Refuse JSON that could make torch's reader do more than build a graph.

    Raises:
        UnsafeGraphError: says what was found.
    """
    if not isinstance(data, dict) or "graph_module" not in data:
        raise UnsafeGraphError("it is not a graph")
    for key, value in walk(data):
        if key == "expr_str":
            check_size(value)
        elif key == "as_operator":
            check_operator(value)
        elif key in _NAMED:
            for name in value if isinstance(value, dict) else [value]:
                check_identifier(name)
        elif key in ("parameter_name", "buffer_name", "tensor_constant_name"):
            check_constant_name(value)
        elif key == "as_custom_obj":
            raise UnsafeGraphError("it holds a script object")
    for node in _nodes(data):
        check_operator(node.get("target"))
        metadata = node.get("metadata")
        kept = ("stack_trace", "nn_module_stack", "torch_fn")
        node["metadata"] = {k: v for k, v in (metadata or {}).items() if k in kept}


def walk(data: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - any JSON
    """Every (key, value) of every object in some JSON."""
    pending = [data]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield from current.items()
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)


def _nodes(data: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - any JSON
    """The nodes of every graph in it, bodies of branches included."""
    for key, value in walk(data):
        if key == "nodes" and isinstance(value, list):
            for node in value:
                if not isinstance(node, dict):
                    raise UnsafeGraphError("a node is not an object")
                yield node


def check_identifier(name: Any) -> None:  # noqa: ANN401 - any JSON
    """Refuse a value's name that is no identifier: fx writes names into the code it generates.

    Raises:
        UnsafeGraphError: quotes it.
    """
    if name is not None and name != "" and not (isinstance(name, str) and name.isidentifier()):
        raise UnsafeGraphError(f"{str(name)[:60]!r} is not a name of a value")


def check_constant_name(name: Any) -> None:  # noqa: ANN401 - any JSON
    """Refuse a constant's name that could end a string in generated code.

    Raises:
        UnsafeGraphError: quotes it.
    """
    if not isinstance(name, str) or re.fullmatch(r"[\w.:/@+-]{1,1000}", name) is None:
        raise UnsafeGraphError(f"{str(name)[:60]!r} is not a name of a constant")


@cache
def _symbolic_operators() -> frozenset[str]:
    """The functions on symbolic numbers, as torch's JSON names them."""
    from torch._export.serde import serialize  # imports half of torch

    name = serialize.GraphModuleSerializer.serialize_operator
    return frozenset(name(None, op) for op in serialize._SYM_OPS)  # type: ignore[arg-type]


def check_operator(name: Any) -> None:  # noqa: ANN401 - any JSON
    """Refuse a name that is not an operator of this process.

    Raises:
        UnsafeGraphError: names it.
    """
    if name in _symbolic_operators():
        return
    parts = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if parts is None or name in _FORBIDDEN:
        raise UnsafeGraphError(f"it calls {name!r}, which is no operator of a traced graph")
    namespace, packet, overload = parts.groups()
    found: Any = getattr(getattr(torch.ops, namespace), packet, None)
    if namespace != "higher_order" and overload is not None:
        found = getattr(found, overload, None)
    if not isinstance(found, (OpOverload, HigherOrderOperator)):
        raise UnsafeGraphError(
            f"it calls {name!r}, which this process does not have; import the library that "
            "registers it first"
        )


def check_size(text: Any) -> None:  # noqa: ANN401 - any JSON
    """Refuse a symbolic size that is not arithmetic over symbols and modest numbers.

    Raises:
        UnsafeGraphError: quotes it.
    """
    problem = UnsafeGraphError(f"{str(text)[:60]!r} is not a symbolic size")
    if not isinstance(text, str) or len(text) > _LARGEST_EXPRESSION:
        raise problem
    try:
        tree = ast.parse(text, mode="eval")
        fine = _is_size(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise problem from error
    if not fine:
        raise problem


def _is_size(node: ast.expr, powers: int = 0) -> bool:
    """Whether it is arithmetic; ``powers`` counts the powers it is the base of."""
    if isinstance(node, ast.Name):
        return node.id in _SIZE_VALUES or _is_symbol_name(node.id)
    if _is_number(node):
        return True
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if node.func.id not in _SIZE_FUNCTIONS:
        return False
    for keyword in node.keywords:
        known = keyword.arg in _ASSUMPTIONS or keyword.arg == "evaluate"
        if not known or not isinstance(keyword.value, ast.Constant):
            return False
        if not isinstance(keyword.value.value, (bool, int)):
            return False
    if node.func.id == "Symbol":
        return (
            len(node.args) == 1
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
            and _is_symbol_name(node.args[0].value)
        )
    if node.func.id == "Float" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
        return re.fullmatch(r"-?[\d.]{1,40}(e[+-]?\d{1,3})?", str(node.args[0].value)) is not None
    if node.func.id in _POWERS:
        powers += 1
        if powers > _DEEPEST_POWER or len(node.args) != 2 or not _is_modest(node.args[1]):
            return False
    return all(_is_size(argument, powers) for argument in node.args)


def _is_symbol_name(name: str) -> bool:
    """Torch's symbols are a letter or two and a number: ``s77``, ``u0``, ``zf3``."""
    return re.fullmatch(r"[a-z]{1,3}\d{1,9}", name, re.ASCII) is not None


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        return False
    return abs(node.value) < 2**64  # type: ignore[arg-type]


def _is_modest(node: ast.expr) -> bool:
    """A small number or one symbol: an exponent that cannot blow up."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "Symbol":
            return True
        if node.func.id in ("Integer", "Rational"):
            return all(_is_modest(argument) for argument in node.args)
        return False
    return _is_number(node) and abs(ast.literal_eval(node)) <= _LARGEST_POWER
