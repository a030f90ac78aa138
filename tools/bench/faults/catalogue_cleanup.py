"""Faults in the passes that clean up: constants, ranges, identities, layout, equal things."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.program import Program
from planish.tools.bench.faults.sabotage import (
    alike,
    constants_named,
    drop,
    edited,
    folded_at_sample,
    followed_by,
    in_call,
    in_constant,
    merged_with_earlier,
    nodes_of,
    noise,
    put,
    recalled,
    recomputed,
    replace_by,
    swap,
    then,
)
from planish.tools.bench.faults.spec import Call, Fault, Plant

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


# -- layout ---------------------------------------------------------------------------------------

_layout = partial(Fault, inner="simplify-layout")


def _baked(plant: Plant, node: Node, call: Call) -> Call:
    """The batch of the sample instead of -1."""
    target, (x, sizes), kwargs = call
    batch = plant.program.samples[0][0].shape[0]
    return target, (x, [batch if size == -1 else size for size in sizes]), kwargs


def _heads_and_positions(plant: Plant, node: Node, call: Call) -> Call:
    """``[batch, heads, positions, width]`` at once instead of a transposition after."""
    target, (x, (batch, positions, heads, width)), kwargs = call
    return target, (x, [batch, heads * 2, positions, width // 2]), kwargs


def _reshaped(plant: Plant) -> None:
    """A reshape to the sizes that the transposition gives."""
    shape = [s if isinstance(s, int) else -1 for s in plant.root.meta["val"].shape]
    new = plant.rewriter.call(aten.reshape.default, (plant.root.args[0], shape), like=plant.root)
    plant.rewriter.replace(plant.root, new)


def _other_part(plant: Plant) -> None:
    """The next part of a split."""
    source, index = plant.root.args
    assert isinstance(index, int)
    new = plant.rewriter.call(operator.getitem, (source, index + 1), like=plant.root)
    plant.rewriter.replace(plant.root, new)


def _windows(node: Node, program: Program) -> bool:
    """Whether a permutation cuts a picture into as many windows in height as in width."""
    if len(node.meta["val"].shape) != 6:
        return False
    shape: Any = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return bool(shape[1] == shape[3] and shape[1] > 1)


def _with_size(wanted: int) -> Any:  # noqa: ANN401
    return lambda node, program: node.meta["val"].shape[-1] == wanted


_LAYOUTS: tuple[Fault, ...] = (
    _layout(
        name="reshape-to-the-batch-of-the-sample",
        kind="shape-specialized constant",
        model="dinov2-s",
        rule="NumberSizes",
        nth=11,
        on_set_args=_baked,
    ),
    _layout(
        name="transposition-taken-for-a-reshape",
        kind="wrong dim order",
        model="dinov2-s",
        rule="PermuteIsReshape",
        nth=6,
        candidates=nodes_of(aten.transpose.int, where=lambda n, program: n.meta["val"].dim() == 4),
        extra=_reshaped,
    ),
    _layout(
        name="permutation-of-windows",
        kind="wrong dim order",
        model="timm/swin_tiny_patch4_window7_224",
        rule="MergePermutes",
        candidates=nodes_of(aten.permute.default, where=_windows),
        extra=lambda plant: edited(lambda p, named: {"dims": _crossed(named["dims"])})(plant),
    ),
    _layout(
        name="rotated-half-off-by-one",
        kind="off-by-one",
        model="transformers/llama-eager",
        rule="MergeSlices",
        candidates=nodes_of(
            aten.slice.Tensor, where=lambda n, program: bool(n.args[2]) and len(n.args) > 2
        ),
        extra=edited(put(start=3, end=7)),
    ),
    _layout(
        name="selected-key-for-value",
        kind="off-by-one",
        model="transformers/bloom",
        rule="DropCatSplit",
        nth=3,
        candidates=nodes_of(aten.select.int),
        extra=edited(put(index=1)),
    ),
    _layout(
        name="concatenation-reversed",
        kind="swapped operands",
        model="dinov2-s",
        rule="MergeCats",
        candidates=nodes_of(aten.cat.default),
        extra=edited(lambda plant, named: {"tensors": list(reversed(named["tensors"]))}),
    ),
    _layout(
        name="parts-of-a-split-swapped",
        kind="swapped operands",
        model="transformers/gpt2",
        rule="DropSplitCat",
        candidates=nodes_of(operator.getitem),
        extra=_other_part,
    ),
    _layout(
        name="reshape-of-merged-heads",
        kind="wrong dim order",
        model="dinov2-s",
        rule="NumberSizes",
        nth=2,
        on_set_args=_heads_and_positions,
    ),
    _layout(
        name="reshape-of-the-wrong-axis",
        kind="wrong axis",
        model="transformers/gpt2",
        rule="MergeReshapes",
        nth=2,
        on_call=in_call(
            aten.reshape.default,
            edit=lambda plant, named: {"shape": [1, 1, 1, -1]},
        ),
    ),
    _layout(
        name="max-pool-of-a-wider-window",
        kind="wrong padding",
        model="crnn-english-g2",
        rule="MergeReshapes",
        candidates=nodes_of(aten.max_pool2d.default),
        extra=edited(put(kernel_size=[3, 3], padding=[1, 1])),
    ),
)


def _crossed(dims: list[int]) -> list[int]:
    """Exchange the windows' own axes."""
    return [*dims[:1], dims[2], dims[1], *dims[3:]]


# -- equal things ---------------------------------------------------------------------------------

_equal = partial(Fault, inner="eliminate-common-subexpressions", rule="MergeEqual")
_merge = partial(Fault, inner="merge-duplicate-constants", rule="MergeConstant")

_EQUALS: tuple[Fault, ...] = (
    _equal(
        name="linears-of-other-weights-merged",
        kind="merged unequal calls",
        model="minilm",
        nth=3,
        candidates=alike(aten.linear.default),
        extra=merged_with_earlier,
    ),
    _equal(
        name="slices-of-other-bounds-merged",
        kind="merged unequal calls",
        model="transformers/llama-eager",
        nth=2,
        candidates=alike(aten.slice.Tensor),
        extra=merged_with_earlier,
    ),
    _equal(
        name="sizes-of-other-axes-merged",
        kind="merged unequal calls",
        model="minilm",
        nth=2,
        candidates=nodes_of(aten.sym_size.int),
        extra=lambda plant: plant.rewriter.replace(plant.root, plant.program.operators[0]),
    ),
    _equal(
        name="subtraction-taken-for-commutative",
        kind="swapped operands",
        model="transformers/t5",
        candidates=nodes_of(
            aten.sub.Tensor, where=lambda n, program: all(isinstance(a, Node) for a in n.args)
        ),
        extra=edited(swap("self", "other")),
    ),
    _equal(
        name="parts-of-a-layer-norm-merged",
        kind="merged unequal calls",
        model="transformers/bart",
        nth=2,
        candidates=alike(aten.linear.default),
        extra=merged_with_earlier,
    ),
    _merge(
        name="constants-that-differ-merged",
        kind="merged unequal constants",
        model="minilm",
        nth=4,
        candidates=constants_named("LayerNorm.bias"),
        extra=merged_with_earlier,
    ),
    _merge(
        name="weights-that-differ-merged",
        kind="merged unequal constants",
        model="dinov2-s",
        nth=3,
        candidates=constants_named("norm2.weight"),
        extra=merged_with_earlier,
    ),
    _merge(
        name="constant-edited-for-all-its-readers",
        kind="aliased weight edited",
        model="transformers/gpt2",
        candidates=lambda program: program.graph.find_nodes(op="get_attr", target="lm_head.weight"),
        extra=lambda plant: _edited_for_all(plant),
    ),
    _merge(
        name="shared-layer-edited-for-all",
        kind="aliased weight edited",
        model="transformers/albert",
        nth=5,
        candidates=nodes_of(aten.linear.default, where=lambda n, program: _read_twice(n, program)),
        extra=lambda plant: _edited_for_all(plant),
    ),
)


def _read_twice(node: Node, program: Program) -> bool:
    """Whether a linear's weight is read by another one, too."""
    weight: Any = node.args[1]
    readers = program.graph.find_nodes(op="get_attr", target=weight.target)
    return len([user for reader in readers for user in reader.users]) > 1


def _edited_for_all(plant: Plant) -> None:
    """Scale a constant for one of its readers, under the name that all of them read."""
    rewriter, program = plant.rewriter, plant.program
    reader = plant.root
    if reader.op != "get_attr":
        reader = next(n for n in plant.root.all_input_nodes if n.op == "get_attr")
    name = str(reader.target)
    held = program.constants[name]
    assert isinstance(held, Tensor)
    # For this reader, what was taken from the constant is given back.
    user = next(iter(reader.users))
    rewriter.insert_before(user)
    half = rewriter.call(aten.mul.Tensor, (reader, 0.5), like=user)
    rewriter.set_args(user, [half if a is reader else a for a in user.args], dict(user.kwargs))
    program.constants[name] = held * 2


_DEAD: tuple[Fault, ...] = (
    Fault(
        name="live-branch-taken-for-dead",
        kind="dropped operand",
        model="crnn-english-g2",
        inner="eliminate-dead-code",
        rule="DropUnread",
        nth=2,
        candidates=nodes_of(aten.relu.default),
        extra=drop(),
    ),
    Fault(
        name="position-embedding-in-half",
        kind="lost dtype",
        model="minilm",
        inner="fold-constants",
        rule="FoldConstant",
        candidates=lambda program: [
            n
            for n in nodes_of(aten.embedding.default)(program)
            if "position" in str(n.args[0].target)  # type: ignore[union-attr]
        ],
        extra=recomputed("weight", lambda t: t.bfloat16().to(t.dtype)),
    ),
    Fault(
        name="softplus-for-relu",
        kind="wrong operator",
        model="crnn-english-g2",
        inner="remove-identities",
        rule="DropIdentity",
        nth=3,
        candidates=nodes_of(aten.relu.default),
        extra=recalled(aten.softplus.default),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *_CONSTANTS,
    *_RANGES,
    *_IDENTITIES,
    *_LAYOUTS,
    *_EQUALS,
    *_DEAD,
)
