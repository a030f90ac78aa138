"""Quantized layers in oneDNN's integer kernels.

    linear(dq(q), dq(W)) + b                    ->  onednn::qlinear_pointwise, float out
    conv2d(dq(q), dq(W)) + b                    ->  onednn::qconv2d_pointwise, float out
    act(..) of these                            ->  the same kernel with the activation in it
    quantize(.. of these)                       ->  the same kernel, uint8 out
    quantize(dq(a) + dq(b))                     ->  quantized::add
    quantize(pad(dq(q), 0)), quantize(max_pool2d(dq(q))), on one grid: on the codes themselves

Each kernel is taken where the operands are what it takes: activations in uint8 on one scale and
zero point, weights in int8, symmetric, with a scale for each output. int8 activations with a zero
point would run in oneDNN's reference code, ten thousand times slower. What no kernel takes runs
in float on the rounded values, and the report says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from planish.backends.torch_codes import CODES, dequantize, quantize
from planish.backends.torch_float import FLOAT, NO_POST_OP, PostOp, channels_last, post_op
from planish.backends.torch_grids import (
    DEQUANTIZE,
    DYNAMIC,
    QUANTIZE,
    Grid,
    Weight,
    codes,
    float_bias,
    grid_before,
    grid_of,
    quantized_tensor,
    storage,
    weight_of,
)
from planish.backends.torch_int_mm import integer_product
from planish.backends.torch_lowering import Lowering, Table, Translation
from planish.ir.ops import argument, aten, is_op, node_of

onednn = torch.ops.onednn
_LAYERS = (aten.linear.default, aten.conv2d.default)
_FLOAT32 = (1.0, 0, torch.float32)
# Activations that the integer kernels take in, which are fewer than those of the float kernels.
_CONV_POST_OPS = frozenset({"relu", "hardtanh", "hardswish", "swish"})
_LINEAR_POST_OPS = _CONV_POST_OPS | {"gelu", "tanh"}


def layer(low: Lowering, node: Node, post: PostOp, out: Grid | None) -> Node | None:
    """One quantized layer with what follows it, or None where oneDNN does not take it."""
    x, weight = node.args[0], node.args[1]
    if not is_op(x, DEQUANTIZE):
        if is_op(weight, DEQUANTIZE):
            low.became(node, None, "its activation is not quantized; its weight is dequantized")
        return None
    held, reason = weight_of(low, weight)
    source = _source(low, x)
    if held is None or source is None:
        low.became(node, None, reason or "oneDNN takes uint8 activations on one scale only")
        return None
    linear = is_op(node, aten.linear.default)
    if linear and low.exportable:
        if post is not NO_POST_OP or out is not None:
            return None  # each is an operator of its own there
        low.became(node, "aten::_int_mm")
        return integer_product(low, node, source, held)
    if not linear and node_of(node.args[0]).meta["val"].dim() != 4:
        low.became(node, None, "torch has integer convolutions of pictures only")
        return None
    result = (out.scale, out.zero, torch.uint8) if out is not None else _FLOAT32
    # torch's serializer refuses an empty list here; a kernel without scalars reads none of them.
    scalars = list(post.scalars) or ([0.0] if low.exportable else [])
    tail = (*result, post.name, scalars, post.algorithm)
    made = (_linear if linear else _convolution)(low, node, source, held, tail)
    if made is not None:
        name = str(made.target).removesuffix(".default").replace(".", "::", 1)
        low.became(node, name)
    return made


Source = tuple[Node, Any, Any]  # codes, scale, zero point


def _source(low: Lowering, x: Node) -> Source | None:
    """The codes of an activation with their grid: constants, or values measured in the run."""
    grid = grid_before(low, x)
    if grid is not None:
        return codes(low, x), grid.scale, grid.zero
    if argument(x, "dtype") != "uint8" or argument(x, "axis") is not None:
        return None
    made = node_of(x.args[0])
    if made.op != "call_function" or not made.args or not is_op(made.args[0], DYNAMIC):
        return None
    scale, zero = low.value(x.args[1]), low.value(x.args[2])
    return low.value(made), scale, low.call(aten.to.dtype, zero, torch.int32)


def _scales(low: Lowering, node: Node, weight: Weight) -> tuple[Node, Node]:
    name = str(weight.codes.target)
    scale = low.cached(("scale", node.args[1]), lambda: weight.scale)
    zero = low.cached(
        ("zero", node.args[1]), lambda: torch.zeros(len(weight.scale), dtype=torch.int32)
    )
    return low.constant(f"{name}_scale", scale), low.constant(f"{name}_zero_point", zero)


def _linear(
    low: Lowering, node: Node, source: Source, weight: Weight, tail: tuple[Any, ...]
) -> Node:
    packed = low.pack(None, onednn.qlinear_prepack.default, low.value(weight.codes), None)
    measured = isinstance(source[1], Node)
    kernel = onednn.qlinear_pointwise
    return low.call(
        kernel.tensor if measured else kernel.default,
        *source,
        packed,
        *_scales(low, node, weight),
        float_bias(low, argument(node, "bias")),
        *tail,
    )


def _convolution(
    low: Lowering, node: Node, source: Source, weight: Weight, tail: tuple[Any, ...]
) -> Node | None:
    stride, padding, dilation = (list(argument(node, n)) for n in ("stride", "padding", "dilation"))
    pairs = [v * 2 if len(v) == 1 else v for v in (stride, padding, dilation)]
    groups = int(argument(node, "groups"))
    scale, zero = _scales(low, node, weight)
    if isinstance(source[1], Node):
        low.became(node, None, "torch has no integer convolution of values measured in the run")
        return None
    packed = low.pack(
        (source[1], source[2], tuple(map(tuple, pairs)), groups),
        onednn.qconv_prepack.default,
        low.value(weight.codes),
        # One scale will do: the layout does not depend on them, and each is read one by one.
        low.constant("one_scale", low.cached(("one scale",), lambda: torch.ones(1))),
        source[1],
        source[2],
        *pairs,
        groups,
        None,
    )
    picture = low.call(aten.contiguous.default, source[0], memory_format=torch.channels_last)
    # One kernel by two names; torch's compiler knows the first, and older files hold the second.
    kernel = onednn.qconv_pointwise if low.exportable else onednn.qconv2d_pointwise
    return low.call(
        kernel.default,
        picture,
        source[1],
        source[2],
        packed,
        scale,
        zero,
        float_bias(low, argument(node, "bias")),
        *pairs,
        groups,
        *tail,
    )


# -- what is quantized ------------------------------------------------------------------------


def _quantize(low: Lowering, node: Node) -> Node:
    """Into the kernel that makes the value, or on the codes it is made of, where that can be."""
    grid, made = grid_of(low, node), node_of(node.args[0])
    if grid is not None and low.alone(made):
        fused = _fused(low, made, grid)
        if fused is None:
            fused = _on_codes(low, made, grid)
        if fused is not None:
            return fused
    return quantize(low, node)


def _fused(low: Lowering, made: Node, grid: Grid) -> Node | None:
    if is_op(made, *_LAYERS):
        return layer(low, made, NO_POST_OP, grid)
    if made.op != "call_function":
        return None
    post = post_op(made)
    before = _layer_before(low, made, post)
    return layer(low, before, post, grid) if post is not None and before is not None else None


def _layer_before(low: Lowering, activation: Node, post: PostOp | None) -> Node | None:
    """The layer whose integer kernel can compute this activation too; None where none can."""
    before = activation.args[0] if activation.args else None
    if post is None or not is_op(before, *_LAYERS) or not low.alone(before):
        return None
    taken = _LINEAR_POST_OPS if is_op(before, aten.linear.default) else _CONV_POST_OPS
    return before if post.name in taken else None


def _on_codes(low: Lowering, made: Node, grid: Grid) -> Node | None:
    """Operators that torch runs on codes."""
    if is_op(made, aten.add.Tensor) and not low.exportable and argument(made, "alpha") == 1:
        first, second = made.args[:2]
        grids = [grid_before(low, a) for a in (first, second)]
        if grids[0] is None or grids[1] is None:
            return None
        if node_of(first).meta["val"].shape != node_of(second).meta["val"].shape:
            return None
        operands = [
            quantized_tensor(low, codes(low, node_of(a)), g)
            for a, g in zip((first, second), grids, strict=True)
            if g is not None
        ]
        total = low.call(torch.ops.quantized.add.default, *operands, grid.scale, grid.zero)
        low.became(made, "quantized::add")
        return storage(low, total, made.meta["val"].dim())
    own = grid_before(low, made.args[0]) if made.args else None
    if own is None or own != grid:
        return None
    source = codes(low, node_of(made.args[0]))
    if is_op(made, aten.pad.default) and argument(made, "mode") == "constant":
        if argument(made, "value") in (None, 0):
            low.became(made, "constant_pad_nd on integers")
            sizes = low.value(argument(made, "pad"))
            return low.call(aten.constant_pad_nd.default, source, sizes, grid.zero)
    if is_op(made, aten.max_pool2d.default) and not low.exportable:
        whole = quantized_tensor(low, source, grid)
        low.became(made, "max_pool2d on integers")
        pooled = low.call(made.target, whole, *low.value(made.args[1:]), **low.value(made.kwargs))
        return storage(low, pooled, made.meta["val"].dim())
    if is_op(made, aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return low.call(made.target, source, *low.value(made.args[1:]), **low.value(made.kwargs))
    return None


# -- what is not ------------------------------------------------------------------------------


def _layer(low: Lowering, node: Node) -> Node | None:
    made = layer(low, node, NO_POST_OP, None)
    if made is not None:
        return made
    return _plain(low, node)


def _activation(low: Lowering, node: Node) -> Node | None:
    """An activation of a quantized layer goes into its kernel."""
    post = post_op(node)
    before = _layer_before(low, node, post)
    made = layer(low, before, post, None) if post is not None and before is not None else None
    return made if made is not None else _plain(low, node)


def _plain(low: Lowering, node: Node) -> Node | None:
    own = FLOAT.get(node.target)
    made: Node | None = own(low, node) if own is not None else None
    return made


_ACTIVATIONS: dict[Any, Translation] = {
    target: _activation for target in FLOAT if target not in (*_LAYERS, aten.add.Tensor)
}
TABLE: Table = {
    **FLOAT,
    **CODES,
    **_ACTIVATIONS,
    **dict.fromkeys(_LAYERS, _layer),
    QUANTIZE: _quantize,
    DEQUANTIZE: dequantize,
}
__all__ = ["TABLE", "channels_last", "layer"]
