"""Faults in the passes that recover composite operators and fuse linears."""

from __future__ import annotations

import math
import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planish.tools.bench.faults.sabotage import (
    edited,
    in_call,
    in_constant,
    instead_of,
    nodes_of,
    put,
    recalled,
    swap,
    through,
)
from planish.tools.bench.faults.spec import Call, Fault, Plant

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default

# -- norms ----------------------------------------------------------------------------------------

_norm = partial(Fault, inner="recover-norms", rule="whole-norm", model="transformers/llama-eager")


def _centered(plant: Plant, named: dict[str, Any]) -> dict[str, Any]:
    return {name: named.get(name) for name in ("input", "normalized_shape", "weight")} | {
        "bias": None,
        "eps": named["eps"],
    }


_NORMS: tuple[Fault, ...] = (
    _norm(
        name="rms-norm-eps",
        kind="wrong epsilon",
        nth=1,
        on_call=in_call(aten.rms_norm.default, edit=put(eps=1e-5)),
    ),
    _norm(
        name="rms-norm-centered",
        kind="wrong operator",
        nth=2,
        on_call=instead_of(aten.rms_norm.default, aten.layer_norm.default, _centered),
    ),
    _norm(
        name="rms-norm-without-weight",
        kind="dropped operand",
        model="smollm2-135m",
        nth=30,
        on_call=in_call(aten.rms_norm.default, edit=put(weight=None)),
    ),
    _norm(
        name="rms-norm-weight-negated",
        kind="wrong sign",
        model="transformers/t5",
        nth=4,
        on_call=in_call(aten.rms_norm.default, edit=through("weight", aten.neg.default)),
    ),
    _norm(
        name="layer-norm-weight-and-bias-swapped",
        kind="swapped operands",
        model="minilm",
        nth=7,
        candidates=nodes_of(aten.layer_norm.default),
        extra=edited(swap("weight", "bias")),
    ),
    _norm(
        name="layer-norm-without-bias",
        kind="dropped bias",
        model="dinov2-s",
        nth=9,
        candidates=nodes_of(aten.layer_norm.default),
        extra=edited(put(bias=None)),
    ),
    _norm(
        name="layer-norm-eps",
        kind="wrong epsilon",
        model="minilm",
        nth=1,
        candidates=nodes_of(aten.layer_norm.default),
        extra=edited(put(eps=1e-5)),
    ),
    _norm(
        name="layer-norm-eps-of-another-layer",
        kind="wrong epsilon",
        model="dinov2-s",
        nth=12,
        candidates=nodes_of(aten.layer_norm.default),
        extra=edited(put(eps=1e-3)),
    ),
)

# -- activations ----------------------------------------------------------------------------------

_gate = partial(Fault, inner="recover-activations", rule="gate")


def _quick(plant: Plant) -> None:
    """``x sigmoid(1.702 x)``."""
    x, like = plant.root.args[0], plant.root
    scaled = plant.rewriter.call(aten.mul.Tensor, (x, 1.702), like=like)
    gate = plant.rewriter.call(aten.sigmoid.default, (scaled,), like=like)
    plant.rewriter.replace(like, plant.rewriter.call(aten.mul.Tensor, (x, gate), like=like))


_ACTIVATIONS: tuple[Fault, ...] = (
    _gate(
        name="gelu-tanh-taken-for-gelu",
        kind="gelu approximation",
        model="transformers/gpt2",
        nth=1,
        on_call=in_call(aten.gelu.default, edit=put(approximate="none")),
        silent="the random weights of this network keep what enters the gelu below 0.5, where the "
        "two formulas differ by less than the bound of float32; on pretrained MiniLM, which has "
        "larger values, the same mistake is caught",
    ),
    _gate(
        name="gelu-taken-for-gelu-tanh",
        kind="gelu approximation",
        model="minilm",
        nth=2,
        candidates=nodes_of(aten.gelu.default),
        extra=edited(put(approximate="tanh")),
    ),
    _gate(
        name="gelu-taken-for-quick-gelu",
        kind="gelu approximation",
        model="dinov2-s",
        nth=5,
        candidates=nodes_of(aten.gelu.default),
        extra=_quick,
    ),
    _gate(
        name="gelu-tanh-taken-for-silu",
        kind="wrong operator",
        model="transformers/albert",
        nth=2,
        on_call=instead_of(
            aten.gelu.default, aten.silu.default, lambda plant, named: {"self": named["self"]}
        ),
    ),
    _gate(
        name="hardswish-taken-for-silu",
        kind="wrong operator",
        model="torchvision/mobilenet_v3_small",
        nth=3,
        candidates=nodes_of(aten.hardswish.default, aten.hardswish_.default),
        extra=recalled(aten.silu.default),
        silent="the random weights of this network make its logits deaf to this layer: they move "
        "by less than the bound of float32, and outputs are all that is compared",
    ),
    _gate(
        name="gate-of-another-factor",
        kind="swapped operands",
        model="smollm2-135m",
        nth=6,
        candidates=nodes_of(aten.silu.default),
        extra=recalled(aten.gelu.default),
    ),
)

# -- rotary embeddings ----------------------------------------------------------------------------

_rotary = partial(Fault, inner="recover-rotary", rule="rotary-embedding")


def _turning(edit: Any) -> Any:  # noqa: ANN401
    """Alter the call of the rotary embedding, which is registered when its pass is imported."""

    def hook(
        plant: Plant,
        target: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call | None:
        if "rotary_embedding" not in str(target):
            return None
        return target, edit(plant, *args), kwargs

    return hook


_ROTARY: tuple[Fault, ...] = (
    _rotary(
        name="rotary-cos-and-sin-swapped",
        kind="swapped operands",
        model="transformers/llama-eager",
        nth=2,
        on_call=_turning(lambda plant, x, cos, sin, *rest: (x, sin, cos, *rest)),
    ),
    _rotary(
        name="rotary-by-the-opposite-angle",
        kind="wrong sign",
        model="smollm2-135m",
        nth=5,
        on_call=_turning(
            lambda plant, x, cos, sin, *rest: (
                x,
                cos,
                plant.rewriter.call(aten.neg.default, (sin,), like=plant.root),
                *rest,
            )
        ),
    ),
    _rotary(
        name="rotary-of-flipped-positions",
        kind="wrong axis",
        model="transformers/qwen2",
        nth=1,
        on_call=_turning(
            lambda plant, x, cos, sin, *rest: (
                plant.rewriter.call(aten.flip.default, (x, [-1]), like=plant.root),
                cos,
                sin,
                *rest,
            )
        ),
    ),
)

# -- attention ------------------------------------------------------------------------------------

_attention = partial(
    Fault, inner="recover-attention", rule="whole-attention", model="transformers/bert-eager"
)

_ATTENTIONS: tuple[Fault, ...] = (
    _attention(
        name="attention-not-scaled",
        kind="wrong scale",
        nth=1,
        on_call=in_call(_ATTENTION, edit=put(scale=1.0)),
    ),
    _attention(
        name="attention-scaled-by-the-whole-width",
        kind="wrong scale",
        model="transformers/vit-eager",
        nth=2,
        on_call=in_call(_ATTENTION, edit=put(scale=1 / math.sqrt(32))),
    ),
    _attention(
        name="attention-mask-dropped",
        kind="dropped mask",
        nth=2,
        on_call=in_call(_ATTENTION, edit=put(attn_mask=None)),
    ),
    _attention(
        name="attention-mask-inverted",
        kind="inverted mask",
        nth=1,
        on_call=in_call(_ATTENTION, edit=through("attn_mask", aten.neg.default)),
    ),
    _attention(
        name="attention-taken-for-causal",
        kind="wrong mask",
        nth=1,
        on_call=in_call(_ATTENTION, edit=put(attn_mask=None, is_causal=True)),
    ),
    _attention(
        name="attention-not-causal",
        kind="dropped mask",
        model="transformers/llama-eager",
        nth=1,
        on_call=in_call(_ATTENTION, edit=put(attn_mask=None)),
    ),
    _attention(
        name="attention-query-and-key-swapped",
        kind="swapped operands",
        model="transformers/vit-eager",
        nth=1,
        on_call=in_call(_ATTENTION, edit=swap("query", "key")),
    ),
    _attention(
        name="attention-key-and-value-swapped",
        kind="swapped operands",
        model="transformers/bloom",
        nth=2,
        on_call=in_call(_ATTENTION, edit=swap("key", "value")),
    ),
    _attention(
        name="attention-softmax-over-queries",
        kind="wrong axis",
        nth=2,
        candidates=nodes_of(aten.softmax.int),
        extra=edited(put(dim=-2)),
    ),
    _attention(
        name="attention-without-alibi",
        kind="dropped operand",
        model="transformers/bloom",
        nth=1,
        candidates=nodes_of(aten.baddbmm.default),
        extra=edited(put(beta=0.0)),
    ),
    _attention(
        name="attention-mask-of-another-head",
        kind="wrong broadcast",
        model="transformers/bloom",
        nth=1,
        on_call=in_call(
            _ATTENTION,
            edit=lambda plant, named: {
                "attn_mask": plant.rewriter.call(
                    aten.slice.Tensor, (named["attn_mask"], 1, 0, 1), like=plant.root
                )
            },
        ),
    ),
)

# -- parallel linears -----------------------------------------------------------------------------

_parallel = partial(
    Fault,
    inner="fuse-parallel-linears",
    rule="widen-linear",
    model="minilm",
    recipe="exact,fuse-parallel-linears",
)


def _part(index: dict[int, int]) -> Any:  # noqa: ANN401
    def hook(
        plant: Plant,
        target: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call | None:
        if target is not operator.getitem or args[1] not in index:
            return None
        return target, (args[0], index[args[1]]), kwargs

    return hook


_PARALLEL: tuple[Fault, ...] = (
    _parallel(
        name="stacked-parts-swapped",
        kind="swapped operands",
        nth=2,
        on_call=_part({0: 1, 1: 0}),
    ),
    _parallel(
        name="stacked-bias-dropped",
        kind="dropped bias",
        nth=3,
        on_call=in_call(aten.linear.default, edit=put(bias=None)),
    ),
    _parallel(
        name="stacked-rows-off-by-one",
        kind="off-by-one",
        nth=4,
        on_constant=in_constant(lambda t: t.roll(1, 0), ends="weight"),
    ),
    _parallel(
        name="stacked-weight-interleaved",
        kind="wrong dim order",
        nth=5,
        on_constant=in_constant(lambda t: _interleaved(t), ends="weight"),
    ),
)


def _interleaved(weight: Tensor) -> Tensor:
    """The rows of three weights by turns."""
    return weight.reshape(3, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape).clone()


FAULTS: tuple[Fault, ...] = (*_NORMS, *_ACTIVATIONS, *_ROTARY, *_ATTENTIONS, *_PARALLEL)
