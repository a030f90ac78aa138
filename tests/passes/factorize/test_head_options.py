"""Attention heads of fewer dimensions: the options of the pass and of the attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.factorize.factorize import Factorize
from tests.passes.factorize.test_heads import FEATURES, Attention, factored, thin


def test_no_bias_is_given_to_the_output_where_that_is_not_allowed() -> None:
    torch.manual_seed(0)
    model = Attention(2, 2, bias=False).eval()
    x = (torch.randn(3, 10, 16) + 1,)
    before = capture(model, x)
    found = {}
    for bias in (True, False):
        options = Factorize(keep=0.5, rank_multiple=4, heads=True, bias=bias)
        context = PassContext()
        with spool([x], before) as context.calibration:
            found[bias] = options.run(before.clone(), context).program
    assert not any("bias" in name for name in found[False].constants)
    assert any("bias" in name for name in found[True].constants)
    want = run(before, x)[0]
    errors = {b: float((run(p, x)[0] - want).norm() / want.norm()) for b, p in found.items()}
    assert errors[True] <= errors[False] < 0.5
    have = run(found[True], x)[0]
    torch.testing.assert_close(have.mean((0, 1)), want.mean((0, 1)), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_and_scales_stay(causal: bool) -> None:
    class Masked(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                linear(x).view(*x.shape[:2], 2, 8).transpose(1, 2)
                for linear in (self.query, self.key, self.value)
            )
            added = None if causal else x[:, None, :, :10] * 3
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=added, is_causal=causal, scale=0.7
            )
            result: Tensor = self.output(y.transpose(1, 2).flatten(2))
            return result

    torch.manual_seed(0)
    before, after, _, refusals = factored(thin(Masked(2, 2), 4), True)
    assert not refusals
    (node,) = [n for n in after.operators if "scaled_dot_product" in n.name]
    assert node.kwargs["scale"] == 0.7
    x = (torch.randn(3, 10, 16) * FEATURES,)
    torch.testing.assert_close(run(after, x)[0], run(before, x)[0], atol=1e-4, rtol=1e-4)
