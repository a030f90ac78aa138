"""Faults in the passes that simplify layout and compute or store equal things once."""

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
    in_call,
    merged_with_earlier,
    nodes_of,
    put,
    recalled,
    recomputed,
    swap,
)
from planish.tools.bench.faults.spec import Call, Fault, Plant

aten = torch.ops.aten

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

FAULTS: tuple[Fault, ...] = (*_LAYOUTS, *_EQUALS, *_DEAD)
