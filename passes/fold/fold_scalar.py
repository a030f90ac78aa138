"""Fold a multiplication by one number into the weights, or the attention, around it.

Rewrite:
    c * layer(x; W, b)           ->  layer(x; c W, c b)
    layer(c * x; W, b)           ->  layer(x; c W, b)
    sdpa(c * q, k, v, scale=a)   ->  sdpa(q, k, v, scale=c a)        likewise for c * k
    for the operators c * y, y / c' (c = 1 / c') and -y (c = -1).
Shapes:       any; c is one number. The layer is a linear, a convolution, or (before the number) a
              layer, group, batch, instance or RMS norm. q, k: [..., L, E].
Requires:     c constant; nothing else reads what lies between, which may only move elements, as
              the ``view`` and ``transpose`` that split heads do; W not shared. Attention needs
              c > 0, and E constant where its scale is the default, 1 / sqrt(E).
Contract:     exact: computed in float64, one rounding per number.
Cost:         one operator less.
Fails:        never; numbers that the weight's type cannot hold are a refusal.
Source:       linearity; Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2.1
              for where the scale of attention comes from.
"""

from __future__ import annotations

import math
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
from planish.passes.fold._axes import describe, readers, same_type, value
from planish.passes.fold._find import Elsewhere, layer_before, layers_after
from planish.passes.fold._layers import CONVOLUTION, LINEAR, NORM, Fold, with_arguments

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_ROOTS = frozenset(
    {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default}
)


def attention_scale(factor: float, scale: float | None, width: int) -> float:
    """The ``scale`` of the attention whose query or key is not multiplied by ``factor`` anymore.

    Args:
        factor: c.
        scale: the attention's own; None stands for ``1 / sqrt(width)``.
        width: E, the size of the last axis of query and key.
    """
    return factor * (1 / math.sqrt(width) if scale is None else scale)


def read_factor(node: Node, program: Program) -> tuple[Node, float] | None:
    """``(y, c)`` where a node computes ``c * y`` in y's own type and sizes; else None."""
    first = argument(node, "self")
    second = -1.0 if is_op(node, aten.neg.default) else argument(node, "other")
    if is_op(node, aten.mul.Tensor) and _number(first, program) is not None:
        first, second = second, first
    number = _number(second, program)
    if number is None or not isinstance(first, Node) or _number(first, program) is not None:
        return None
    if not value(first).is_floating_point() or not same_type(first, node):
        return None
    if is_op(node, aten.div.Tensor, aten.div.Scalar):
        number = 1 / number if number else math.inf
    return first, number


def _number(operand: object, program: Program) -> float | None:
    if isinstance(operand, (int, float)):
        return float(operand)
    tensor = program.constant(operand)
    real = tensor is not None and tensor.numel() == 1 and not tensor.is_complex()
    return float(tensor) if tensor is not None and real else None


class _OfFactor(Rule):
    roots = _ROOTS

    def factor(self, node: Node, program: Program) -> tuple[Node, float] | Refusal | None:
        """What is multiplied and by what; a refusal where the number is not finite."""
        found = read_factor(node, program)
        if found is None or math.isfinite(found[1]):
            return found
        return self.refuse(node, f"it multiplies by {found[1]}")

    def answer(self, node: Node, x: Node, found: list[Fold | str] | str) -> Match | Refusal | None:
        """A match, unless a reason is among what was found."""
        reasons = [found] if isinstance(found, str) else [f for f in found if isinstance(f, str)]
        if not reasons:
            return Match(node, {"folds": found, "x": x})
        # A factor that has no layer near it was not to be expected to fold.
        return None if isinstance(reasons[0], Elsewhere) else self.refuse(node, reasons[0])

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Write the neighbors anew and bypass the operator."""
        at = list(match.root.args).index(match["x"])
        for fold in match["folds"]:
            fold.write(rewriter, match.root)
        rewriter.replace(match.root, match.root.args[at])


class ScalarIntoProducer(_OfFactor):
    """``c * layer(x) -> layer'(x)``."""

    name: ClassVar[str] = "scalar-into-producer"

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A factor of a layer's output, which only it reads."""
        found = self.factor(node, program)
        if found is None or isinstance(found, Refusal):
            return found
        x, number = found
        layer = layer_before(node, x, None, program, kinds=(LINEAR, CONVOLUTION, NORM))
        if isinstance(layer, str):
            return self.answer(node, x, layer)
        return self.answer(node, x, [layer.scale_outputs(_all(number, layer.channels), None)])


class ScalarIntoConsumers(_OfFactor):
    """``layer(c * x) -> layer'(x)``, for each layer that reads it."""

    name: ClassVar[str] = "scalar-into-consumers"

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A factor of what only layers read; padded zeros are zeros times any factor."""
        found = self.factor(node, program)
        if found is None or isinstance(found, Refusal):
            return found
        x, number = found
        layers = layers_after(node, None, program)
        if isinstance(layers, str):
            return self.answer(node, x, layers)
        return self.answer(
            node, x, [layer.scale_inputs(_all(number, layer.inputs), None) for layer in layers]
        )


class ScalarIntoAttention(_OfFactor):
    """``sdpa(c * q, k, v) -> sdpa(q, k, v, scale=...)``."""

    name: ClassVar[str] = "scalar-into-attention"

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A factor of the query or of the key of one attention."""
        found = self.factor(node, program)
        users = readers(node, None)
        attentions = [user for user, _, _ in users if is_op(user, _ATTENTION)]
        if found is None or isinstance(found, Refusal) or not attentions:
            return found if isinstance(found, Refusal) else None
        user, operand, _ = users[0]
        roles = [r for r in ("query", "key", "value", "attn_mask") if argument(user, r) is operand]
        if len(users) != 1:
            return self.refuse(node, f"it has {len(users)} users, not {describe(user)} alone")
        if len(roles) != 1 or roles[0] not in ("query", "key"):
            return self.refuse(node, f"{describe(user)} reads it as {' and '.join(roles)}")
        x, number = found
        width = value(operand).shape[-1]
        scale = argument(user, "scale")
        if not isinstance(scale, float) and (scale is not None or not isinstance(width, int)):
            return self.refuse(node, f"the scale of {describe(user)} is not constant")
        if number <= 0:
            return self.refuse(node, f"the factor {number} is not positive, as a scale must be")
        return Match(node, {"x": x, "user": user, "scale": attention_scale(number, scale, width)})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Give the attention its new scale and bypass the factor."""
        node, user = match.root, match["user"]
        rewriter.insert_before(user)
        args, kwargs = with_arguments(user, {"scale": match["scale"]})
        new = rewriter.call(user.target, args, kwargs, like=(user, node))
        rewriter.replace(user, new)
        rewriter.replace(node, match["x"])


def _all(number: float, channels: int) -> Tensor:
    return torch.full((channels,), number, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class FoldScalar(Pass):
    """Fold multiplications by one number into weights and into the scale of attention."""

    name: ClassVar[str] = "fold-scalar"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Attention first: there the factor costs nothing and no weight is copied."""
        rules = (ScalarIntoAttention(), ScalarIntoProducer(), ScalarIntoConsumers())
        return self.apply_rules(program, context, rules)
