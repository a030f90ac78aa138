"""Faults in the passes that fold numbers into weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from planish.tools.bench.faults.sabotage import (
    batch_norm,
    drop,
    edited,
    in_call,
    in_constant,
    nodes_of,
    noise,
    poisoned,
    put,
    recomputed,
)
from planish.tools.bench.faults.spec import Call, Fault, Plant

aten = torch.ops.aten

_CONV = aten.conv2d.default
_ATTENTION = aten.scaled_dot_product_attention.default

# Every batch norm of EfficientNet-Lite0 follows a convolution without bias: 3 x 3, stride 2 first,
# then depthwise and pointwise ones by turns.
_batch_norm = partial(
    Fault, model="efficientnet-lite0", inner="fold-batch-norm", rule="batch-norm-into-producer"
)


def _dense(
    plant: Plant,
    target: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Call | None:
    """A depthwise convolution as a dense one that sums over all channels."""
    if target is not _CONV:
        return None
    weight = plant.program.constant(args[1])
    assert weight is not None
    wide = weight.repeat(1, weight.shape[0], 1, 1) / weight.shape[0]
    new = plant.rewriter.constant(wide, "wide.weight", like=plant.root)
    return _CONV, (args[0], new, *args[2:6], 1), {}


_FORMULAS: tuple[Fault, ...] = (
    _batch_norm(
        name="batch-norm-without-mean",
        kind="batch-norm formula",
        nth=3,
        on_constant=batch_norm(lambda g, b, m, v, e: (g / (v + e).sqrt(), b)),
    ),
    _batch_norm(
        name="batch-norm-variance-for-deviation",
        kind="batch-norm formula",
        nth=9,
        on_constant=batch_norm(lambda g, b, m, v, e: (g / (v + e), b - g / (v + e) * m)),
    ),
    _batch_norm(
        name="batch-norm-mean-not-scaled",
        kind="batch-norm formula",
        nth=14,
        on_constant=batch_norm(lambda g, b, m, v, e: (g / (v + e).sqrt(), b - m)),
    ),
    _batch_norm(
        name="batch-norm-without-gamma",
        kind="batch-norm formula",
        nth=20,
        on_constant=batch_norm(lambda g, b, m, v, e: ((v + e).rsqrt(), b - m * (v + e).rsqrt())),
    ),
    _batch_norm(
        name="batch-norm-without-eps",
        kind="wrong epsilon",
        nth=1,
        on_constant=batch_norm(lambda g, b, m, v, e: (g / v.sqrt(), b - g / v.sqrt() * m)),
    ),
    _batch_norm(
        name="batch-norm-default-eps",
        kind="wrong epsilon",
        nth=30,
        on_constant=batch_norm(
            lambda g, b, m, v, e: (g / (v + 1e-5).sqrt(), b - g / (v + 1e-5).sqrt() * m)
        ),
    ),
    _batch_norm(
        name="batch-norm-shift-sign",
        kind="wrong sign",
        nth=27,
        on_constant=batch_norm(
            lambda g, b, m, v, e: (g / (v + e).sqrt(), b + g / (v + e).sqrt() * m)
        ),
    ),
    _batch_norm(
        name="batch-norm-bias-dropped",
        kind="dropped bias",
        nth=5,
        on_call=in_call(_CONV, edit=put(bias=None)),
    ),
    _batch_norm(
        name="batch-norm-channels-off-by-one",
        kind="off-by-one",
        nth=11,
        on_constant=in_constant(lambda t: t.roll(1, 0), ends="bias"),
    ),
    _batch_norm(
        name="batch-norm-scales-inputs",
        kind="wrong axis",
        model="torchvision/resnet18",
        nth=3,
        on_constant=lambda plant, tensor, name: (
            _on_columns(plant, tensor) if tensor.dim() == 4 else None
        ),
    ),
)


def _on_columns(plant: Plant, tensor: Tensor) -> Tensor:
    """``W s`` instead of ``s W``; the convolution has as many inputs as outputs."""
    var, eps = plant.tensor("running_var").double(), float(plant.given["eps"])
    scale = plant.tensor("weight").double() / (var + eps).sqrt()
    moved = tensor.double() / scale.reshape(-1, 1, 1, 1) * scale.reshape(1, -1, 1, 1)
    return moved.to(tensor.dtype)


_CONVOLUTIONS: tuple[Fault, ...] = (
    _batch_norm(
        name="convolution-stride",
        kind="wrong stride",
        nth=1,
        on_call=in_call(_CONV, edit=put(stride=[1, 1])),
    ),
    _batch_norm(
        name="convolution-dilation-and-padding",
        kind="wrong dilation",
        nth=2,
        on_call=in_call(_CONV, edit=put(padding=[2, 2], dilation=[2, 2])),
    ),
    _batch_norm(
        name="convolution-padding",
        kind="wrong padding",
        nth=2,
        on_call=in_call(_CONV, edit=put(padding=[0, 0])),
    ),
    _batch_norm(name="convolution-groups", kind="wrong groups", nth=2, on_call=_dense),
    _batch_norm(
        name="convolution-kernel-transposed",
        kind="transposed weight",
        nth=2,
        on_constant=in_constant(lambda t: t.transpose(-1, -2).contiguous(), ends="weight"),
    ),
    _batch_norm(
        name="constant-nan",
        kind="not finite",
        nth=8,
        on_constant=in_constant(poisoned(float("nan")), ends="bias"),
    ),
    _batch_norm(
        name="constant-infinite",
        kind="not finite",
        nth=6,
        on_constant=in_constant(poisoned(float("-inf")), ends="bias"),
    ),
    _batch_norm(
        name="constant-of-one-element",
        kind="wrong constant",
        nth=17,
        on_constant=in_constant(lambda t: t[:1].clone(), ends="bias"),
    ),
    _batch_norm(
        name="constant-random",
        kind="nondeterminism",
        nth=19,
        on_constant=in_constant(noise(0.05), ends="weight"),
    ),
    _batch_norm(
        name="constant-through-bfloat16",
        kind="lost dtype",
        nth=4,
        on_constant=in_constant(lambda t: t.bfloat16().to(t.dtype), ends="weight"),
    ),
    _batch_norm(
        name="constant-float64",
        kind="float64 constant",
        nth=4,
        on_constant=in_constant(torch.Tensor.double, ends="bias"),
    ),
)

# -- scales, shifts, numbers ----------------------------------------------------------------------

_scale = partial(
    Fault, inner="fold-scale-shift", rule="scale-shift-into-producer", model="dinov2-s"
)


def _layer_scale(plant: Plant) -> Tensor:
    """The vector that multiplies the output of a linear."""
    return plant.tensor("other").double()


def _scaled_columns(plant: Plant, weight: Tensor) -> Tensor | None:
    """``W s`` instead of ``s W``, where the weight is square."""
    scale = _layer_scale(plant)
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        return None
    moved = weight.double() / scale.reshape(-1, 1) * scale.reshape(1, -1)
    return moved.to(weight.dtype)


_SCALES: tuple[Fault, ...] = (
    _scale(
        name="layer-scale-of-the-inputs",
        kind="wrong axis",
        nth=1,
        on_constant=lambda plant, tensor, name: _scaled_columns(plant, tensor),
    ),
    _scale(
        name="layer-scale-not-of-the-bias",
        kind="wrong scale",
        nth=4,
        on_constant=lambda plant, tensor, name: (
            (tensor.double() / _layer_scale(plant)).to(tensor.dtype)
            if name.endswith("bias")
            else None
        ),
    ),
    _scale(
        name="layer-scale-dropped",
        kind="dropped operand",
        nth=7,
        candidates=nodes_of(aten.mul.Tensor),
        extra=drop(),
    ),
    _scale(
        name="layer-scale-twice",
        kind="wrong scale",
        nth=10,
        on_replace=lambda plant, old, new: (
            plant.rewriter.call(aten.mul.Tensor, (new, plant.given["other"]), like=plant.root)
            if old is plant.root
            else None
        ),
    ),
    _scale(
        name="shift-dropped-with-the-scale",
        kind="dropped bias",
        nth=2,
        on_call=in_call(aten.linear.default, edit=put(bias=None)),
    ),
    Fault(
        name="scalar-not-folded",
        kind="wrong scale",
        model="transformers/opt",
        inner="fold-scalar",
        rule="scalar-into-attention",
        nth=1,
        on_call=in_call(_ATTENTION, edit=put(scale=1.0)),
    ),
    Fault(
        name="scalar-inverted",
        kind="wrong scale",
        model="transformers/opt",
        inner="fold-scalar",
        rule="scalar-into-attention",
        nth=2,
        on_call=in_call(_ATTENTION, edit=lambda plant, named: {"scale": 1 / named["scale"]}),
    ),
    Fault(
        name="scalar-sign",
        kind="wrong sign",
        model="minilm",
        inner="fold-scalar",
        rule="scalar-into-attention",
        nth=2,
        candidates=nodes_of(_ATTENTION),
        extra=edited(lambda plant, named: {"scale": -named["scale"]}),
    ),
)

# -- layers merged --------------------------------------------------------------------------------

_merged = partial(Fault, inner="merge-linears", rule="merge-layers", model="crnn-english-g2")


_MERGES: tuple[Fault, ...] = (
    _merged(
        name="merged-without-the-first-bias",
        kind="dropped bias",
        on_constant=lambda plant, tensor, name: (
            plant.tensor("bias").clone() if tensor.dim() == 1 else None
        ),
    ),
    _merged(
        name="merged-over-an-activation",
        kind="removed operator",
        model="minilm",
        nth=3,
        candidates=nodes_of(aten.gelu.default),
        extra=drop(),
    ),
    _merged(
        name="merged-weight-of-flipped-inputs",
        kind="transposed weight",
        on_constant=in_constant(lambda t: t.flip(1) if t.dim() == 2 else t),
    ),
    _merged(
        name="square-weight-transposed",
        kind="transposed weight",
        model="minilm",
        nth=4,
        candidates=nodes_of(
            aten.linear.default,
            where=lambda node, program: len(set(node.args[1].meta["val"].shape)) == 1,  # type: ignore[union-attr]
        ),
        extra=recomputed("weight", lambda t: t.t().contiguous()),
    ),
    _merged(
        name="recurrent-biases-swapped",
        kind="swapped operands",
        candidates=nodes_of(aten.lstm.input),
        extra=lambda plant: _reversed_parameters(plant),
    ),
)


def _reversed_parameters(plant: Plant) -> None:
    """Let both directions of a recurrent layer read the other's weights."""
    params = list(plant.given["params"])
    half = len(params) // 2
    args = list(plant.root.args)
    args[args.index(plant.given["params"])] = [*params[half:], *params[:half]]
    plant.rewriter.set_args(plant.root, args)


# -- padding --------------------------------------------------------------------------------------

_padding = partial(
    Fault, inner="fold-padding", rule="number-padding", model="timm/convmixer_768_32"
)

_PADDINGS: tuple[Fault, ...] = (
    _padding(
        name="padding-one-too-small",
        kind="wrong padding",
        nth=5,
        on_call=in_call(_CONV, edit=put(padding=[2, 2])),
    ),
    _padding(
        name="padding-moved-between-axes",
        kind="wrong padding",
        nth=2,
        on_call=in_call(_CONV, edit=put(padding=[5, 3])),
    ),
    _padding(
        name="average-pool-counts-padding",
        kind="wrong padding",
        model="timm/poolformer_s12",
        rule="padding-into-consumer",
        nth=1,
        candidates=nodes_of(aten.avg_pool2d.default),
        extra=edited(put(count_include_pad=True)),
    ),
)

FAULTS: tuple[Fault, ...] = (*_FORMULAS, *_CONVOLUTIONS, *_SCALES, *_MERGES, *_PADDINGS)
