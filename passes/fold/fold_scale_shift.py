"""Fold a per-channel multiplication or addition into the layer or norm before or after it.

Rewrite:
    s * layer(x; W, b) + t   ->  layer(x; W', b')      W' = s W (rows),    b' = s b + t
    layer(s * x + t; W, b)   ->  layer(x; W', b')      W' = W s (columns), b' = b + W t
    bn(s * x + t; mean, g)   ->  bn(x; mean', g')      mean' = (mean - t) / s,  g' = g s
    for the operators s * y, y / s, y + t, t + y, y - t and t - y.
Shapes:       y: [..., C, ...]; s, t: constants of C elements along the channel axis (or t: one
              number). The layer is a linear, a convolution, or a layer, group, batch, instance or
              RMS norm; after the scale: a linear, a convolution, or a batch norm.
Requires:     the vector is constant; nothing else reads what lies between, which may move the
              channel axis but not split it; W is not shared, unless only b changes. A shift is
              not folded into a convolution with padding, for the padded zeros come after it.
Contract:     exact: computed in float64, one rounding per number.
Cost:         one operator and C numbers less; at most one new bias.
Fails:        never; numbers that the weight's type cannot hold are a refusal.
Source:       Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model
              Tuning, NeurIPS 2022 (its re-parameterization after training).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fold._axes import Axis, readers, same_type, value
from planish.passes.fold._find import Elsewhere, layer_before, layers_after
from planish.passes.fold._layers import CONVOLUTION, LINEAR, NORM, Fold, rounded_fold

aten = torch.ops.aten

_SHIFTS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
_ROOTS = frozenset({aten.mul.Tensor, aten.div.Tensor, *_SHIFTS})


@dataclass(frozen=True)
class Affine:
    """An operator that computes ``scale * x + shift``.

    Attributes:
        x: what it is applied to.
        axis: the axis of x along which the numbers lie; None where there is one number for all.
        scale: float64 ``[C]`` or ``[1]``; None stands for ones.
        shift: float64 ``[C]`` or ``[1]``; None stands for zeros.
    """

    x: Node
    axis: Axis
    scale: Tensor | None
    shift: Tensor | None


def apply_before_batch_norm(
    mean: Tensor, gamma: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The mean and weight of the batch norm that equals ``bn(scale * x + shift)``, in float64.

    Args:
        mean: ``[C]``.
        gamma: ``[C]``; None stands for ones.
        scale: nowhere zero; None stands for ones.
        shift: None stands for zeros.

    Returns:
        The new mean, and the new weight, None where it does not change.
    """
    moved = mean.double() if shift is None else mean.double() - shift
    if scale is None:
        return moved, None
    return moved / scale, scale if gamma is None else gamma.double() * scale


def read_affine(node: Node, program: Program) -> Affine | str | None:
    """``scale * x + shift`` per channel; a reason where it is not quite that; None for others."""
    first, second = argument(node, "self"), argument(node, "other")
    constants = [_number(first, program), _number(second, program)]
    if (constants[0] is None) == (constants[1] is None):
        return None
    left = constants[0] is not None  # the constant is the left operand
    x, vector = (second, constants[0]) if left else (first, constants[1])
    assert isinstance(x, Node)
    assert vector is not None
    is_shift = is_op(node, *_SHIFTS)
    if (vector.numel() == 1 and not is_shift) or (left and is_op(node, aten.div.Tensor)):
        return None  # fold-scalar's concern; not affine
    if not value(x).is_floating_point() or not same_type(x, node):
        return "it changes the element type or the sizes of its operand"
    long = [axis for axis, size in enumerate(vector.shape, -vector.dim()) if size != 1]
    if len(long) > 1:
        return None  # a table, such as position embeddings
    axis = long[0] % value(x).dim() if long else None
    scale, shift = _scale_and_shift(node, vector.double().flatten(), left=left)
    if scale is not None and not bool(scale.isfinite().all()):
        return "it divides by zero"
    return Affine(x, axis, scale, shift)


def _number(operand: object, program: Program) -> Tensor | None:
    if isinstance(operand, (int, float)):
        return torch.tensor(operand, dtype=torch.float64)
    return program.constant(operand)


def _scale_and_shift(
    node: Node, vector: Tensor, *, left: bool
) -> tuple[Tensor | None, Tensor | None]:
    if is_op(node, aten.mul.Tensor):
        return vector, None
    if is_op(node, aten.div.Tensor):
        return vector.reciprocal(), None
    # add: x + alpha y.  sub: x - alpha y.  rsub: y - alpha x.
    alpha = float(argument(node, "alpha"))
    if is_op(node, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar):
        alpha = -alpha
    if not left and not is_op(node, aten.rsub.Scalar):
        return None, vector * alpha
    return None if alpha == 1 else torch.full((1,), alpha, dtype=torch.float64), vector


class _OfAffine(Rule):
    roots = _ROOTS

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A per-channel scale or shift that this rule's neighbors can take up."""
        affine = read_affine(node, program)
        if affine is None:
            return None
        if isinstance(affine, str):
            return self.refuse(node, affine)
        found = self.folds(node, affine, program)
        if found is None or (isinstance(found, Elsewhere) and affine.axis is None):
            return None  # one number added to anything at all is no miss
        if isinstance(found, str):
            return self.refuse(node, found)
        return Match(node, {"folds": found, "x": affine.x})

    @abstractmethod
    def folds(self, node: Node, affine: Affine, program: Program) -> list[Fold] | str | None:
        """The neighbors with their new numbers; a reason, or None where they are of other kinds."""

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Write the neighbors anew and bypass the operator."""
        x = match["x"]
        at = list(match.root.args).index(x)
        for fold in match["folds"]:
            fold.write(rewriter, match.root)
        rewriter.replace(match.root, match.root.args[at])


class ScaleShiftIntoProducer(_OfAffine):
    """``s * layer(x) + t -> layer'(x)``."""

    name: ClassVar[str] = "scale-shift-into-producer"

    def folds(self, node: Node, affine: Affine, program: Program) -> list[Fold] | str:
        """The layer whose output, private to this operator, it scales or shifts."""
        kinds = (LINEAR, CONVOLUTION, NORM)
        layer = layer_before(node, affine.x, affine.axis, program, kinds=kinds)
        if isinstance(layer, str):
            return layer
        fold = layer.scale_outputs(*_wide(affine, layer.channels))
        return fold if isinstance(fold, str) else [fold]


class ScaleShiftIntoConsumers(_OfAffine):
    """``layer(s * x + t) -> layer'(x)``, for each layer that reads it."""

    name: ClassVar[str] = "scale-shift-into-consumers"

    def folds(self, node: Node, affine: Affine, program: Program) -> list[Fold] | str:
        """The layers that read this operator, if nothing else does."""
        layers = layers_after(node, affine.axis, program)
        if isinstance(layers, str):
            return layers
        folds = []
        for layer in layers:
            fold = layer.scale_inputs(*_wide(affine, layer.inputs))
            if isinstance(fold, str):
                return fold
            folds.append(fold)
        return folds


def _wide(affine: Affine, channels: int) -> tuple[Tensor | None, Tensor | None]:
    scale = None if affine.scale is None else affine.scale.expand(channels)
    return scale, None if affine.shift is None else affine.shift.expand(channels)


class ScaleShiftIntoBatchNorm(_OfAffine):
    """``bn(s * x + t) -> bn'(x)``; other norms measure what they normalize, so s would vanish."""

    name: ClassVar[str] = "scale-shift-into-batch-norm"

    def folds(self, node: Node, affine: Affine, program: Program) -> list[Fold] | str | None:
        """The batch norm in evaluation mode that reads this operator, if nothing else does."""
        found = readers(node, affine.axis)
        if not all(is_op(reader, aten.batch_norm.default) for reader, _, _ in found):
            return None
        if len(found) != 1:
            return f"it has {len(found)} users"
        norm, _, at = found[0]
        mean, gamma = (program.constant(argument(norm, r)) for r in ("running_mean", "weight"))
        if argument(norm, "training") or mean is None:
            return "the batch norm after it normalizes with the statistics of the batch"
        if gamma is None and argument(norm, "weight") is not None:
            return "the weight of the batch norm after it is computed, not constant"
        if at not in (None, 1):
            return f"it acts on axis {at} of the batch norm after it, whose channels are axis 1"
        if affine.scale is not None and not bool(affine.scale.all()):
            return "it multiplies by zero, which no mean of the batch norm after it can undo"
        scale, shift = _wide(affine, mean.numel())
        new_mean, new_gamma = apply_before_batch_norm(mean, gamma, scale, shift)
        exact = {"running_mean": (new_mean, mean.dtype)}
        if new_gamma is not None:
            exact["weight"] = (new_gamma, (mean if gamma is None else gamma).dtype)
        fold = rounded_fold(norm, exact)
        return fold if isinstance(fold, str) else [fold]


@dataclass(frozen=True, kw_only=True)
class FoldScaleShift(Pass):
    """Fold per-channel multiplications and additions into the layers and norms around them."""

    name: ClassVar[str] = "fold-scale-shift"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model "
        "Tuning, NeurIPS 2022",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Producers first: that direction is exact at the border, too."""
        rules = (ScaleShiftIntoProducer(), ScaleShiftIntoConsumers(), ScaleShiftIntoBatchNorm())
        return self.apply_rules(program, context, rules)
