"""Recover scaled dot product attention from the products, masks and softmax it was written as.

Rewrite:
    softmax(c q k^T + m) v  ->  scaled_dot_product_attention(q, k, v, attn_mask=m, scale=c)
    c may stand before the product, after it, or on q and k; m may be added, or be a condition of
    masked_fill or where, or several of these; casts of the softmax to float32 may be there.
Shapes:       q: [B, H, L, E];  k: [B, H, S, E];  v: [B, H, S, F];  m: broadcasts to [B, H, L, S].
              Three dimensions: the 4-D tensors they are views of, else [B, 1, L, E].
Requires:     one batch, one number of heads and one dtype; scores and weights read nowhere else;
              no operator between softmax and the product with v.
Contract:     exact. A mask that fills with -inf becomes Boolean; one that fills with a finite
              number is added, which is the same as filling where the number swallows the score
              (always where a row keeps a key; elsewhere for scores below eps |number| / 4, which
              is 30 for -1e9 in float32). A row masked everywhere with -inf is NaN as written and
              0 in torch's operator: Equal asks nothing where the reference is NaN.
Cost:         6 to 12 operators become one; no scores in memory where the runtime fuses it.
Failures:     none; what does not fit is refused.
Source:       Vaswani et al., "Attention Is All You Need", NeurIPS 2017, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fuse.attention_masks import MaskBuilder, absorbs, is_causal, spans_batch
from planish.passes.fuse.attention_reading import (
    PRODUCTS,
    Attention,
    Operand,
    plain,
    read,
    same_dtype,
    unfolded,
)
from planish.passes.fuse.matching import dtype_of, has_other_user, outside_user, shape_of


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention by its definition.

    Args:
        q: ``[..., L, E]``.
        k: ``[..., S, E]``.
        v: ``[..., S, F]``.
        mask: ``[..., L, S]``, true where a query sees a key, or what is added to the scores.
        scale: multiplies the scores.
    """
    scores = scale * q @ k.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ v


class Layout(NamedTuple):
    """The operands, and how their dimensions become four.

    Attributes:
        query: as it is used.
        key: likewise, and whether it is already ``[..., S, E]``.
        value: likewise.
        lead: batch and heads where 3-D operands were found to be views of 4-D ones.
        rank: dimensions the operands have.
    """

    query: Node
    key: Operand
    value: Node
    lead: tuple[Any, Any] | None
    rank: int


class WholeAttention(Rule):
    """One operator for attention written out."""

    name = "whole-attention"
    roots = PRODUCTS

    def __init__(self, causal: bool):
        self.causal = causal

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Read backwards from the product with the values."""
        found = read(node, program)
        if found is None:
            return None
        if isinstance(found, str):
            return self.refuse(node, found)
        if not same_dtype(found, node):
            return self.refuse(node, "q, k, v and the mask differ in dtype")
        query, key = plain(found.query, program), plain(found.key, program)
        if query.transposed:
            query = Operand(found.query, False, 1.0)
        layout = _layout(query, key, found, node, program)
        if isinstance(layout, str):
            return self.refuse(node, layout)
        reader = outside_user(found.seen, node)
        if reader is not None:
            return self.refuse(node, has_other_user(reader, "the scores or the weights"))
        causal = self.causal and len(found.masks) == 1 and is_causal(found.masks[0], program)
        if not causal:
            for mask in found.masks:
                if mask.kind != "add" and not absorbs(mask.fill, _dtype(node)):
                    why = "too near to real scores to be added instead"
                    return self.refuse(node, f"masked scores are set to {mask.fill:g}, {why}")
        scale = found.scale * query.factor * layout.key.factor
        parts = {"layout": layout, "found": found, "causal": causal, "scale": scale}
        return Match(node, parts)

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Bring the operands to four dimensions, call the operator, and go back."""
        layout, found, node = match["layout"], match["found"], match.root
        like = [node, *found.seen]

        def call(target: Any, *args: Any) -> Node:  # noqa: ANN401
            return rewriter.call(target, args, like=like)

        key = layout.key.node
        if not layout.key.transposed:
            key = _transpose(key, call)
        operands = [layout.query, key, layout.value]
        if layout.rank == 3:
            operands = [call(aten.unsqueeze.default, operand, 1) for operand in operands]
        masks = [] if match["causal"] else found.masks
        mask = MaskBuilder(rewriter, like, layout.lead).build(masks, _dtype(node))
        new = rewriter.call(
            aten.scaled_dot_product_attention.default,
            [*operands, mask, 0.0, match["causal"]],
            {"scale": match["scale"]},
            like=like,
        )
        if layout.rank == 3:
            new = call(aten.squeeze.dim, new, 1)
        elif len(shape_of(node) or ()) == 3:
            new = call(aten.flatten.using_ints, new, 0, 1)
        rewriter.replace(node, new)


def _dtype(node: Node) -> torch.dtype:
    dtype = dtype_of(node)
    assert dtype is not None  # a product of tensors
    return dtype


def _transpose(key: Node, call: Any) -> Node:  # noqa: ANN401
    """``[..., E, S] -> [..., S, E]``, as one permutation where there is one already."""
    if not is_op(key, aten.permute.default):
        return call(aten.transpose.int, key, -2, -1)  # type: ignore[no-any-return]
    dims = list(argument(key, "dims"))
    return call(aten.permute.default, key.args[0], [*dims[:-2], dims[-1], dims[-2]])  # type: ignore[no-any-return]


def _layout(
    query: Operand, key: Operand, found: Attention, root: Node, program: Program
) -> Layout | str:
    """How the operands become 4-D, or why they do not."""
    ranks = [len(shape_of(n) or ()) for n in (query.node, key.node, found.value)]
    views = [*(mask.scores for mask in found.masks), shape_of(found.weights)]
    views.append(shape_of(root.args[0]))
    layout: Layout | str = f"q, k and v have {ranks} dimensions, not 3 or 4"
    if ranks == [4, 4, 4]:
        layout = Layout(query.node, key, found.value, None, 4)
    elif ranks[:2] == [3, 3] and ranks[2] in (3, 4):
        layout = _unfold(query, key, found.value, program)
        if isinstance(layout, str) and ranks[2] == 3:
            layout = Layout(query.node, key, found.value, None, 3)
    if isinstance(layout, str):
        return layout
    shapes = [shape_of(n) or () for n in (layout.query, layout.key.node, layout.value)]
    if len({shape[:-2] for shape in shapes}) > 1:
        return "q, k and v differ in batch or heads"
    keys = shapes[2][-2]
    allowed = [(*shapes[0][:-1], keys), (*(shape_of(query.node) or ())[:-1], keys)]
    if any(view not in allowed for view in views):
        return "the scores are viewed in another shape"
    if any(not shape_of(mask.node) for mask in found.masks):
        return "what is added to the scores is a number"
    folds = layout.lead is not None and not isinstance(layout.lead[1], int)
    if folds and any(spans_batch(mask) for mask in found.masks):
        return "a mask folds batch and heads, and the number of heads is dynamic"
    return layout


def _unfold(query: Operand, key: Operand, value: Node, program: Program) -> Layout | str:
    """The 4-D tensors behind 3-D ones."""
    whole_query, whole_key = unfolded(query.node), unfolded(key.node)
    whole_value = value if len(shape_of(value) or ()) == 4 else unfolded(value)
    if whole_query is None or whole_key is None or whole_value is None:
        return "q, k and v fold batch and heads in different ways"
    inner = plain(whole_key, program)
    flipped = key.transposed != inner.transposed
    lead = (shape_of(whole_query) or ())[:2]
    whole = Operand(inner.node, flipped, key.factor * inner.factor)
    return Layout(whole_query, whole, whole_value, (lead[0], lead[1]), 4)


@dataclass(frozen=True, kw_only=True)
class RecoverAttention(Pass):
    """Recover ``scaled_dot_product_attention`` from attention that was written out.

    Attributes:
        causal: turn a mask that provably is a causal one into ``is_causal=True``.
    """

    name: ClassVar[str] = "recover-attention"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Vaswani et al., Attention Is All You Need, NeurIPS 2017, equation 1",
    )

    causal: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Recover every attention."""
        return self.apply_rules(program, context, [WholeAttention(self.causal)])
