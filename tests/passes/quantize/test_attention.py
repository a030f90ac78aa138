"""Attention written as products computes the same, masks, dead rows and grouped heads included."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.verify import verify
from planish.passes.quantize.attention import decompose, is_attention
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.where import Where
from tests.passes.quantize.nets import calibrated, captured, linear, normal
from tests.support.check import assert_equal, run_checked

DEAD_ROW = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # the first query has no key at all


def opened(program: Program) -> Program:
    """A copy with products in the place of each attention, verified and compared."""
    copy = program.clone()
    rewriter = Rewriter(copy, "test")
    for node in copy.operators:
        if is_attention(node):
            with rewriter.site("open", node) as _:
                decompose(node, rewriter)
    result = rewriter.finish()
    verify(result)
    assert "aten.scaled_dot_product_attention" not in {op_name(n.target) for n in result.operators}
    assert_equal(program, result)
    return result


def heads(*counts: int) -> list[Tensor]:
    return [normal(2, count, 5, 8, seed=seed) for seed, count in enumerate(counts)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_plain_attention(options: dict[str, Any]) -> None:
    f = lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # noqa: E731 - one line says it
    opened(captured(f, *heads(4, 4, 4)))


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(causal: bool) -> None:
    f = lambda m, q, k, v: F.scaled_dot_product_attention(  # noqa: E731 - one line says it
        q, k, v, enable_gqa=True, is_causal=causal
    )
    opened(captured(f, *heads(4, 2, 2)))


@pytest.mark.parametrize(
    "mask",
    [
        DEAD_ROW,
        torch.zeros(5, 5).masked_fill(~DEAD_ROW, -math.inf),
        torch.zeros(5, 5).masked_fill(~DEAD_ROW, torch.finfo(torch.float32).min),
        normal(5, 5),
    ],
)
def test_masks_and_queries_without_keys(mask: Tensor) -> None:
    f = lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.mask)  # noqa: E731 - one line says it
    program = captured(f, *heads(2, 2, 2), mask=mask)
    result = opened(program)
    (found,) = run(result, program.samples[0])
    assert bool(found.isfinite().all())


def test_a_mask_that_is_an_input_is_not_trusted_to_leave_keys() -> None:
    f = lambda m, q, mask: F.scaled_dot_product_attention(q, q, q, mask)  # noqa: E731 - one line says it
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :2] = -math.inf
    program = captured(f, normal(2, 2, 5, 4), mask)
    (found,) = run(opened(program), program.samples[0])
    assert float(found[0, :, :2].abs().max()) == 0


def test_a_mask_of_finite_numbers_needs_no_guard() -> None:
    def f(m: Any, q: Tensor, keep: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float32).min
        return F.scaled_dot_product_attention(q, q, q, torch.where(keep, 0.0, lowest)[:, None])

    keep = torch.ones(2, 5, 5, dtype=torch.bool)
    keep[:, :, 3:] = False
    result = opened(captured(f, normal(2, 2, 5, 4), keep))
    assert "aten.gt.Scalar" not in {op_name(n.target) for n in result.operators}


def test_lengths_stay_dynamic() -> None:
    class Causal(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    sizes = {"q": {2: Dim("t", min=2, max=64)}, "k": {2: Dim("s", min=2, max=64)}}
    program = capture(
        Causal().eval(), (normal(1, 2, 5, 4), normal(1, 2, 7, 4)), dynamic_shapes=sizes
    )
    opened(program)


def test_patterns_of_the_attention_hold_for_its_products() -> None:
    f = lambda m, q, k, v: m.fc(F.scaled_dot_product_attention(q, k, v))  # noqa: E731 - one line says it
    program = captured(f, *heads(2, 2, 2), fc=linear(8, 8))
    for pattern in ("aten.scaled_dot_product_attention", "scaled_dot_product_attention"):
        where = Where(include=(pattern,))
        result = run_checked(program, Quantize(attention=True, where=where), calibrated(program))
        rules = [change.rule for change in result.changes]
        assert rules == ["decompose-attention", "quantize-product", "quantize-product"]
        where = Where(exclude=(pattern,))
        result = run_checked(program, Quantize(attention=True, where=where), calibrated(program))
        assert [change.rule for change in result.changes] == ["quantize-linear"]


def test_weights_alone_leave_attention_whole() -> None:
    f = lambda m, q, k, v: m.fc(F.scaled_dot_product_attention(q, k, v))  # noqa: E731 - one line says it
    program = captured(f, *heads(2, 2, 2), fc=linear(8, 8))
    result = run_checked(program, Quantize(mode="weight", attention=False))
    assert [change.rule for change in result.changes] == ["quantize-linear"]
    assert not result.refusals
