"""Round the weights of a program one after another, each by what its layer reads by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from planish.ir.ops import aten, is_op
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.observe.feeding import required as required_spool
from planish.passes.quantize.weights import Codes
from planish.passes.rounding.lockstep import Lockstep, gram, operand_key
from planish.passes.rounding.round_weights import round_to_nearest
from planish.passes.rounding.targets import Weight, row_scheme, write_codes

# Factors of one H, kept for all matrices on the same inputs: reordered or not -> (order, U).
Factors: TypeAlias = dict[bool, tuple[Tensor, Tensor]]
# (rows [O, I], H [I, I], a row scheme, factors, mask [O, I] of what may be nonzero or None for all)
# -> integers, and an output error
Rounder: TypeAlias = Callable[
    [Tensor, Tensor, QuantScheme, Factors, Tensor | None], tuple[Codes, float]
]


def mask_of(weight: Weight) -> Tensor | None:
    """What may be nonzero of a weight that claims a layout, ``[outputs, inputs]``; else None."""
    return None if weight.layout is None else weight.rows() != 0


def round_in_sequence(
    rewriter: Rewriter,
    weights: Sequence[Weight],
    context: PassContext,
    scheme_of: Callable[[Weight], QuantScheme],
    rounder: Rounder,
    padding_mask: str = "",
) -> None:
    """Round weights in program order; every layer reads what the rounded ones before it give.

    A table that is embedding and output layer at once must be rounded before anything is
    computed: it takes H from the program as it is, plus the identity times the mean of diag H for
    the rows that are looked up. A table that is only looked up is rounded to the nearest.

    Args:
        rewriter: of the program.
        weights: in the order of their first readers.
        context: holds the calibration; told of every weight.
        scheme_of: how each is to be written.
        rounder: rounds one matrix.
        padding_mask: input that is 0 for padding, or "".

    Raises:
        RequirementError: there is no calibration.
    """
    required_spool(context.calibration)
    assert context.calibration is not None
    program = rewriter.program
    tied = tied_grams(rewriter, weights, context, padding_mask)
    state = Lockstep(program, context.calibration, padding_mask)
    last: tuple[object, Tensor, list[Factors]] | None = None
    for done, weight in enumerate(weights):
        context.tell(done, len(weights))
        scheme = scheme_of(weight)
        if not weight.products:
            write_codes(rewriter, weight, round_to_nearest(weight.value, scheme, search=True))
            continue
        if weight.name in tied:
            h = tied[weight.name]
            factors: list[Factors] = [{} for _ in h]
        else:
            reader = weight.products[0]
            state.advance(reader)
            key = operand_key(reader)
            if last is None or last[0] != key:
                h = gram(state.inputs_of(reader), reader)
                last = (key, h, [{} for _ in h])
            _, h, factors = last
        codes, loss = _rounded(weight, h, scheme, rounder, factors)
        write_codes(rewriter, weight, codes, f"output error {loss:.4g}")
    context.tell(len(weights), len(weights))


def tied_grams(
    rewriter: Rewriter, weights: Sequence[Weight], context: PassContext, padding_mask: str
) -> dict[str, Tensor]:
    """H of the tables that are read before what they multiply is computed."""
    found: dict[str, Tensor] = {}
    for weight in weights:
        if not weight.products or not is_op(weight.readers[0], aten.embedding.default):
            continue
        assert context.calibration is not None
        state = Lockstep(rewriter.program, context.calibration, padding_mask)
        reader = weight.products[0]
        state.advance(reader)
        h = gram(state.inputs_of(reader), reader)
        found[weight.name] = h + torch.eye(h.shape[-1], dtype=h.dtype) * h.diagonal(0, 1, 2).mean()
    return found


def _rounded(
    weight: Weight, h: Tensor, scheme: QuantScheme, rounder: Rounder, factors: list[Factors]
) -> tuple[Codes, float]:
    """Round the rows of each group of a layer, and put the parts together."""
    rows, by_row = weight.rows(), row_scheme(scheme)
    kept = mask_of(weight)
    masks = [None] * len(h) if kept is None else kept.chunk(len(h))
    parts, loss = [], 0.0
    for part, own, known, mask in zip(rows.chunk(len(h)), h, factors, masks, strict=True):
        made, error = rounder(part, own, by_row, known, mask)
        parts.append(made)
        loss += error
    scale = torch.cat([c.scale for c in parts]).to(weight.value.dtype)
    zero = torch.cat([c.zero_point for c in parts])
    codes = torch.cat([c.codes for c in parts])
    if scheme.granularity == "block":
        scale, zero = weight.from_blocks(scale), weight.from_blocks(zero)
    return Codes(weight.from_rows(codes), scale, zero, scheme), loss
