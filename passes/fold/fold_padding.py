"""Fold explicit padding into the padding of the convolution or pooling after it.

Rewrite:
    conv(pad(x, p, value=0); padding=q)          ->  conv(x; padding=p+q)
    max_pool(pad(x, p, value=-inf); padding=q)   ->  max_pool(x; padding=p+q)
    avg_pool(pad(x, p, value=0); padding=q)      ->  avg_pool(x; padding=p+q, counting padding)
    conv(x; padding="same")                      ->  conv(x; padding=d(k-1)/2)
Shapes:       x: [B, C, ...] or [C, ...], with 1 to 3 spatial axes; p, q: one amount per axis,
              the same before and after; k: kernel sizes; d: dilations.
Requires:     constant amounts, none negative, none on the channels; nothing else reads the padded
              value; of a pooling, at most half its kernel, and no ceil_mode. An average pool with
              padding of its own must count it already.
Contract:     exact; no number changes.
Cost:         one operator and one copy of x less.
Fails:        never.
Source:       the operators' definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir.ops import argument, is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fold._axes import describe, value
from planish.passes.fold._layers import CONVOLUTIONS, with_arguments

aten = torch.ops.aten

_NAMED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_CONVOLUTIONS = frozenset({*CONVOLUTIONS, aten.convolution.default}) - _NAMED.keys()
# Operator -> number of spatial axes.
_MAX_POOLS: dict[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}
_AVG_POOLS: dict[Any, int] = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
}
_SPATIAL = {**CONVOLUTIONS, **_MAX_POOLS, **_AVG_POOLS}


def symmetric(pads: Sequence[Any], spatial: int) -> tuple[int, ...] | str:
    """Amounts per spatial axis, first axis first.

    Args:
        pads: as ``torch.nn.functional.pad`` takes them: before and after, last axis first.
        spatial: how many axes may be padded.

    Returns:
        One amount per axis, or why there is none.
    """
    if not all(isinstance(p, int) for p in pads):
        return "the amounts are computed, not constant"
    if any(p < 0 for p in pads):
        return "a negative amount crops"
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    if any(pair != (0, 0) for pair in pairs[spatial:]):
        return "it pads more than the spatial axes"
    pairs = (pairs + [(0, 0)] * spatial)[:spatial]
    for axis, (before, after) in enumerate(reversed(pairs)):
        if before != after:
            return f"asymmetric: {before} before and {after} after on spatial axis {axis}"
    return tuple(before for before, _ in reversed(pairs))


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...] | str:
    """Amounts per axis that keep the size at stride 1; a reason where they are not symmetric."""
    wide = _widen(dilation, len(kernel))
    totals = [d * (k - 1) for k, d in zip(kernel, wide, strict=True)]
    for axis, total in enumerate(totals):
        if total % 2:
            return f"asymmetric: {total // 2} before and {total // 2 + 1} after on axis {axis}"
    return tuple(total // 2 for total in totals)


class PaddingIntoConsumer(Rule):
    """``conv(pad(x)) -> conv'(x)``, and likewise for pooling."""

    name: ClassVar[str] = "padding-into-consumer"
    roots = frozenset({aten.pad.default, aten.constant_pad_nd.default})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Symmetric constant padding read by one operator that can pad by itself."""
        if len(node.users) != 1:
            return self.refuse(node, f"it has {len(node.users)} users")
        user = next(iter(node.users))
        if not is_op(user, *_CONVOLUTIONS, *_MAX_POOLS, *_AVG_POOLS) or user.args[0] is not node:
            return self.refuse(node, f"it is read by {describe(user)}, which cannot take it over")
        if is_op(node, aten.pad.default) and argument(node, "mode") != "constant":
            return self.refuse(node, f"it pads by {argument(node, 'mode')}, not by a constant")
        fill = argument(node, "value") or 0
        needed = float("-inf") if user.target in _MAX_POOLS else 0
        if fill != needed:
            return self.refuse(node, f"it pads with {fill}, and {describe(user)} with {needed}")
        own = argument(user, "padding")
        spatial = _SPATIAL.get(user.target) or len(own)
        pads = symmetric(argument(node, "pad"), spatial)
        if isinstance(pads, str):
            return self.refuse(node, pads)
        own = _widen(own, spatial)
        total = tuple(p + q for p, q in zip(pads, own, strict=True))
        blocked = _blocked(user, own, total)
        if blocked is not None:
            return self.refuse(node, blocked)
        return Match(node, {"user": user, "padding": list(total)})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Give the consumer the padding and the unpadded value."""
        node, user = match.root, match["user"]
        changed: dict[str, Argument] = {"padding": match["padding"]}
        if user.target in _AVG_POOLS:
            changed["count_include_pad"] = True
        rewriter.insert_before(user)
        args, kwargs = with_arguments(user, changed)
        new = rewriter.call(user.target, (node.args[0], *args[1:]), kwargs, like=(user, node))
        rewriter.replace(user, new)


class NumberPadding(Rule):
    """``conv(x; padding="same") -> conv(x; padding=[1, 1])``: in numbers, as all else reads it."""

    name: ClassVar[str] = "number-padding"
    roots = frozenset(_NAMED)

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """A convolution whose padding is a word that stands for symmetric amounts."""
        weight = argument(node, "weight")
        kernel = tuple(value(weight).shape[2:])
        if argument(node, "padding") == "valid":
            return Match(node, {"padding": [0] * len(kernel)})
        pads = same_padding(kernel, argument(node, "dilation"))
        if isinstance(pads, str):
            return self.refuse(node, pads)
        return Match(node, {"padding": list(pads)})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Call the overload that takes numbers; the arguments have the same places."""
        node = match.root
        args, kwargs = with_arguments(node, {"padding": match["padding"]})
        numbered = _NAMED[node.target]  # type: ignore[index]
        new = rewriter.call(numbered, args, kwargs, like=node)
        rewriter.replace(node, new)


def _widen(amounts: Sequence[int], spatial: int) -> tuple[int, ...]:
    """One amount per axis, where torch also takes one for all."""
    return tuple(amounts) * spatial if len(amounts) == 1 else tuple(amounts)


def _blocked(user: Node, own: tuple[int, ...], total: tuple[int, ...]) -> str | None:
    """Why an operator cannot take over more padding."""
    if is_op(user, aten.convolution.default):
        return "a transposed convolution's padding crops" if argument(user, "transposed") else None
    if is_op(user, *_CONVOLUTIONS):
        return None
    if argument(user, "ceil_mode"):
        return f"the size that ceil_mode gives {describe(user)} depends on who pads"
    kernel = _widen(argument(user, "kernel_size"), len(total))
    if any(2 * p > k for p, k in zip(total, kernel, strict=True)):
        return f"{describe(user)} can pad by half of its kernel {list(kernel)} at most"
    if user.target in _AVG_POOLS and any(own) and not argument(user, "count_include_pad"):
        return f"{describe(user)} does not count its own padding, and would count this"
    return None


@dataclass(frozen=True, kw_only=True)
class FoldPadding(Pass):
    """Fold explicit padding into convolutions and poolings; write their padding as numbers."""

    name: ClassVar[str] = "fold-padding"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Words become numbers first, so that amounts can be added to them."""
        return self.apply_rules(program, context, (NumberPadding(), PaddingIntoConsumer()))
