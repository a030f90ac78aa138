"""The parameters of ``forward``: taken apart into flat inputs, and held to what the program takes.

def forward(self, pair: Tuple[Tensor, Tensor], scale: int = 2):
assert scale == 2, "input 'scale' was the constant 2 when this file was made"
x = pair[0]
assert x.dtype == torch.float32 and x.dim() == 2 and x.size(1) == 8, "input 'x' must be ..."
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import sympy
from torch import SymInt, Tensor

from planish.backends.script_call import Types, constant_type, kind_of, structure
from planish.backends.script_text import Body, quoted
from planish.ir.program import Program
from planish.ir.tensortype import dim_text, dtype_name
from planish.ir.trees import encode


@dataclass(frozen=True)
class _Leaf:
    """One leaf of the caller's inputs.

    Attributes:
        type: in TorchScript.
        tree: what stands for it in the file's description; see ``script_run``.
        fixed: whether it was a constant at capture, and is no input of the program.
        value: that constant.
    """

    type: str
    tree: Any
    fixed: bool = False
    value: object = None


def open_inputs(
    program: Program,
    names: list[str],
    body: Body,
    types: Types,
    remark: Callable[[str], None],
) -> tuple[list[str], list[Any]]:
    """Write the head of ``forward``.

    Args:
        program: whose inputs they are.
        names: of the parameters.
        body: gets the lines; knows the placeholders of its graph afterwards.
        types: takes the named tuples that parameters consist of.
        remark: told what changed its form.

    Returns:
        The parameters as they are declared, and for each how flat inputs fill it.
    """
    args, kwargs = program.signature.in_spec.children()
    rest = iter(_leaves(program))
    declared, trees, expressions = [], [], []
    for name, spec in zip(names, [*args.children(), *kwargs.children()], strict=True):
        leaves = list(islice(rest, spec.num_leaves))
        kinds = [(leaf.type, leaf.tree) for leaf in leaves]
        shown = structure(spec, kinds, types, remark, f"the argument {name!r}")
        for leaf, text in zip(leaves, shown.leaves(name), strict=True):
            if leaf.fixed:
                _check_constant(body, text, leaf.value, name)
            else:
                expressions.append(text)
        default = (
            f" = {body.literal(leaves[0].value)}" if spec.is_leaf() and leaves[0].fixed else ""
        )
        declared.append((f"{name}: {shown.type}", default))
        trees.append(shown.tree)
    _take(program, body, expressions)
    return _with_defaults(declared), trees


def _leaves(program: Program) -> list[_Leaf]:
    signature, placeholders = program.signature, iter(program.placeholders)
    made: list[_Leaf] = []
    flat = 0
    for position, name in enumerate(signature.input_names):
        if position in signature.fixed:
            value = signature.fixed[position]
            tree = None if value is None else {"value": encode(value, name)}
            made.append(_Leaf(constant_type(value), tree, True, value))
        else:
            made.append(_Leaf(kind_of(next(placeholders), program), flat))
            flat += 1
    return made


def _with_defaults(declared: list[tuple[str, str]]) -> list[str]:
    """Parameters; a default is possible only where all after it have one."""
    result, possible = [], True
    for text, default in reversed(declared):
        possible = possible and bool(default)
        result.append(text + (default if possible else ""))
    return result[::-1]


def _check_constant(body: Body, text: str, value: object, name: str) -> None:
    """Assert that a constant of the capture is passed as it was."""
    relation = "is None" if value is None else f"== {body.literal(value)}"
    nan = isinstance(value, float) and math.isnan(value)
    test = f"math.isnan({text})" if nan else f"{text} {relation}"
    message = f"input {name!r} was the constant {value!r} when this file was made"
    body.add(f"assert {test}, {quoted(message)}")


def _take(program: Program, body: Body, expressions: list[str]) -> None:
    """Give the flat inputs their names, and refuse what the program was not captured for."""
    seen: dict[str, str] = {}
    inputs = body.lowered.graph.find_nodes(op="placeholder")
    rows = zip(
        inputs, program.placeholders, program.signature.tensor_names, expressions, strict=True
    )
    for made, node, name, text in rows:
        variable = text
        if not text.isidentifier():
            variable = body.names.new(node.name)
            body.add(f"{variable} = {text}")
        body.variables[made] = variable
        value = node.meta["val"]
        if isinstance(value, Tensor):
            _check_tensor(program, body, variable, name, value, seen)


def _check_tensor(
    program: Program, body: Body, variable: str, name: str, value: Tensor, seen: dict[str, str]
) -> None:
    """Assert an input's type and sizes.

    Args:
        program: whose input it is.
        body: gets the assertion.
        variable: the input's name in the source.
        name: the user's name for it.
        value: its type.
        seen: symbol -> the text of its size; grows by what this input says.
    """
    signature = program.signature
    tests = [f"{variable}.dtype == {value.dtype}", f"{variable}.dim() == {value.dim()}"]
    symbols: set[str] = set()
    for axis, size in enumerate(value.shape):
        text = f"{variable}.size({axis})"
        if isinstance(size, SymInt):
            symbols |= {str(s) for s in size.node.expr.free_symbols}
            tests += _size_tests(size.node.expr, text, seen, signature.ranges)
        else:
            tests.append(f"{text} == {size}")
    sizes = ", ".join(str(dim_text(d, signature.symbols)) for d in value.shape)
    ranges = [
        f"{signature.symbols.get(s, s)} from {low} to {high if high is not None else 'any size'}"
        for s, (low, high) in sorted(signature.ranges.items())
        if s in symbols
    ]
    wanted = f"{dtype_name(value.dtype)} [{sizes}]" + (f", {', '.join(ranges)}" if ranges else "")
    body.add(f"assert {' and '.join(tests)}, {quoted(f'input {name!r} must be {wanted}')}")


def _size_tests(
    expr: sympy.Expr,
    text: str,
    seen: dict[str, str],
    ranges: Mapping[str, tuple[int, int | None]],
) -> list[str]:
    """What a dynamic size must fulfill: ``a * symbol + b``; anything else is not tested.

    Args:
        expr: the size, as the program says it.
        text: the size, as the source reads it.
        seen: symbol -> the text of its size; grows where this size is the first to tell one.
        ranges: symbol -> smallest and largest legal size.
    """
    free = sorted(expr.free_symbols, key=str)
    if len(free) != 1 or not expr.is_polynomial(*free) or sympy.degree(expr, free[0]) != 1:
        return []
    symbol, coefficients = str(free[0]), sympy.Poly(expr, free[0]).all_coeffs()
    if not all(c.is_Integer for c in coefficients) or coefficients[0] < 0:
        return []
    factor, offset = (int(c) for c in coefficients)
    if symbol in seen:
        plain = factor == 1 and not offset
        return [f"{text} == {seen[symbol]}" + ("" if plain else f" * {factor} + {offset}")]
    tests = [f"({text} - {offset}) % {factor} == 0"] * (factor > 1)
    shifted = f"({text} - {offset})" if offset else text
    seen[symbol] = f"{shifted} // {factor}" if factor > 1 else shifted
    low, high = ranges.get(symbol, (0, None))
    least = factor * low + offset
    tests += [f"{text} >= {least}"] * (least > 0)
    return tests + ([f"{text} <= {factor * high + offset}"] if high is not None else [])
