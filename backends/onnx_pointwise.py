"""ONNX forms of operators that look at each element on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch.fx import Node

from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View, dtype_of
from planish.ir.ops import is_op

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def on_base(e: Emitter, node: Node, make: Callable[[Any], Any]) -> View:
    """Apply a one-operand operator to the base of its operand's view."""
    source = node.args[0]
    assert isinstance(source, Node)
    view, dtype = e.view(source), dtype_of(node.meta["val"])
    # ONNX takes most of these on floating-point numbers only; torch promotes integers to float.
    base = e.cast(view.base, dtype_of(source.meta["val"]), dtype)
    return view.with_base(make(base))


def _unary(name: str) -> Callable[[Emitter, Node], View]:
    return lambda e, node: on_base(e, node, lambda x: e.op(name, x))


def _composed(*names: str) -> Callable[[Emitter, Node], View]:
    """Several one-operand operators, one after the other."""

    def translate(e: Emitter, node: Node) -> View:
        def make(x: Any) -> Any:  # noqa: ANN401
            for name in names:
                x = e.op(name, x)
            return x

        return on_base(e, node, make)

    return translate


# -- two operands -----------------------------------------------------------------------------


def binary(e: Emitter, node: Node, name: str, a: Any, b: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """``name(a, b)`` after promotion to ``dtype``, on rows where both operands allow it."""
    rows = _shared_base(e, node, a, b, dtype)
    if rows is not None:
        view, left, right = rows
        return view.with_base(e.op(name, left, right))
    return e.op(name, e.operand(a, dtype), e.operand(b, dtype))


def _shared_base(
    e: Emitter,
    node: Node,
    a: Any,  # noqa: ANN401
    b: Any,  # noqa: ANN401
    dtype: torch.dtype,
) -> tuple[View, ir.Value, ir.Value] | None:
    """Both operands in one base form that is not their own shape, if there is one."""
    views = [e.view(x) if isinstance(x, Node) else None for x in (a, b)]
    shape = tuple(e_dims(node))
    guide = next((v for v in views if v and v.shape == shape and v.base_dims != v.shape), None)
    if guide is None:
        return None
    operands = []
    for x, view in zip((a, b), views, strict=True):
        if view is None:
            operands.append(e.constant(x, dtype))
            continue
        base = _in_base_of(e, view, guide)
        if base is None:
            return None
        operands.append(e.cast(base, dtype_of(x.meta["val"]), dtype))
    return guide, operands[0], operands[1]


def _in_base_of(e: Emitter, view: View, guide: View) -> ir.Value | None:
    if view.shape == guide.shape:
        if (view.base_dims, view.dims, view.perm) == (guide.base_dims, guide.dims, guide.perm):
            return view.base
        if guide.perm is None:
            if view.perm is not None:
                view = View(e.materialize(view), view.shape, view.shape)
            return e.materialize(View(view.base, view.base_dims, guide.base_dims))
        return None
    if all(dim == 1 for dim in view.shape):
        return e.materialize(View(view.base, view.base_dims, ())) if view.perm is None else None
    # One value per feature.
    if guide.keeps_rows and view.perm is None and view.shape == guide.shape[-1:]:
        return e.materialize(view)
    return None


def e_dims(node: Node) -> tuple[Any, ...]:
    """The sizes of a node's value."""
    from planish.backends.onnx_dims import dims_of

    value = node.meta["val"]
    return dims_of(value) if isinstance(value, Tensor) else ()


def _arithmetic(name: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        a, b = node.args[0], node.args[1]
        alpha = node.kwargs.get("alpha", 1)
        dtype = dtype_of(node.meta["val"])
        if alpha != 1:
            scaled = e.op("Mul", e.operand(b, dtype), e.operand(alpha, dtype))
            return e.op(name, e.operand(a, dtype), scaled)
        if dtype is torch.bool:
            return e.op({"Add": "Or", "Mul": "And"}[name], *[e.operand(x, dtype) for x in (a, b)])
        before_norm = name == "Add" and any(is_op(user, *_NORMS) for user in node.users)
        if before_norm and e.style.residual == "sum" and dtype.is_floating_point:
            return binary(e, node, "Sum", a, b, dtype)
        return binary(e, node, name, a, b, dtype)

    return translate


def _reverse_subtract(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    a, b = node.args[0], node.args[1]
    dtype = dtype_of(node.meta["val"])
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        scaled = e.op("Mul", e.operand(a, dtype), e.operand(alpha, dtype))
        return e.op("Sub", e.operand(b, dtype), scaled)
    return e.op("Sub", e.operand(b, dtype), e.operand(a, dtype))


def _compare(name: str, negate: bool = False) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        a, b = node.args[0], node.args[1]
        dtype = promoted(a, b)
        if dtype is torch.bool and name != "Equal":
            dtype = torch.int32
        result = e.op(name, e.operand(a, dtype), e.operand(b, dtype))
        return e.op("Not", result) if negate else result

    return translate


def promoted(*operands: Any) -> torch.dtype:  # noqa: ANN401
    """The dtype torch computes in: tensors before numbers, floats before integers."""
    stand_ins: list[Any] = []
    for operand in operands:
        value = operand.meta["val"] if isinstance(operand, Node) else operand
        numbers = {torch.bool: True, torch.int64: 1}
        stand_ins.append(value if isinstance(value, Tensor) else numbers.get(dtype_of(value), 1.0))
    kind = ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
    result: torch.dtype = elementwise_dtypes(*stand_ins, type_promotion_kind=kind)[1]
    return result


def _divide(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    a, b = node.args[0], node.args[1]
    mode = node.kwargs.get("rounding_mode")
    dtype = dtype_of(node.meta["val"])
    if mode is None:
        return binary(e, node, "Div", a, b, dtype)
    left, right = e.operand(a, dtype), e.operand(b, dtype)
    if dtype.is_floating_point:
        quotient = e.op("Div", left, right)
        if mode == "floor":
            return e.op("Floor", quotient)
        return e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))
    if mode == "floor":
        return e.op("Div", e.op("Sub", left, e.op("Mod", left, right)), right)
    return e.op("Div", left, right)


def _floor_divide(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    dtype = dtype_of(node.meta["val"])
    left, right = (e.operand(x, dtype) for x in node.args[:2])
    if dtype.is_floating_point:
        return e.op("Floor", e.op("Div", left, right))
    return e.op("Div", e.op("Sub", left, e.op("Mod", left, right)), right)


def _remainder(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    dtype = dtype_of(node.meta["val"])
    left, right = (e.operand(x, dtype) for x in node.args[:2])
    if not dtype.is_floating_point:
        return e.op("Mod", left, right)
    # ONNX's fmod follows the dividend's sign, torch's remainder the divisor's.
    return e.op("Sub", left, e.op("Mul", right, e.op("Floor", e.op("Div", left, right))))


def _power(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    base, exponent = node.args[0], node.args[1]
    dtype = dtype_of(node.meta["val"])
    if exponent == 2 and isinstance(base, Node):
        return on_base(e, node, lambda x: e.op("Mul", x, x))
    if exponent == 0.5 and isinstance(base, Node):
        return on_base(e, node, lambda x: e.op("Sqrt", x))
    if exponent == -0.5 and isinstance(base, Node):
        return on_base(e, node, lambda x: e.op("Reciprocal", e.op("Sqrt", x)))
    return e.op("Pow", e.operand(base, dtype), e.operand(exponent, dtype))


def _logical(name: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        return e.op(name, *[e.operand(x, torch.bool) for x in node.args[:2]])

    return translate


def _bitwise(logical: str, bits: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        dtype = dtype_of(node.meta["val"])
        name = logical if dtype is torch.bool else bits
        return e.op(name, *[e.operand(x, dtype) for x in node.args[:2]])

    return translate


def _bitwise_not(e: Emitter, node: Node) -> View:
    name = "Not" if dtype_of(node.meta["val"]) is torch.bool else "BitwiseNot"
    return on_base(e, node, lambda x: e.op(name, x))


def _logical_not(e: Emitter, node: Node) -> View:
    return on_base(e, node, lambda x: e.op("Not", x))


# -- choosing and converting ------------------------------------------------------------------


def _where(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    condition, a, b = node.args
    dtype = dtype_of(node.meta["val"])
    return e.op("Where", e.operand(condition, torch.bool), e.operand(a, dtype), e.operand(b, dtype))


def _masked_fill(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source, mask, fill = node.args
    dtype = dtype_of(node.meta["val"])
    return e.op(
        "Where", e.operand(mask, torch.bool), e.operand(fill, dtype), e.operand(source, dtype)
    )


def _convert(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """Any form of ``to``, ``type_as`` and ``float``: the result's type says all."""
    source = node.args[0]
    assert isinstance(source, Node)
    view = e.view(source)
    base = e.cast(view.base, dtype_of(source.meta["val"]), dtype_of(node.meta["val"]))
    return view.with_base(base)


def _minmax(name: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        return binary(e, node, name, node.args[0], node.args[1], dtype_of(node.meta["val"]))

    return translate


_UNARY: dict[Any, str] = {
    aten.relu.default: "Relu", aten.sigmoid.default: "Sigmoid", aten.tanh.default: "Tanh",
    aten.exp.default: "Exp", aten.log.default: "Log", aten.sqrt.default: "Sqrt",
    aten.neg.default: "Neg", aten.abs.default: "Abs", aten.erf.default: "Erf",
    aten.sin.default: "Sin", aten.cos.default: "Cos", aten.floor.default: "Floor",
    aten.ceil.default: "Ceil", aten.reciprocal.default: "Reciprocal", aten.sign.default: "Sign",
    aten.round.default: "Round", aten.tan.default: "Tan", aten.atan.default: "Atan",
    aten.hardswish.default: "HardSwish", aten.mish.default: "Mish",
}  # fmt: skip

_COMPARISONS = {
    "eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False),
    "le": ("LessOrEqual", False), "gt": ("Greater", False), "ge": ("GreaterOrEqual", False),
}  # fmt: skip


def _comparison_table() -> dict[Any, Any]:
    table: dict[Any, Any] = {}
    for name, (operator, negate) in _COMPARISONS.items():
        packet = getattr(aten, name)
        for overload in ("Tensor", "Scalar"):
            table[getattr(packet, overload)] = _compare(operator, negate)
    return table


POINTWISE: Table = {
    **{target: _unary(name) for target, name in _UNARY.items()},
    **_comparison_table(),
    aten.rsqrt.default: _composed("Sqrt", "Reciprocal"),
    aten.add.Tensor: _arithmetic("Add"),
    aten.add.Scalar: _arithmetic("Add"),
    aten.sub.Tensor: _arithmetic("Sub"),
    aten.sub.Scalar: _arithmetic("Sub"),
    aten.rsub.Scalar: _reverse_subtract,
    aten.rsub.Tensor: _reverse_subtract,
    aten.mul.Tensor: _arithmetic("Mul"),
    aten.mul.Scalar: _arithmetic("Mul"),
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.div.Tensor_mode: _divide,
    aten.div.Scalar_mode: _divide,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.pow.Scalar: _power,
    aten.maximum.default: _minmax("Max"),
    aten.minimum.default: _minmax("Min"),
    aten.logical_and.default: _logical("And"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
    aten.logical_not.default: _logical_not,
    aten.bitwise_and.Tensor: _bitwise("And", "BitwiseAnd"),
    aten.__and__.Tensor: _bitwise("And", "BitwiseAnd"),
    aten.bitwise_or.Tensor: _bitwise("Or", "BitwiseOr"),
    aten.__or__.Tensor: _bitwise("Or", "BitwiseOr"),
    aten.bitwise_xor.Tensor: _bitwise("Xor", "BitwiseXor"),
    aten.bitwise_not.default: _bitwise_not,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.to.dtype: _convert,
    aten.to.dtype_layout: _convert,
    aten.to.device: _convert,
    aten.to.other: _convert,
    aten.type_as.default: _convert,
    aten._to_copy.default: _convert,
}
