"""Products of integers in ONNX Runtime: MatMulIntegerToFloat on the codes themselves.

``linear(dequantize(x), dequantize(w), b)`` is one kernel that multiplies codes, scales each column
and adds the bias. What the runtime's own fusions make of dequantized operands is not relied on.

Measured on a processor with AVX-512 VNNI, one thread, 128 rows (billions of operations a second;
384 -> 384, 384 -> 1536, 1536 -> 384):

    float Gemm                                      122   117   131
    MatMulIntegerToFloat, uint8 by int8             333   383   440
    QGemm with a float result                       318   316   426
    DynamicQuantizeMatMul                           334   402   386
    MatMulIntegerToFloat, uint8 by uint8            135   141   149
    MatMulIntegerToFloat, int8 by int8               26    26    27

So a right operand of uint8 is written as int8 with its zero point moved by 128: the same numbers.
A left operand of int8 stays, however slow: it was asked for, so that sums cannot saturate on
processors without VNNI. The bias within the kernel costs half of an addition of its own. Ranges
found at run time come from one DynamicQuantizeLinear, shared by all that read the value.

A product whose result is split along its columns becomes one product for each part, from parts of
the weight: Split would copy what the product has just written (0.57 instead of 0.62 ms for queries,
keys and values of 384 features and their attention).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import QUANTIZE, Dequantized, dequantized, stored
from planish.backends.onnx_view import Table, View, dtype_of
from planish.backends.ort_factors import factors_of
from planish.ir.ops import aten, is_op
from planish.ir.quantscheme import dequantize_linear

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
_EIGHT_BITS = ("int8", "uint8")
# They show a value in another form and compute nothing: codes go through them as real numbers do.
_MOVES = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default,
    aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.contiguous.default,
)  # fmt: skip
_SIGN = 128  # between the zero points of uint8 and int8


@dataclass(frozen=True)
class Left:
    """Codes to be multiplied from the left.

    Attributes:
        codes: uint8 or int8.
        view: leads from the codes' rows back to the shape.
        scale: one number.
        zero: likewise.
    """

    codes: ir.Value
    view: View
    scale: ir.Value
    zero: ir.Value


@dataclass(frozen=True)
class Right:
    """A constant weight, as ``[in, out]``.

    Attributes:
        codes: int8.
        scale: [] or [out], float32.
        zero: the like of ``scale``; None for 0.
        names: of the three in the file.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    names: tuple[str, str, str]


def left_of(e: Emitter, x: object) -> Left | None:
    """A value with one scale, as codes in rows; None for any other value."""
    q = dequantized(x)
    if q is None or q.axis is not None or q.dtype not in _EIGHT_BITS or _real(q) is False:
        return None
    if not dims_of(q.codes.meta["val"]):
        return None
    codes, view = e.rows(q.codes)
    return Left(codes, view, *scalars(e, q))


def scalars(e: Emitter, q: Dequantized) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of a value that has one of each."""
    values = []
    for node in (q.scale, q.zero):
        known, dims = e.known(node), dims_of(node.meta["val"])
        if known is not None:
            values.append(stored(e, node, known.reshape(())))
        elif dims:
            values.append(e.materialize(View(e.value(node), dims, ()), like=node.meta["val"]))
        else:
            values.append(e.value(node))
    return values[0], values[1]


def _real(q: Dequantized) -> bool:
    return dtype_of(q.node.meta["val"]) is torch.float32


def right_of(e: Emitter, weight: object, out_axis: int) -> Right | None:
    """A constant weight with one scale, or one per output; None for any other weight."""
    q = dequantized(weight)
    if q is None or q.block or not _real(q) or q.dtype not in (*_EIGHT_BITS, "int4", "uint4"):
        return None
    known, scale, zero = (e.known(n) for n in (q.codes, q.scale, q.zero))
    if known is None or scale is None or zero is None or known.dim() != 2:
        return None
    if q.axis not in (None, out_axis):
        return None
    codes, order = (known.t(), ".T") if out_axis == 0 else (known, "")
    return as_right(q, codes, scale, zero, order)


def as_right(q: Dequantized, codes: Tensor, scale: Tensor, zero: Tensor, order: str) -> Right:
    """Codes ``[in, out]`` and their scales as a right operand; ``order`` names what was done."""
    if codes.dtype is torch.uint8:
        codes, zero = ((p.to(torch.int16) - _SIGN).to(torch.int8) for p in (codes, zero))
        order += ".s8"
    if q.axis is None:
        scale, zero = scale.reshape(()), zero.reshape(())
    names = (f"{q.codes.target}{order}", f"{q.scale.target}", f"{q.zero.target}{order[2:]}")
    return Right(codes, scale, zero if bool(zero.any()) else None, names)


def bias_of(e: Emitter, bias: Node | None) -> Tensor | ir.Value | None:
    """A bias as real numbers: known ones as they are, so that parts of them can be taken."""
    if bias is None:
        return None
    q = dequantized(bias)
    if q is not None:
        codes, scale, zero = (e.known(n) for n in (q.codes, q.scale, q.zero))
        if codes is not None and scale is not None and zero is not None:
            return dequantize_linear(codes, scale, zero, q.axis, q.block)
    known = e.known(bias)
    return e.value(bias) if known is None else known


# -- one product ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Columns of a product of codes by a constant weight, before they are written.

    Attributes:
        left: the left operand.
        right: the whole weight.
        bias: of all columns, or None.
        bias_name: in the file.
        start: the first column.
        stop: the column after the last.
    """

    left: Left
    right: Right
    bias: Tensor | ir.Value | None
    bias_name: str
    start: int
    stop: int

    def columns(self, start: int, stop: int) -> Product:
        """Some of these columns, counted from the first of them."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def emit(self, e: Emitter) -> ir.Value:
        """Write the kernel."""
        r, (start, stop) = self.right, (self.start, self.stop)
        part = "" if (start, stop) == (0, r.codes.shape[1]) else f".{start}-{stop}"

        def held(tensor: Tensor, name: str) -> ir.Value:
            piece = tensor if tensor.dim() == 0 else tensor[..., start:stop]
            key = ("product", name, part, tuple(tensor.shape))
            return e.cached(key, lambda: e.tensor(piece, name + part))

        value = e.op(
            "MatMulIntegerToFloat",
            self.left.codes,
            held(r.codes, r.names[0]),
            self.left.scale,
            held(r.scale, r.names[1]),
            self.left.zero,
            None if r.zero is None else held(r.zero, r.names[2]),
            held(self.bias, self.bias_name) if isinstance(self.bias, Tensor) else self.bias,
            domain=DOMAIN,
        )
        e.cached(("product of", value), lambda: self)
        return value


def product_behind(e: Emitter, value: ir.Value) -> Product | None:
    """The product that a value is, if it is one."""
    found: Product | None = e.cached(("product of", value), lambda: None)
    return found


def product_of(e: Emitter, node: Node) -> View | None:
    """``x @ weight + bias`` as one kernel; None where the operands are no codes."""
    factors = factors_of(node)
    if factors is None:
        return None
    bias = factors.bias
    right = right_of(e, factors.weight, factors.out_axis)
    left = left_of(e, factors.x) if right is not None else None
    if left is None or right is None:
        return None
    name = "" if bias is None else _name(bias)
    product = Product(left, right, bias_of(e, bias), name, 0, right.codes.shape[1])
    out = dims_of(node.meta["val"])
    value = product.emit(e)
    dims = (left.view.base_dims[0], out[-1])
    e.describe(value, node.meta["val"], dims)
    return View(value, dims, out)


def _name(bias: Node) -> str:
    q = dequantized(bias)
    return str(bias.target) if q is None else f"{q.codes.target}*{q.scale.target}"


# -- both sides computed ----------------------------------------------------------------------


def codes_behind(e: Emitter, value: object) -> tuple[View, Dequantized] | None:
    """The codes of a value, seen through the moves between them and the value."""
    root = value
    while isinstance(root, Node) and is_op(root, *_MOVES):
        root = root.args[0]
    q = dequantized(root)
    if q is None or q.axis is not None or q.dtype not in _EIGHT_BITS or not _real(q):
        return None
    assert isinstance(value, Node)
    seen = e.view(value)
    if seen.base is not e.view(q.node).base:
        return None  # a move was written out
    real, codes = e.view(q.node), e.view(q.codes)
    if (real.dims, real.perm) == (codes.dims, codes.perm):
        return seen.with_base(codes.base), q
    # The codes were turned before they became real numbers.
    return (codes if value is q.node else seen.with_base(e.materialize(codes))), q


def _signed(e: Emitter, view: View, q: Dequantized) -> tuple[View, ir.Value] | None:
    """Codes as int8 with their zero point: uint8 on the right is as slow as float."""
    if q.dtype == "int8":
        return view, scalars(e, q)[1]
    zero = e.known(q.zero)
    source = q.codes.args[0] if is_op(q.codes, QUANTIZE) else None
    if zero is None or not isinstance(source, Node) or e.view(q.codes).base is not view.base:
        return view, scalars(e, q)[1]  # codes found at run time are what they are
    if e.view(source).base_dims != view.base_dims:
        return view, scalars(e, q)[1]
    name = f"{q.zero.target}.s8"
    moved = e.cached(
        ("signed zero", q.zero),
        lambda: e.tensor((zero.reshape(()).to(torch.int16) - _SIGN).to(torch.int8), name),
    )
    codes = e.cached(
        ("signed", q.codes),
        lambda: e.op("QuantizeLinear", e.view(source).base, scalars(e, q)[0], moved),
    )
    return view.with_base(codes), moved


def _matmul(e: Emitter, node: Node) -> View | None:
    constant = product_of(e, node)
    if constant is not None:
        return constant
    left, right = (codes_behind(e, x) for x in node.args[:2])
    if left is None or right is None or min(len(v.shape) for v, _ in (left, right)) < 2:
        return None
    signed = _signed(e, *right)
    assert signed is not None
    view, zero = signed
    scale, left_zero = scalars(e, left[1])
    result = e.op(
        "MatMulIntegerToFloat", e.materialize(left[0]), e.materialize(view), scale,
        scalars(e, right[1])[0], left_zero, zero, domain=DOMAIN,
    )  # fmt: skip
    dims = dims_of(node.meta["val"])
    e.describe(result, node.meta["val"], dims)
    return View(result, dims, dims)


# -- parts of a product -----------------------------------------------------------------------


def _parts(e: Emitter, node: Node) -> list[Any] | None:
    """The pieces of a product as products of their own; None for pieces of anything else."""
    from planish.backends.onnx_shapes import SHAPES

    if e.style.parts != "apart":
        return None
    views: list[Any] = SHAPES[node.target](e, node)
    splits = {v.base.producer() for v in views if isinstance(v, View)}
    split = splits.pop() if len(splits) == 1 else None
    if split is None or split.op_type != "Split" or len(split.outputs) != len(views):
        return views
    whole = split.inputs[0]
    product = None if whole is None else product_behind(e, whole)
    if product is None or split.attributes["axis"].as_int() != -1:
        return views
    if product.bias is not None and not isinstance(product.bias, Tensor):
        return views
    made: list[Any] = []
    start = 0
    for view in views:
        stop = start + int(view.base_dims[-1])
        made.append(view.with_base(product.columns(start, stop).emit(e)))
        start = stop
    return made


ORT_MATMUL: Table = {
    aten.linear.default: product_of,
    aten.addmm.default: product_of,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    **dict.fromkeys(
        (
            aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default,
            aten.chunk.default, aten.unbind.int,
        ),
        _parts,
    ),
}  # fmt: skip
