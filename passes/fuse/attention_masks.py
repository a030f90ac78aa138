"""Masks of attention: bring them to one tensor, and prove that one is causal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.fuse.attention_reading import Mask, unfolded
from planish.passes.fuse.matching import is_identity, scalar_of, shape_of

_POINTWISE = frozenset(
    {
        aten.eq.Scalar,
        aten.ne.Scalar,
        aten.lt.Scalar,
        aten.le.Scalar,
        aten.gt.Scalar,
        aten.ge.Scalar,
        aten.logical_not.default,
        aten.bitwise_not.default,
        aten.to.dtype,
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.rsub.Scalar,
        aten.masked_fill.Scalar,
        aten.where.ScalarOther,
        aten.unsqueeze.default,
    }
)
_LARGEST = 1 << 24  # elements of a constant mask that are looked at
_HIDDEN = -1e9  # added to a score beside others that are not masked, exp gives exactly 0


def bias_of(masked: Tensor, fill: float) -> Tensor:
    """The additive form of a mask: ``fill`` where ``masked``, 0 elsewhere."""
    return torch.where(masked, fill, 0.0)


def absorbs(fill: float, dtype: torch.dtype) -> bool:
    """Whether adding ``fill`` to a score is the same as setting the score to ``fill``.

    It is where ``fill`` is -inf. A finite one must be so large that a score below 16 vanishes in
    its rounding; only then are rows that are masked everywhere the same.
    """
    return fill < 0 and (math.isinf(fill) or -fill * torch.finfo(dtype).eps / 4 >= 16)


def spans_batch(mask: Mask) -> bool:
    """Whether a mask has one matrix for each of the first dimension of 3-D scores."""
    shape = shape_of(mask.node) or ()
    return len(mask.scores) == 3 and len(shape) == 3 and shape[0] != 1


class MaskBuilder:
    """Emits the one mask operand.

    Args:
        rewriter: with an open site.
        like: what new nodes stand for.
        lead: batch and heads that 3-D scores ``[B * H, L, S]`` fold; None where 3-D scores stand
            for ``[B, 1, L, S]``.
    """

    def __init__(self, rewriter: Rewriter, like: Sequence[Node], lead: tuple[Any, Any] | None):
        self.rewriter, self.like, self.lead = rewriter, like, lead

    def build(self, masks: Sequence[Mask], dtype: torch.dtype) -> Node | None:
        """A Boolean mask (true: attend) where that is exact, else a float one to add."""
        if not masks:
            return None
        if all(mask.kind != "add" and math.isinf(mask.fill) for mask in masks):
            kept = [self._kept(mask) for mask in reversed(masks)]
            return self._join(aten.logical_and.default, kept)
        biases = [self._bias(mask, dtype) for mask in reversed(masks)]
        return self._join(aten.add.Tensor, biases)

    def _join(self, target: Any, nodes: list[Node]) -> Node:  # noqa: ANN401
        total = nodes[0]
        for node in nodes[1:]:
            total = self._call(target, total, node)
        return total

    def _kept(self, mask: Mask) -> Node:
        node = self._aligned(mask)
        return node if mask.kind == "keep" else self._call(aten.logical_not.default, node)

    def _bias(self, mask: Mask, dtype: torch.dtype) -> Node:
        node = self._aligned(mask)
        if mask.kind == "add":
            return node
        values = (0.0, mask.fill) if mask.kind == "keep" else (mask.fill, 0.0)
        bias = self._call(aten.where.Scalar, node, *values)
        if bias.meta["val"].dtype == dtype:
            return bias
        return self._call(aten.to.dtype, bias, dtype)

    def _aligned(self, mask: Mask) -> Node:
        """The mask with rank 2 to 4, broadcasting to ``[B, H, L, S]``."""
        node, shape = mask.node, shape_of(mask.node) or ()
        if len(shape) == 1:
            return self._call(aten.unsqueeze.default, node, 0)
        if not spans_batch(mask):
            return node
        if self.lead is None:
            return self._call(aten.unsqueeze.default, node, 1)
        whole = unfolded(node)
        if whole is not None and (shape_of(whole) or ())[:2] == self.lead:
            return cast(Node, whole)
        return self._call(aten.unflatten.int, node, 0, [-1, self.lead[1]])

    def _call(self, target: Any, *args: Any) -> Node:  # noqa: ANN401
        return self.rewriter.call(target, args, like=self.like)


def is_causal(mask: Mask, program: Program) -> bool:
    """Whether a mask provably hides exactly the keys after each query.

    It must be a leading square block of a constant matrix that is lower triangular.
    """
    shape = shape_of(mask.node) or ()
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-2:] != mask.scores[-2:]:
        return False
    block = leading_block(mask.node, program)
    if block is None or block.dim() < 2 or block.shape[-1] * block.shape[-2] != block.numel():
        return False
    block = block.reshape(block.shape[-2:])
    if mask.kind == "add":
        keep = block == 0
        if not bool((block[~keep] <= _HIDDEN).all()):
            return False
    else:
        if mask.fill > _HIDDEN or block.dtype != torch.bool:
            return False
        keep = block if mask.kind == "keep" else ~block
    return bool(torch.equal(keep, torch.ones_like(keep, dtype=torch.bool).tril()))


def leading_block(node: Any, program: Program) -> Tensor | None:  # noqa: ANN401
    """A constant of which ``node`` is a leading block along its last two dimensions.

    Slices that start at 0 are stepped over, whatever their end; what works on each element alone
    is computed on the whole constant. Then a leading block of a lower triangle is one itself.
    """
    constant = program.constant(node)
    if constant is not None:
        return constant if constant.numel() <= _LARGEST else None
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    source = node.args[0] if node.args else None
    if is_identity(node):
        return leading_block(source, program)
    if is_op(node, aten.slice.Tensor):
        from_start = argument(node, "start") in (0, None) and argument(node, "step") == 1
        return leading_block(source, program) if from_start else None
    if is_op(node, aten.expand.default):
        same = (shape_of(source) or ())[-2:] == (shape_of(node) or ())[-2:]
        return leading_block(source, program) if same else None
    if node.target not in _POINTWISE:
        return None
    args = [_operand(value, program) for value in node.args]
    tensors = [value.shape[-2:] for value in args if isinstance(value, Tensor)]
    plain = not any(isinstance(value, Node) for value in node.kwargs.values())
    if not plain or any(value is None for value in args) or len(set(tensors)) > 1:
        return None
    return node.target(*args, **node.kwargs)  # type: ignore[no-any-return]


def _operand(value: Any, program: Program) -> Any:  # noqa: ANN401
    if not isinstance(value, Node):
        return value
    number = scalar_of(value, program)
    return leading_block(value, program) if number is None else number
