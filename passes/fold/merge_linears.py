"""Merge two layers with nothing between them into one, where that is less work.

Rewrite:
    linear(linear(x; W, b); V, c)  ->  linear(x; V W, V b + c)
    conv1x1(conv(x; W, b); V, c)   ->  conv(x; V W, V b + c)
    conv(conv1x1(x; W, b); V, c)   ->  conv(x; V W, V b + c)     b summed over the kernel, too
    V W contracts the channels between: (V W)[g,o,i,..] = sum_h V[g,o,h,..] W[g,h,i,..]
Shapes:       linear: W [H, I], V [O, H]; convolution in G groups: W [H, I/G, *k], V [O, H/G, *l],
              of which k or l is all 1 with stride 1 and no padding.
Requires:     constant weights, not shared, none typed sparse; nothing else reads the first layer;
              the same number of groups; the merged weight smaller than the two together. Where
              the second convolution pads, b = 0, for the padded zeros come after it.
Contract:     exact: the product is computed in float64 and rounded once.
Cost:         one operator less, and H (I + O) - I O multiplications per position less.
Fails:        never; numbers that the weight's type cannot hold are a refusal.
Source:       associativity; Guo et al., ExpandNets: Linear Over-parameterization to Train Compact
              Convolutional Networks, NeurIPS 2020 (how expanded layers are contracted again).
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
from planish.passes.fold._axes import describe
from planish.passes.fold._find import read_layer
from planish.passes.fold._layers import LAYERS, Layer


def merged(
    first: Tensor, first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows and bias of ``second(first(x))``, in float64.

    Args:
        first: ``[G, H/G, I/G, *k]`` float64.
        first_bias: ``[H]``; None stands for zeros.
        second: ``[G, O/G, H/G, *l]`` float64; k or l has one element.
        second_bias: ``[O]``; None stands for zeros.

    Returns:
        ``[G, O/G, I/G, *max(k, l)]``, and ``[O]`` or None where both biases are None.
    """
    groups, hidden, inputs, *first_kernel = first.shape
    _, outputs, _, *second_kernel = second.shape
    wide = [max(k, s) for k, s in zip(first_kernel, second_kernel, strict=True)]
    a, b = first.reshape(*first.shape[:3], -1), second.reshape(*second.shape[:3], -1)
    product = torch.einsum("gohl,ghik->goilk", b, a)
    rows = product.reshape(groups, outputs, inputs, *wide)
    bias = None if second_bias is None else second_bias.double()
    if first_bias is not None:
        carried = b.sum(3) @ first_bias.double().reshape(groups, hidden, 1)
        bias = carried.flatten() if bias is None else carried.flatten() + bias
    return rows, bias


class MergeLayers(Rule):
    """``second(first(x)) -> merged(x)``."""

    name: ClassVar[str] = "merge-layers"
    roots = LAYERS

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Two layers of which one is pointwise, and which are smaller as one."""
        x = node.args[0]
        assert isinstance(x, Node)
        first = read_layer(x, program) if is_op(x, *LAYERS) else None
        second = read_layer(node, program) if first is not None else None
        if first is None or second is None:
            return None
        for layer in (first, second):
            if isinstance(layer, str):
                return self.refuse(node, layer)
        assert isinstance(first, Layer)
        assert isinstance(second, Layer)
        reason = _mismatch(first, second) or _sparse(first, second, program)
        if reason is not None:
            return self.refuse(node, reason)
        base, other = (first, second) if second.is_pointwise else (second, first)
        if not other.is_pointwise:
            return self.refuse(node, f"neither it nor {describe(first.node)} is pointwise")
        if base is second and second.pads and first.bias is not None and bool(first.bias.any()):
            return self.refuse(node, f"it pads with zeros, not with the bias of {first.node.name}")
        before, after = _weights(first, second)
        if after >= before:
            return self.refuse(node, _cost(before, after))
        fold = base.fold(*merged(first.rows, first.bias, second.rows, second.bias))
        if isinstance(fold, str):
            return self.refuse(node, fold)
        detail = f"{before} weights become {after}"
        return Match(node, {"fold": fold, "first": first.node, "detail": detail})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Write one layer that reads what the first read."""
        first, second = match["first"], match.root
        like = second if match["fold"].node is first else first
        new = match["fold"].write(rewriter, like, x=first.args[0])
        if not second._erased:
            rewriter.replace(second, new)
        rewriter.note(match["detail"])


def _mismatch(first: Layer, second: Layer) -> str | None:
    """Why two layers, whatever their sizes, are not one."""
    # What reads only its sizes may stay, but not what has its shape: the channels change.
    users = [u for u in first.node.users if not is_op(u, torch.ops.aten.sym_size.int)]
    if len(users) != 1:
        return f"{describe(first.node)} has {len(users)} users"
    if (first.kind, first.axis) != (second.kind, second.axis):
        return f"{describe(first.node)} has its channels on another axis"
    if first.groups != second.groups:
        return f"it has {second.groups} groups and {describe(first.node)} has {first.groups}"
    for layer in (first, second):
        if layer.shared_with is not None:
            return f"a weight is shared with {describe(layer.shared_with)}"
    return None


def _sparse(first: Layer, second: Layer, program: Program) -> str | None:
    """Why two layers stay two: a product of matrices has no zeros where its factors had some."""
    for layer in (first, second):
        name = str(getattr(argument(layer.node, "weight"), "target", ""))
        if name in program.layouts:
            return f"@{name} is {program.layouts[name]}, which the merged weight would not be"
    return None


def _cost(before: int, after: int) -> str:
    verdict = "would cost more" if after > before else "would save nothing"
    return f"it {verdict}: {after} weights instead of {before}"


def _weights(first: Layer, second: Layer) -> tuple[int, int]:
    """Number of weights of two layers, and of the one they would become."""
    assert first.weight is not None
    assert second.weight is not None
    wide = math.prod(max(k, s) for k, s in zip(first.kernel, second.kernel, strict=True))
    after = first.inputs * second.channels // first.groups * wide
    return first.weight.numel() + second.weight.numel(), after


@dataclass(frozen=True, kw_only=True)
class MergeLinears(Pass):
    """Merge linears, and pointwise convolutions with their neighbors, where that saves work."""

    name: ClassVar[str] = "merge-linears"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Guo et al., ExpandNets: Linear Over-parameterization to Train Compact Convolutional "
        "Networks, NeurIPS 2020",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chains of three and more shrink pair by pair."""
        return self.apply_rules(program, context, (MergeLayers(),))
