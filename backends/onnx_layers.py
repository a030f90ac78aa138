"""ONNX forms of layers: matrix products, convolutions, norms, pools, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from planish.backends.onnx_bins import average_bins
from planish.backends.onnx_conv import per_axis, with_batch, without_batch
from planish.backends.onnx_dims import dim_of, dims_of, product
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_linear_codes import linear_of_codes
from planish.backends.onnx_pointwise import on_base
from planish.backends.onnx_quantize import dequantized
from planish.backends.onnx_view import Table, View, dtype_of, rank_of, source_of
from planish.ir.errors import UnsupportedError
from planish.ir.ops import argument, node_of

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten


# -- matrix products --------------------------------------------------------------------------


def _linear(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    x, weight, bias = source_of(node), node_of(node.args[1]), argument(node, "bias")
    out = dims_of(node.meta["val"])
    if rank_of(weight) != 2:
        return None
    quantized = linear_of_codes(e, node, x, weight, bias, out_axis=0)
    if quantized is not None:
        return quantized
    if e.style.linear == "gemm" and out:
        rows, view = e.rows(x)
        result = e.op(
            "Gemm", rows, e.value(weight), e.value(bias) if bias is not None else None, transB=1
        )
        return View(result, (view.base_dims[0], out[-1]), out)
    return _matmul_add(e, x, _transposed(e, weight), bias)


def _matmul_add(e: Emitter, x: Node, weight: ir.Value, bias: Node | None) -> ir.Value:
    product_ = e.op("MatMul", e.value(x), weight)
    return product_ if bias is None else e.op("Add", product_, e.value(bias))


def _transposed(e: Emitter, weight: Node) -> ir.Value:
    """A weight as [in, out]: stored so where it is constant."""
    known = e.known(weight)
    if known is None:
        return e.op("Transpose", e.value(weight), perm=[1, 0])
    name = f"{weight.target}.T"
    return e.cached(("T", str(weight.target)), lambda: e.tensor(known.t(), name))


def _addmm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    bias, a, b = (node_of(x) for x in node.args[:3])
    beta, alpha = float(argument(node, "beta")), float(argument(node, "alpha"))
    out = dims_of(node.meta["val"])
    if alpha == beta == 1:
        quantized = linear_of_codes(e, node, a, b, bias, out_axis=1)
        if quantized is not None:
            return quantized
    rows, view = e.rows(a)
    result = e.op("Gemm", rows, e.value(b), e.value(bias), alpha=alpha, beta=beta)
    return View(result, (view.base_dims[0], out[-1]), out)


def _matmul(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    a, b = source_of(node), node_of(node.args[1])
    if dtype_of(node.meta["val"]) is torch.bool:
        return None
    out = dims_of(node.meta["val"])
    quantized = linear_of_codes(e, node, a, b, None, out_axis=1)
    if quantized is not None:
        return quantized
    if rank_of(b) == 2 and rank_of(a) >= 2 and e.known(b) is not None and e.style.linear == "gemm":
        rows, view = e.rows(a)
        result = e.op("Gemm", rows, e.value(b))
        return View(result, (view.base_dims[0], out[-1]), out)
    return e.op("MatMul", e.value(a), e.value(b))


def _baddbmm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    bias, a, b = (node_of(x) for x in node.args[:3])
    dtype = dtype_of(node.meta["val"])
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    result = e.op("MatMul", e.value(a), e.value(b))
    if alpha != 1:
        result = e.op("Mul", result, e.constant(alpha, dtype))
    if beta == 0:
        return result
    addend = e.value(bias)
    if beta != 1:
        addend = e.op("Mul", addend, e.constant(beta, dtype))
    return e.op("Add", result, addend)


# -- norms ------------------------------------------------------------------------------------


def _channels(e: Emitter, node: Node, name: str, fill: float) -> ir.Value:
    """A per-channel operand, or the constant that stands for its absence."""
    given = argument(node, name)
    if given is not None:
        return e.value(given)
    count = int(source_of(node).meta["val"].shape[1])
    return _filled(e, fill, count, dtype_of(node.meta["val"]))


def _filled(e: Emitter, fill: float, count: int, dtype: torch.dtype) -> ir.Value:
    """A vector of one number."""

    def make() -> ir.Value:
        return e.tensor(torch.full((count,), fill, dtype=dtype), f"const.{fill}.{count}")

    return e.cached(("fill", fill, count, dtype), make)


def _batch_norm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    if argument(node, "training") or argument(node, "running_mean") is None:
        return None
    x = source_of(node)
    return e.op(
        "BatchNormalization", e.value(x), _channels(e, node, "weight", 1.0),
        _channels(e, node, "bias", 0.0), e.value(argument(node, "running_mean")),
        e.value(argument(node, "running_var")), epsilon=float(argument(node, "eps")),
    )  # fmt: skip


def _norm_scale(e: Emitter, node: Node) -> ir.Value:
    weight = argument(node, "weight")
    if weight is not None:
        return e.value(weight)
    shape = [int(s) for s in argument(node, "normalized_shape")]
    dtype = dtype_of(node.meta["val"])
    return e.cached(
        ("ones", tuple(shape), dtype),
        lambda: e.tensor(torch.ones(shape, dtype=dtype), "const.ones"),
    )


def _layer_norm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    count = len(argument(node, "normalized_shape"))
    bias, eps = argument(node, "bias"), float(argument(node, "eps"))
    scale = _norm_scale(e, node)
    shift = e.value(bias) if bias is not None else None
    view = e.view(source_of(node))
    if count == 1 and view.keeps_rows:
        norm = e.op("LayerNormalization", view.base, scale, shift, axis=-1, epsilon=eps)
        return view.with_base(norm)
    x = e.value(source_of(node))
    return e.op("LayerNormalization", x, scale, shift, axis=-count, epsilon=eps)


def _rms_norm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    count = len(argument(node, "normalized_shape"))
    dtype = dtype_of(node.meta["val"])
    eps = argument(node, "eps")
    eps = torch.finfo(dtype).eps if eps is None else float(eps)
    source = source_of(node)
    view = e.view(source)
    rows = count == 1 and view.keeps_rows
    x = view.base if rows else e.value(source)
    scale = _norm_scale(e, node)
    if e.opset >= 23 and e.style.rms_norm == "operator":
        result = e.op("RMSNormalization", x, scale, axis=-count, epsilon=eps)
    else:
        axes = e.constant(list(range(-count, 0)))
        power = e.op("ReduceMean", e.op("Mul", x, x), axes, keepdims=1)
        root = e.op("Sqrt", e.op("Add", power, e.constant(eps, dtype)))
        result = e.op("Mul", e.op("Div", x, root), scale)
    return view.with_base(result) if rows else result


def _group_norm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """Through InstanceNormalization over [N, groups, -1]: the same in every opset and engine."""
    source = source_of(node)
    dims, dtype = dims_of(source.meta["val"]), dtype_of(node.meta["val"])
    groups, eps = int(argument(node, "num_groups")), float(argument(node, "eps"))
    flat = (dims[0], groups, product(dims[1:]) // groups)
    x = e.materialize(View(e.value(source), dims, flat), like=source.meta["val"])
    ones, zeros = (_filled(e, v, groups, dtype) for v in (1.0, 0.0))
    norm = e.op("InstanceNormalization", x, ones, zeros, epsilon=eps)
    result = e.materialize(View(norm, flat, dims), like=node.meta["val"])
    for name, operator in (("weight", "Mul"), ("bias", "Add")):
        given = argument(node, name)
        if given is not None:
            channel = dims_of(given.meta["val"])
            spread = View(e.value(given), channel, (*channel, *[1] * (len(dims) - 2)))
            result = e.op(operator, result, e.materialize(spread, like=given.meta["val"]))
    return result


def _instance_norm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    if not argument(node, "use_input_stats"):
        return None
    return e.op(
        "InstanceNormalization", e.value(source_of(node)), _channels(e, node, "weight", 1.0),
        _channels(e, node, "bias", 0.0), epsilon=float(argument(node, "eps")),
    )  # fmt: skip


def _softmax(name: str) -> Callable[[Emitter, Node], Any]:
    def translate(e: Emitter, node: Node) -> Any:  # noqa: ANN401
        source, dtype = source_of(node), dtype_of(node.meta["val"])
        axis = int(argument(node, "dim"))
        rank = max(1, rank_of(source))
        view = e.view(source)
        if axis % rank == rank - 1 and view.keeps_rows:
            return on_base(e, node, lambda x: e.op(name, x, axis=-1))
        x = e.cast(e.value(source), dtype_of(source.meta["val"]), dtype)
        return e.op(name, x, axis=axis)

    return translate


# -- pools ------------------------------------------------------------------------------------


def _pool_spatial(node: Node) -> int:
    """The digit in ``aten::max_pool2d``."""
    return int(str(node.target._schema.name)[-2])  # type: ignore[union-attr]


def pool_facts(node: Node, spatial: int) -> dict[str, Any]:
    """The attributes that ONNX's pools share."""
    kernel = per_axis(argument(node, "kernel_size"), spatial)
    stride = argument(node, "stride")
    return {
        "kernel_shape": kernel,
        "strides": per_axis(stride, spatial) if stride else kernel,
        "pads": per_axis(argument(node, "padding"), spatial) * 2,
        "ceil_mode": int(argument(node, "ceil_mode")),
    }


def _max_pool(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    spatial = _pool_spatial(node)
    x, added = with_batch(e, node, spatial)
    facts = pool_facts(node, spatial)
    result = e.op("MaxPool", x, dilations=per_axis(argument(node, "dilation"), spatial), **facts)
    return without_batch(node, result, added)


def _avg_pool(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    spatial = _pool_spatial(node)
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    facts = pool_facts(node, spatial)
    divisor = argument(node, "divisor_override") if "divisor_override" in names else None
    if divisor is not None:
        return _sum_pool(e, node, facts, int(divisor))
    include = bool(argument(node, "count_include_pad")) and any(facts["pads"])
    if facts["ceil_mode"] and e.opset < 19:
        # Before opset 19 runtimes disagree on the divisor of windows that hang over the edge.
        return None
    x, added = with_batch(e, node, spatial)
    if include and _zero_is_a_code(e, node):
        return without_batch(node, _with_edges(e, node, x, facts), added)
    result = e.op("AveragePool", x, count_include_pad=int(include), **facts)
    return without_batch(node, result, added)


def _zero_is_a_code(e: Emitter, node: Node) -> bool:
    """Whether a pool of a standard file reads integers whose code 0 is another number."""
    q = dequantized(node.args[0])
    zero = None if q is None else e.known(q.zero)
    return e.style.integers == "standard" and zero is not None and bool(zero.any())


def _with_edges(e: Emitter, node: Node, x: ir.Value, facts: dict[str, Any]) -> ir.Value:
    """Averages that count the padding: averages without it, by its share of each window.

    Over integers OpenVINO 2026.4 takes the padding for codes of 0, whatever their zero point.
    """
    dtype, spatial = dtype_of(node.meta["val"]), _pool_spatial(node)
    sizes = dims_of(source_of(node).meta["val"])[-spatial:]

    def share() -> ir.Value:
        ones = e.op("Expand", e.constant(1.0, dtype), e.sizes((1, 1, *sizes)))
        return e.op("AveragePool", ones, count_include_pad=1, **facts)

    shares = e.cached(("share of windows", sizes, str(facts), dtype), share)
    return e.op("Mul", e.op("AveragePool", x, count_include_pad=0, **facts), shares)


def _sum_pool(e: Emitter, node: Node, facts: dict[str, Any], divisor: int) -> ir.Value | View:
    """Sums of windows by a number: averages that count the padding, by what is missing to it."""
    if facts["ceil_mode"]:
        raise UnsupportedError(
            "ONNX has no average over windows beyond the edge by another number than theirs",
            where=node,
            hint="use ceil_mode=False, or no divisor_override",
        )
    spatial = _pool_spatial(node)
    x, added = with_batch(e, node, spatial)
    if any(facts["pads"]) and _zero_is_a_code(e, node):
        average = _with_edges(e, node, x, facts)
    else:
        average = e.op("AveragePool", x, count_include_pad=1, **facts)
    ratio = e.constant(math.prod(facts["kernel_shape"]) / divisor, dtype_of(node.meta["val"]))
    return without_batch(node, e.op("Mul", average, ratio), added)


def _adaptive_avg_pool(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    source = source_of(node)
    goal = list(argument(node, "output_size"))
    spatial = len(goal)
    sizes = [dim_of(s) for s in source.meta["val"].shape[-spatial:]]
    if all(g == 1 for g in goal):
        if rank_of(source) == spatial + 2:
            return e.op("GlobalAveragePool", e.value(source))
        axes = e.constant(list(range(-spatial, 0)))
        return e.op("ReduceMean", e.value(source), axes, keepdims=1)
    pairs = [(s, s if g is None else g) for s, g in zip(sizes, goal, strict=True)]
    reduced = [i for i, (s, g) in enumerate(pairs) if g == 1 and s != 1]
    kept = [i for i, (s, g) in enumerate(pairs) if s == g]
    if len(reduced) + len(kept) == spatial:
        axes = e.constant([i - spatial for i in reduced])
        return e.op("ReduceMean", e.value(source), axes, keepdims=1) if reduced else e.view(source)
    if not all(isinstance(s, int) and isinstance(g, int) and s % g == 0 for s, g in pairs):
        return average_bins(e, node, e.value(source), pairs, dtype_of(node.meta["val"]))
    kernel = [int(s) // int(g) for s, g in pairs]
    x, added = with_batch(e, node, spatial)
    result = e.op("AveragePool", x, kernel_shape=kernel, strides=kernel)
    return without_batch(node, result, added)


# -- embeddings -------------------------------------------------------------------------------


def _embedding(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    weight, ids = source_of(node), node_of(node.args[1])
    return e.op("Gather", e.value(weight), e.value(ids), axis=0)


LAYERS: Table = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.softmax.int: _softmax("Softmax"),
    aten._softmax.default: _softmax("Softmax"),
    aten.log_softmax.int: _softmax("LogSoftmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
    aten.max_pool1d.default: _max_pool,
    aten.max_pool2d.default: _max_pool,
    aten.max_pool3d.default: _max_pool,
    aten.avg_pool1d.default: _avg_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool3d.default: _avg_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.adaptive_avg_pool3d.default: _adaptive_avg_pool,
    aten.embedding.default: _embedding,
}  # fmt: skip
