"""Faults in the passes that fold numbers into weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from planish.tools.bench.faults.sabotage import (
    batch_norm,
    in_call,
    in_constant,
    noise,
    poisoned,
    put,
)
from planish.tools.bench.faults.spec import Call, Fault, Plant

aten = torch.ops.aten

_CONV = aten.conv2d.default

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

FAULTS: tuple[Fault, ...] = (*_FORMULAS, *_CONVOLUTIONS)
