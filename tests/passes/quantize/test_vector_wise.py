"""Known answer of LLM.int8(): a scale for each row of X and for each column of W."""

from __future__ import annotations

import torch

from planish.ir.execute import run
from planish.passes.base import PassContext
from planish.passes.quantize.quantize import Quantize
from tests.passes.quantize.nets import captured, linear, normal
from tests.support.check import run_checked


def test_rows_and_columns_have_scales_of_their_own() -> None:
    """``Y = (c_x c_w^T / 127^2) (X8 W8)`` with ``c`` the largest magnitudes."""
    x = normal(5, 16) * torch.tensor([1e-3, 1.0, 40.0, 7.0, 0.2])[:, None]
    layer = linear(16, 6, bias=False)
    with torch.no_grad():
        layer.weight[2] *= 100
    program = captured(lambda m, x: m.fc(x), x, fc=layer)
    pass_ = Quantize(mode="dynamic", activations="int8", per_token=True)
    result = run_checked(program, pass_, PassContext()).program
    w = layer.weight.detach()
    c_x, c_w = x.abs().amax(1, keepdim=True), w.abs().amax(1, keepdim=True)
    x8, w8 = (x / (c_x / 127)).round(), (w / (c_w / 127)).round()
    expected = (c_x @ c_w.t() / 127**2) * (x8 @ w8.t())
    torch.testing.assert_close(run(result, (x,))[0], expected, rtol=1e-5, atol=1e-6)


def test_one_scale_for_all_rows_loses_the_small_ones() -> None:
    """What the scales of rows are for: the same product with a single scale of X."""
    x = normal(2, 16) * torch.tensor([1e-3, 40.0])[:, None]
    program = captured(lambda m, x: m.fc(x), x, fc=linear(16, 6, bias=False))
    both = {
        rows: run_checked(
            program,
            Quantize(mode="dynamic", activations="int8", per_token=rows),
            PassContext(),
        ).program
        for rows in (True, False)
    }
    exact = run(program, (x,))[0][0]
    small = {rows: run(p, (x,))[0][0] for rows, p in both.items()}
    assert float((small[True] - exact).norm()) < 0.02 * float(exact.norm())
    assert torch.equal(small[False], torch.zeros(6))
