"""The verifier's rules on schemes: sparse layouts hold, quantization is possible and symmetric."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, op_name
from planish.ir.program import Program
from planish.ir.quantscheme import INTEGERS, spread
from planish.ir.tensortype import SparseLayout, dtype_name
from planish.ir.verify_rules import Fault, Subject


def sparse_layouts(subject: Subject) -> Iterator[Fault]:
    """A constant claimed to be ``sparse<n:m>`` really is."""
    program, since = subject.program, subject.since
    for name, layout in program.layouts.items():
        value = program.constants.get(name)
        if not isinstance(value, Tensor):
            yield Fault(f"the constant {name!r} is no tensor, and claims {layout}")
            continue
        codes = not value.is_floating_point() and not value.is_complex()
        checked = since is not None and since.layouts.get(name) == layout
        if checked and not codes and name not in subject.new_constants:
            continue  # of integers, the zero points may be new
        zeros = _zero_points(program, name, value) if codes else [None]
        problem = None if zeros else "the zero point of its integers is computed"
        for zero in zeros:
            problem = problem or layout_problem(value, layout, zero)
        if problem:
            yield Fault(f"the constant {name!r} claims {layout}, but {problem}")


def _zero_points(program: Program, name: str, value: Tensor) -> list[Tensor | None]:
    """The integers that stand for zero, by each ``dequantize`` that reads a constant.

    Where none does, it is the integer 0, as None; where one is computed, there is no answer: [].
    """
    found: list[Tensor | None] = []
    for node in program.graph.find_nodes(op="get_attr"):
        for user in node.users if node.target == name else ():
            if op_name(user.target) != "planish.dequantize" or user.args[0] is not node:
                continue
            zero = known_value(program, argument(user, "zero_point"))
            if zero is None:
                return []
            axis, block = argument(user, "axis"), argument(user, "block_size")
            found.append(spread(zero, value, axis, block).to(torch.int32))
    return found or [None]


def layout_problem(value: Tensor, layout: SparseLayout, zero: Tensor | None = None) -> str | None:
    """Say why a tensor does not have a layout, or None where it does.

    A last group of fewer than ``m`` entries may also hold ``n`` nonzeros, and a last block may be
    smaller.

    Args:
        value: any tensor.
        layout: what it claims.
        zero: which integers stand for zero, in a shape that broadcasts to ``value``; None for 0.
    """
    nonzero = value != (0 if zero is None else zero)
    least = 0 if layout.axis is None else 1
    if not least <= layout.n <= layout.m or (layout.axis is not None and layout.block != (1, 1)):
        return f"{layout.n}:{layout.m} is no layout"
    if layout.axis is None:
        return _spread_problem(nonzero, layout)
    if not -value.dim() <= layout.axis < value.dim():
        return f"it has only {value.dim()} axes"
    axis = layout.axis % value.dim()
    whole = value.shape[axis] // layout.m * layout.m
    groups = nonzero.narrow(axis, 0, whole).unflatten(axis, (-1, layout.m))
    crowded = int((groups.sum(axis + 1) > layout.n).sum())
    tail = nonzero.narrow(axis, whole, value.shape[axis] - whole)
    crowded += int((tail.sum(axis) > layout.n).sum())
    return f"{crowded} groups hold more than {layout.n} nonzeros" if crowded else None


def _spread_problem(nonzero: Tensor, layout: SparseLayout) -> str | None:
    """The same for a layout of the whole tensor: entries, or blocks of its first two axes."""
    what = "entries"
    if layout.block != (1, 1):
        if nonzero.dim() < 2:
            return f"it has only {nonzero.dim()} axes"
        what = "blocks"
        for axis, size in enumerate(layout.block):
            short = nonzero.shape[axis] % size
            if short:
                shape = [*nonzero.shape]
                shape[axis] = size - short
                nonzero = torch.cat([nonzero, nonzero.new_zeros(shape)], axis)
            nonzero = nonzero.unflatten(axis, (-1, size)).any(axis + 1)
    if nonzero.numel() != layout.m:
        return f"it has {nonzero.numel()} {what}, not {layout.m}"
    count = int(nonzero.sum())
    return f"{count} {what} are nonzero" if count > layout.n else None


Scheme = Callable[[Program, Node], str | None]


def operator_schemes(subject: Subject) -> Iterator[Fault]:
    """Operators that quantize do so by a possible scheme, the same on both sides."""
    for node in subject.program.operators:
        scheme = OPERATOR_SCHEMES.get(op_name(node.target))
        problem = scheme(subject.program, node) if scheme is not None else None
        if problem:
            yield Fault(problem, node)


def known_value(program: Program, value: object) -> Tensor | None:
    """An argument as a tensor, where its value is known: a number or a constant."""
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    return program.constant(value)


def scale_problem(program: Program, scale: object) -> str | None:
    """Say why a scale is none, or None where it is positive and finite (or not known)."""
    value = known_value(program, scale)
    if value is None or bool(((value > 0) & value.isfinite()).all()):
        return None
    return "its scale is not positive and finite everywhere"


def _decomposed_scheme(program: Program, node: Node) -> str | None:
    """The scheme of torch's ``quantized_decomposed`` operators (an exported PT2E model)."""
    declared = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    scale, zero = ("scales", "zero_points") if "scales" in declared else ("scale", "zero_point")
    low, high = argument(node, "quant_min"), argument(node, "quant_max")
    dtype = argument(node, "dtype")
    info = torch.iinfo(dtype)
    if not info.min <= low < high <= info.max:
        return f"its range {low} to {high} is no range of {dtype_name(dtype)}"
    zeros = known_value(program, argument(node, zero))
    if zeros is not None and not bool(((zeros >= low) & (zeros <= high)).all()):
        return f"its zero point is outside of {low} to {high}"
    return scale_problem(program, argument(node, scale)) or _partner_problem(
        program, node, (scale, zero, "quant_min", "quant_max", "dtype", "axis")
    )


def _partner_problem(program: Program, node: Node, names: tuple[str, ...]) -> str | None:
    """Say in what a dequantize differs from the quantize it reads."""
    source = node.args[0]
    if not isinstance(source, Node) or op_name(node.target) != op_name(source.target).replace(
        ".quantize", ".dequantize"
    ):
        return None
    declared = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    for name in names:
        if name not in declared:
            continue
        mine, other = argument(node, name), argument(source, name)
        if not _same_value(program, mine, other):
            return f"its {name} is not that of {source.name}, which quantized its input"
    return None


def _same_value(program: Program, a: object, b: object) -> bool:
    if a is b:
        return True
    x, y = known_value(program, a), known_value(program, b)
    if x is not None and y is not None:
        return x.shape == y.shape and bool(torch.equal(x, y))
    return bool(a == b)  # of two computed values nothing is known: they are not the same


def _scheme(program: Program, node: Node) -> str | None:
    """The scheme of planish's own operators."""
    low, high, _ = INTEGERS.get(argument(node, "dtype"), (0, 0, None))
    if low == high:
        return f"there are no integers {argument(node, 'dtype')!r}"
    problem = scale_problem(program, argument(node, "scale"))
    if problem is not None:
        return problem
    zeros = known_value(program, argument(node, "zero_point"))
    if zeros is not None and not bool(((zeros >= low) & (zeros <= high)).all()):
        return f"its zero point is outside of {low} to {high}"
    codes = known_value(program, node.args[0])
    is_code = op_name(node.target) == "planish.dequantize"
    if is_code and codes is not None and not bool(((codes >= low) & (codes <= high)).all()):
        return f"its constant holds integers outside of {low} to {high}"
    return _dynamic_problem(node) or _partner_problem(
        program, node, ("scale", "zero_point", "dtype", "axis", "block_size")
    )


def _dynamic_problem(node: Node) -> str | None:
    """Say in what a dequantize differs from the dynamic_quantize it reads."""
    source = _item(node.args[0])
    if op_name(node.target) != "planish.dequantize" or source is None:
        return None
    made, position = source
    if op_name(made.target) != "planish.dynamic_quantize":
        return None
    if position != 0 or _item(argument(node, "scale")) != (made, 1):
        return f"its integers and its scale are not the first two results of {made.name}"
    if _item(argument(node, "zero_point")) != (made, 2):
        return f"its zero point is not the third result of {made.name}"
    if argument(node, "dtype") != argument(made, "dtype"):
        return f"its dtype is not that of {made.name}, which quantized its input"
    return None


def _item(value: object) -> tuple[Node, int] | None:
    """The node and the position that a getitem takes."""
    if isinstance(value, Node) and value.target is operator.getitem:
        made, position = value.args
        if isinstance(made, Node) and isinstance(position, int):
            return made, position
    return None


_DECOMPOSED = "quantized_decomposed."

# Operator, as it is printed -> what its scheme must satisfy.
OPERATOR_SCHEMES: Mapping[str, Scheme] = {
    "planish.quantize": _scheme,
    "planish.dequantize": _scheme,
    _DECOMPOSED + "quantize_per_tensor": _decomposed_scheme,
    _DECOMPOSED + "quantize_per_tensor.tensor": _decomposed_scheme,
    _DECOMPOSED + "quantize_per_channel": _decomposed_scheme,
    _DECOMPOSED + "dequantize_per_tensor": _decomposed_scheme,
    _DECOMPOSED + "dequantize_per_tensor.tensor": _decomposed_scheme,
    _DECOMPOSED + "dequantize_per_channel": _decomposed_scheme,
}
