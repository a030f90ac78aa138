"""Recover layer norm and RMS norm from the operators they were written out in.

Rewrite:
    (x - m) / sqrt(v + eps) * w + b        ->  layer_norm(x, w, b, eps)
    x / sqrt(mean(x^2) + eps) * w          ->  rms_norm(x, w, eps)
    m = mean(x),  v = mean((x - m)^2) or the biased variance of x, over the last dimensions;
    w and b optional;  / sqrt(.) may be * rsqrt(.), * reciprocal(sqrt(.)) or * pow(., -1/2)
Shapes:       x: [..., N1..Nk];  m, v: [..., 1..1];  w, b: exactly [N1..Nk], constant or computed
Requires:     statistics over the last dimensions, kept, of static size; eps a number inside the
              root; variance divided by n; nothing in between read elsewhere. A cast to float32
              before and back after is taken in only where both are there. A mean square taken in
              float16 is refused: it overflows where the operator does not.
Contract:     exact: the operator computes the same in float32 or wider, and rounds less often
              where the written-out form worked in bfloat16.
Cost:         4 to 9 operators become one.
Failures:     none; what does not fit is refused.
Source:       Ba, Kiros, Hinton, "Layer Normalization", 2016, eq. 3; Zhang, Sennrich, "Root Mean
              Square Layer Normalization", NeurIPS 2019, eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import aten
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fuse.matching import (
    dtype_of,
    has_other_user,
    normal_dims,
    outside_user,
    shape_of,
)
from planish.passes.fuse.norm_reading import Norm, grow, quotients, read


def written_out(
    x: Tensor, dims: int, eps: float, weight: Tensor | None, bias: Tensor | None, centered: bool
) -> Tensor:
    """Both norms by their definition.

    Args:
        x: ``[..., N1..Nk]``.
        dims: k, how many of the last dimensions are normalized.
        eps: added to the mean square.
        weight: ``[N1..Nk]`` or None.
        bias: likewise.
        centered: layer norm; otherwise RMS norm.
    """
    over = list(range(-dims, 0))
    if centered:
        x = x - x.mean(over, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(over, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


class WholeNorm(Rule):
    """One operator for a norm written out."""

    name = "whole-norm"
    roots = frozenset({aten.mul.Tensor, aten.div.Tensor})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Read the quotient at ``node``, then what scales and shifts it."""
        for numerator, root, power, seen in quotients(node):
            norm = read(numerator, root, power, seen, program)
            if isinstance(norm, str):
                return self.refuse(node, norm)
            if norm is not None:
                return self._guarded(node, norm)
        return None

    def _guarded(self, node: Node, norm: Norm) -> Match | Refusal:
        shape = shape_of(norm.x)
        assert shape is not None  # it is an operand of a subtraction or multiplication
        rank = len(shape)
        dims = normal_dims(norm.dims, rank)
        if not norm.keepdim:
            return self.refuse(node, "the statistics do not keep the reduced dimension")
        if dims != tuple(range(rank - len(dims), rank)):
            return self.refuse(node, f"it normalizes over {list(dims)}, not the last dimensions")
        sizes = shape[rank - len(dims) :]
        if not all(isinstance(size, int) for size in sizes):
            return self.refuse(node, "the size of a normalized dimension is dynamic")
        if norm.dtype == torch.float16:
            return self.refuse(node, "its mean square is in float16, which overflows above 256")
        end = grow(node, norm, sizes)
        if dtype_of(end) != dtype_of(norm.x):
            return self.refuse(node, "the operands are cast to another dtype on one side only")
        reader = outside_user(norm.seen, end)
        if reader is not None:
            return self.refuse(node, has_other_user(reader, "an intermediate result"))
        return Match(end, {"norm": norm, "sizes": list(sizes)})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Put the operator in place of the last scale or shift."""
        norm, sizes = match["norm"], match["sizes"]
        like = [match.root, *norm.seen]
        if norm.centered:
            args = [norm.x, sizes, norm.weight, norm.bias, norm.eps]
            new = rewriter.call(aten.layer_norm.default, args, like=like)
        else:
            args = [norm.x, sizes, norm.weight, norm.eps]
            new = rewriter.call(aten.rms_norm.default, args, like=like)
        rewriter.replace(match.root, new)


@dataclass(frozen=True, kw_only=True)
class RecoverNorms(Pass):
    """Recover ``layer_norm`` and ``rms_norm`` from the operators they were written out in."""

    name: ClassVar[str] = "recover-norms"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Ba, Kiros, Hinton, Layer Normalization, 2016, equation 3",
        "Zhang, Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, equation 4",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Recover every norm."""
        return self.apply_rules(program, context, [WholeNorm()])
