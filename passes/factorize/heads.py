"""Attention heads whose query and key, or value and output, share fewer dimensions.

Rewrite:
    softmax(s (A x)^T (B y)) (V y)  ->  the same with r of a head's h rows left in A, B and in V
Shapes:       A: [heads*h, I] -> [heads*r, I], B and V likewise; the output's weight loses columns.
Requires:     scaled_dot_product_attention whose operands are linears, split into heads.
Contract:     lossy; s stays what it was, and is written down where it followed from the width.
Failures:     rotary positions or norms between a projection and the attention, one weight for
              several projections, shared weights: refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import argument, is_op
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.factorize.factors import Moments
from planish.passes.factorize.head_sites import HeadProduct, RefusedError, scores_of, values_of
from planish.passes.factorize.head_weights import Weights
from planish.passes.factorize.products import (
    Projections,
    Seen,
    bias_of_mean,
    refitted,
    turn_scores,
    turn_values,
)
from planish.passes.factorize.ranks import rounded
from planish.passes.factorize.sequence import moments
from planish.passes.observe.feeding import required
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.cut import cut
from planish.passes.prune.groups import Group
from planish.passes.quantize.where import ATTENTION, Where
from planish.passes.rounding.lockstep import Lockstep

RULE = "factor-heads"


def factor_heads(
    rewriter: Rewriter,
    context: PassContext,
    *,
    keep: float,
    multiple: int = 8,
    calibrated: bool = True,
    absorb: bool = True,
    padding_mask: str = "",
    where: Where,
) -> tuple[list[str], list[Refusal]]:
    """Take dimensions out of heads, in both products of every attention.

    Args:
        rewriter: of the program; it is whole again after ``finish()``.
        context: holds the calibration.
        keep: share of the dimensions of a head that stay.
        multiple: dimensions that stay are a multiple of it, where there is one that is no more.
        calibrated: errors count as the calibration inputs make them, else all inputs alike.
        absorb: the output's bias takes up the mean of the error; calibrated only.
        padding_mask: input that is 0 for padding, or "".
        where: a choice among the attention operators.

    Returns:
        Names of the weights that were made smaller, and what was refused.

    Raises:
        RequirementError: calibration is wanted and there is none.
    """
    program = rewriter.program
    refusals: list[Refusal] = []
    found: list[HeadProduct] = []
    groups, _ = find_groups(program)
    for node in program.operators:
        if not is_op(node, ATTENTION) or not where.takes(node):
            continue
        for find in (scores_of, values_of):
            try:
                found.append(find(program, node, groups))
            except RefusedError as error:
                refusals.append(Refusal(RULE, node.name, str(error), source_line(node)))
    seen = _read(program, found, context, padding_mask) if calibrated else {}
    kept: dict[Group, Tensor] = {}
    names: list[str] = []
    for product in found:
        rank = rounded(keep * product.width, multiple, product.width)
        node = product.attention
        if rank >= product.width:
            why = f"{product.group.name}: no number of dimensions is less"
            refusals.append(Refusal(RULE, node.name, why, source_line(node)))
            continue
        with rewriter.site(RULE, node) as allowed:
            if allowed:
                both = (product.first, product.second)
                names += [str(argument(linear, "weight").target) for linear in both]
                turned = _turn(rewriter, product, rank, seen, absorb=absorb)
                kept[turned] = torch.arange(rank)
    cut(rewriter, kept)
    return names, refusals


def _read(
    program: Program, found: Sequence[HeadProduct], context: PassContext, padding_mask: str
) -> dict[Node, Moments]:
    """What queries, keys and outputs read, in the program as it is."""
    required(context.calibration)
    assert context.calibration is not None
    wanted = {linear for p in found for linear in (p.first, p.second)}
    lockstep = Lockstep(program, context.calibration, padding_mask)
    seen: dict[Node, Moments] = {}
    for node in list(program.operators):
        if node in wanted:
            lockstep.advance(node)
            seen[node] = moments(lockstep.inputs_of(node), node)
    return seen


def _turn(
    rewriter: Rewriter,
    product: HeadProduct,
    rank: int,
    seen: Mapping[Node, Moments],
    *,
    absorb: bool,
) -> Group:
    """Put the turned weights in place, zero behind the rank; returns the group on them."""
    given = Weights(rewriter, product)
    if product.scores:
        errors = list(_turn_scores(given, rank, seen))
    else:
        errors = list(_turn_values(given, rank, seen, absorb=absorb))
    node = product.attention
    if product.scores and argument(node, "scale") is None:
        rewriter.set_args(node, node.args, {**node.kwargs, "scale": product.width**-0.5})
    rewriter.note(
        f"{product.group.name} to {rank}, predicted error up to {max(errors):.3g} of a head"
    )
    return given.group()


def _turn_scores(w: Weights, rank: int, seen: Mapping[Node, Moments]) -> Iterator[float]:
    p = w.product
    query, key = w.read(p.first, "weight"), w.read(p.second, "weight")
    assert query is not None
    assert key is not None
    bias = w.read(p.first, "bias")
    each = p.heads // p.shared
    queries = query.reshape(p.shared, each, p.width, -1)
    keys = key.reshape(p.shared, p.width, -1)
    added = torch.zeros(len(query)).double() if bias is None else bias
    biases = added.reshape(p.shared, each, p.width)
    queried, keyed = (
        None if m is None else Seen(m.second, m.mean) for m in map(seen.get, (p.first, p.second))
    )
    new = torch.zeros_like(queries), torch.zeros_like(biases), torch.zeros_like(keys)
    for i in range(p.shared):
        made, turn = turn_scores(Projections(queries[i], biases[i], keys[i]), rank, queried, keyed)
        new[0][i, :, :rank], new[1][i, :, :rank] = made.queries, made.query_bias
        new[2][i, :rank] = made.key
        yield turn.error
    w.write(p.first, "weight", new[0].reshape(query.shape))
    w.write(p.second, "weight", new[2].reshape(key.shape))
    if bias is not None:
        w.write(p.first, "bias", new[1].flatten())
    if (key_bias := w.read(p.second, "bias")) is not None:
        w.write(p.second, "bias", torch.zeros_like(key_bias))


def _turn_values(
    w: Weights, rank: int, seen: Mapping[Node, Moments], *, absorb: bool
) -> Iterator[float]:
    p = w.product
    value, output = w.read(p.first, "weight"), w.read(p.second, "weight")
    assert value is not None
    assert output is not None
    each, h = p.heads // p.shared, p.width
    held = w.read(p.first, "bias")
    value_bias = torch.zeros(len(value)).double() if held is None else held
    values = value.reshape(p.shared, h, -1)
    outputs = output.reshape(len(output), p.shared, each, h)
    read = seen.get(p.second)
    context_bias = value_bias.reshape(p.shared, 1, h).expand(-1, each, -1).flatten()
    # What stays as it is: the mean, or where no bias may move, what the values' bias gives.
    fixed = context_bias if read is None or not absorb else read.mean
    covariance = None if read is None else _about(read, fixed)
    blocks = None
    if covariance is not None:
        apart = covariance.reshape(p.shared, each, h, p.shared, each, h)
        blocks = torch.einsum("geigej->gij", apart) / each
    new, right, left = torch.zeros_like(values), [], []
    for i in range(p.shared):
        block = None if blocks is None else blocks[i]
        made, turn = turn_values(values[i], list(outputs[:, i].unbind(1)), rank, block)
        new[i, :rank] = made
        right += [turn.right] * each
        left += [turn.left.t()] * each
        yield turn.error
    down = torch.block_diag(*right)
    thin = output @ torch.block_diag(*left)
    if covariance is not None:
        thin = refitted(output, down, covariance)
    gained = bias_of_mean(output, thin @ down, fixed, context_bias)
    wide = torch.zeros(len(output), p.heads, h, dtype=torch.float64)
    wide[..., :rank] = thin.reshape(len(output), p.heads, rank)
    w.write(p.first, "weight", new.reshape(value.shape))
    if held is not None:
        w.write(p.first, "bias", torch.zeros_like(held))
    bias = w.read(p.second, "bias")
    w.write(p.second, "weight", wide.flatten(1))
    if bias is not None or bool(gained.any()):
        w.write(p.second, "bias", gained if bias is None else bias + gained)


def _about(read: Moments, point: Tensor) -> Tensor:
    """Second moments about a point."""
    mean = torch.outer(read.mean, point)
    return read.second - mean - mean.t() + torch.outer(point, point)
