"""Faults in the passes that fold constants and ranges, and remove identities."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.program import Program
from planish.tools.bench.faults.sabotage import (
    drop,
    edited,
    folded_at_sample,
    followed_by,
    in_constant,
    nodes_of,
    noise,
    put,
    replace_by,
    then,
)
from planish.tools.bench.faults.spec import Fault, Plant

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default

# -- constants and ranges -------------------------------------------------------------------------

_fold = partial(Fault, inner="fold-constants", rule="FoldConstant")
_ranges = partial(Fault, inner="fold-ranges", rule="FoldUniform", model="minilm")

_CONSTANTS: tuple[Fault, ...] = (
    # The position embeddings of DINOv2, resampled to 16 x 16 patches.
    _fold(
        name="folded-values-off-by-one",
        kind="wrong constant",
        model="dinov2-s",
        at="cat",
        on_constant=in_constant(lambda t: t.roll(1, 1)),
    ),
    _fold(
        name="folded-values-of-float64",
        kind="float64 constant",
        model="dinov2-s",
        at="cat",
        on_constant=in_constant(Tensor.double),
    ),
    _fold(
        name="folded-values-random",
        kind="nondeterminism",
        model="dinov2-s",
        at="cat",
        on_constant=in_constant(noise(0.1)),
    ),
    _fold(
        name="folded-batch",
        kind="shape-specialized constant",
        model="minilm",
        candidates=nodes_of(aten.sym_size.int),
        extra=folded_at_sample,
    ),
    _fold(
        name="folded-sequence",
        kind="shape-specialized constant",
        model="minilm",
        nth=2,
        candidates=nodes_of(aten.sym_size.int),
        extra=folded_at_sample,
    ),
    _fold(
        name="folded-positions-of-the-sample",
        kind="shape-specialized constant",
        model="minilm",
        candidates=nodes_of(aten.slice.Tensor),
        extra=folded_at_sample,
    ),
    _fold(
        name="folded-class-token-of-the-sample",
        kind="shape-specialized constant",
        model="dinov2-s",
        candidates=nodes_of(aten.expand.default),
        extra=folded_at_sample,
    ),
    _fold(
        name="folded-input",
        kind="value-specialized constant",
        model="transformers/gpt2-eager",
        at="view_1",
        candidates=nodes_of(aten.view.default),
        extra=folded_at_sample,
    ),
    _fold(
        name="folded-comparison-inverted",
        kind="inverted mask",
        model="transformers/bert-eager",
        at="new_ones",
        on_constant=in_constant(Tensor.logical_not),
    ),
)

_RANGES: tuple[Fault, ...] = (
    _ranges(
        name="range-decided-wrongly",
        kind="wrong comparison",
        at="and",
        on_constant=in_constant(Tensor.logical_not),
    ),
    _ranges(
        name="range-off-by-one",
        kind="off-by-one",
        at="expand",
        on_constant=in_constant(lambda t: t + 1),
    ),
    _ranges(
        name="lookup-of-the-next-row",
        kind="off-by-one",
        rule="FoldLookup",
        on_constant=lambda plant, tensor, name: (
            plant.tensor("weight")[1].reshape(tensor.shape).clone()
        ),
    ),
    _ranges(
        name="causal-mask-decided-true",
        kind="wrong comparison",
        model="transformers/llama-eager",
        candidates=nodes_of(aten.le.Tensor),
        extra=followed_by(aten.ones_like.default),
    ),
    _ranges(
        name="causal-mask-off-by-one",
        kind="off-by-one",
        model="transformers/llama-eager",
        candidates=nodes_of(aten.le.Tensor),
        extra=lambda plant: _hide_next(plant),
    ),
)


def _hide_next(plant: Plant) -> None:
    """``key <= query + 1`` instead of ``key <= query``."""
    key, query = plant.root.args
    later = plant.rewriter.call(aten.add.Scalar, (query, 1), like=plant.root)
    new = plant.rewriter.call(aten.le.Tensor, (key, later), like=plant.root)
    plant.rewriter.replace(plant.root, new)


# -- identities -----------------------------------------------------------------------------------

_identity = partial(Fault, inner="remove-identities", rule="DropIdentity", model="minilm")


def _rounding_cast(node: Node, program: Program) -> bool:
    """Whether a cast turns floats into integers."""
    before, after = (n.meta["val"].dtype for n in (node.args[0], node))  # type: ignore[union-attr]
    return before.is_floating_point and not after.is_floating_point


_IDENTITIES: tuple[Fault, ...] = (
    _identity(
        name="gelu-taken-for-an-identity",
        kind="removed operator",
        nth=4,
        candidates=nodes_of(aten.gelu.default),
        extra=drop(),
    ),
    _identity(
        name="clamp-taken-for-an-identity",
        kind="removed operator",
        model="efficientnet-lite0",
        nth=8,
        candidates=nodes_of(aten.hardtanh.default, aten.relu6.default),
        extra=drop(),
    ),
    _identity(
        name="rounding-cast-taken-for-an-identity",
        kind="removed operator",
        model="transformers/t5",
        candidates=nodes_of(aten.to.dtype, where=_rounding_cast),
        extra=lambda plant: _keep_fraction(plant),
    ),
    _identity(
        name="norm-taken-for-an-identity",
        kind="removed operator",
        nth=6,
        candidates=nodes_of(aten.layer_norm.default),
        extra=drop(),
    ),
    _identity(
        name="residual-dropped",
        kind="dropped operand",
        nth=5,
        at="add",
        candidates=nodes_of(
            aten.add.Tensor,
            where=lambda node, program: (
                node.meta["val"].dim() == 3 and isinstance(node.args[1], Node)
            ),
        ),
        extra=drop(),
    ),
    _identity(
        name="dropout-replaced-by-the-value-before",
        kind="wrong operand",
        nth=2,
        at="dropout",
        on_replace=replace_by(lambda plant, new: new.args[0]),
    ),
    _identity(
        name="mask-dropped",
        kind="dropped mask",
        rule="DropTrueMask",
        nth=3,
        candidates=nodes_of(_ATTENTION),
        extra=edited(put(attn_mask=None)),
    ),
    _identity(
        name="mask-inverted",
        kind="inverted mask",
        candidates=nodes_of(aten.to.device),
        extra=followed_by(aten.logical_not.default),
    ),
    _identity(
        name="positions-broadcast",
        kind="wrong broadcast",
        rule="DropExpand",
        nth=2,
        candidates=nodes_of(aten.embedding.default),
        extra=followed_by(aten.slice.Tensor, 1, 0, 1),
    ),
    _identity(
        name="dropout-in-training-mode",
        kind="nondeterminism",
        at="dropout_3",
        candidates=nodes_of(aten.dropout.default),
        extra=edited(put(train=True)),
    ),
    _identity(
        name="identity-negated",
        kind="wrong sign",
        nth=3,
        at="dropout",
        on_replace=replace_by(then(aten.neg.default)),
    ),
)


def _keep_fraction(plant: Plant) -> None:
    """Round up where the cast rounds down."""
    up = plant.rewriter.call(aten.ceil.default, (plant.root.args[0],), like=plant.root)
    new = plant.rewriter.call(plant.root.target, (up, *plant.root.args[1:]), like=plant.root)
    plant.rewriter.replace(plant.root, new)


FAULTS: tuple[Fault, ...] = (*_CONSTANTS, *_RANGES, *_IDENTITIES)
