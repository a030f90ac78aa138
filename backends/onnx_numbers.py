"""Symbolic numbers: sizes and the Python arithmetic that a traced graph does on them."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt
from torch.fx import Node

from planish.backends.onnx_dims import NoExpressionError
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import dtype_of
from planish.ir.errors import UnsupportedError
from planish.ir.ops import op_name

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_BINARY: dict[Any, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.truediv: "Div",
    operator.pow: "Pow",
    operator.eq: "Equal",
    operator.lt: "Less",
    operator.le: "LessOrEqual",
    operator.gt: "Greater",
    operator.ge: "GreaterOrEqual",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
}
_UNARY: dict[Any, str] = {
    operator.neg: "Neg",
    operator.abs: "Abs",
    math.ceil: "Ceil",
    math.floor: "Floor",
    torch.sym_not: "Not",
    torch.sym_sqrt: "Sqrt",
}
_COMPARES = {operator.eq, operator.lt, operator.le, operator.gt, operator.ge}

# Python arithmetic on sizes, and the ATen operators that turn tensors into numbers.
NUMBER_OPS = frozenset(
    {
        *_BINARY,
        *_UNARY,
        operator.floordiv,
        operator.mod,
        operator.ne,
        torch.sym_float,
        aten.sym_size.int,
        aten.sym_numel.default,
        aten.item.default,
        aten._local_scalar_dense.default,
    }
)


def symbolic_number(e: Emitter, node: Node) -> ir.Value:
    """The value of a number node as a scalar.

    A size is computed from the expression it stands for, so that however it was derived, equal
    sizes are computed once.
    """
    value = node.meta.get("val")
    if isinstance(value, (int, float, bool)):
        return e.constant(value, dtype_of(value))
    if isinstance(value, SymInt) and node.op != "placeholder":
        try:
            return e.scalar_size(value)
        except NoExpressionError:
            pass
    return _from_operator(e, node)


def _from_operator(e: Emitter, node: Node) -> ir.Value:
    """Follow the graph where an expression is of no help."""
    target, dtype = node.target, dtype_of(node.meta["val"])
    if target is aten.sym_size.int:
        tensor, axis = e.value(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
        rank = len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        axis %= rank
        vector = e.op("Shape", tensor, start=axis, end=axis + 1)
        return e.op("Squeeze", vector, e.constant([0]))
    if target is aten.sym_numel.default:
        return e.op("Size", e.value(node.args[0]))  # type: ignore[arg-type]
    if target in (aten.item.default, aten._local_scalar_dense.default):
        source = node.args[0]
        assert isinstance(source, Node)
        scalar = e.op("Squeeze", e.value(source))
        return e.cast(scalar, source.meta["val"].dtype, dtype)
    if target is torch.sym_float:
        return e.operand(node.args[0], torch.float32)
    if target in _UNARY:
        number = e.operand(node.args[0], _joint_dtype(node))
        return e.cast(e.op(_UNARY[target], number), _joint_dtype(node), dtype)
    if len(node.args) == 2:
        return _binary(e, node, dtype)
    raise UnsupportedError(
        f"the number {op_name(target)} has no ONNX form",
        where=node,
        hint="compute it outside of the model, or keep the size static",
    )


def _binary(e: Emitter, node: Node, dtype: torch.dtype) -> ir.Value:
    target = node.target
    common = torch.float32 if target is operator.truediv else _joint_dtype(node)
    a, b = (e.operand(arg, common) for arg in node.args)
    if target in _COMPARES:
        return e.op(_BINARY[target], a, b)
    if target is operator.ne:
        return e.op("Not", e.op("Equal", a, b))
    if target is operator.mod:
        return e.op("Mod", a, b, fmod=int(common.is_floating_point))
    if target is operator.floordiv:
        if common.is_floating_point:
            return e.op("Floor", e.op("Div", a, b))
        return e.op("Div", e.op("Sub", a, e.op("Mod", a, b)), b)
    if target in _BINARY:
        return e.cast(e.op(_BINARY[target], a, b), common, dtype)
    raise UnsupportedError(f"arithmetic {op_name(target)} has no ONNX form", where=node)


def _joint_dtype(node: Node) -> torch.dtype:
    """float32 where any operand is a float, else int64 (or bool)."""
    dtypes = {dtype_of(a.meta["val"] if isinstance(a, Node) else a) for a in node.args}
    if torch.float32 in dtypes:
        return torch.float32
    return torch.bool if dtypes == {torch.bool} else torch.int64
