"""Numbers of heads, made up by a matrix of each head's own; and pivots from a Gram matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.prune.decompose import _householder, pivoted_qr
from planish.passes.prune.interpolate import Interpolate
from planish.passes.quantize.where import Where

HEADS, WIDE = 3, 8


class Attention(nn.Module):
    """Self-attention; in every head half of the values follow from the others, by its own rule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        with torch.no_grad():
            rows = self.v.weight.view(HEADS, WIDE, 24)
            half = WIDE // 2
            for head in range(HEADS):
                mix = torch.randn(half, half)
                rows[head, half:] = mix @ rows[head, :half]
                self.v.bias.view(HEADS, WIDE)[head, half:] = (
                    mix @ self.v.bias.view(HEADS, WIDE)[head, :half]
                )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], HEADS, WIDE).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(made.transpose(1, 2).reshape(x.shape))
        return y


def test_every_head_has_a_matrix_of_its_own() -> None:
    x = torch.randn(16, 10, 24)
    program = capture(Attention().eval(), (x[:2],))
    said: list[str] = []
    context = PassContext(calibration=spool(list(x.split(2)), program))
    context.remark = said.append
    # One matrix for all heads would lose a third of the signal here.
    options = Interpolate(keep=0.5, where=Where(include=("v",)))
    made = options.run(program.clone(), context).program
    weight = next(c for n, c in made.constants.items() if n.endswith("v.weight"))
    assert weight.shape == (HEADS * WIDE // 2, 24)
    (a,), (b,) = run(program, [x[:2]]), run(made, [x[:2]])
    assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())
    assert any("4 kept, error 0.00 %" in text for text in said)


def test_a_constant_that_does_not_fit_is_told() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 4)
    ).eval()
    x = torch.randn(200, 8)
    program = capture(net, (x[:20],))
    said: list[str] = []
    context = PassContext(calibration=spool(list(x.split(20)), program))
    context.remark = said.append
    Interpolate(keep=0.5, constant=True).run(program, context)
    told = [text for text in said if "no constant, as" in text]
    assert len(told) == 1
    assert "has no bias of its own" in told[0]


def _drawn(rank: int, size: int, fall: float) -> Tensor:
    made = torch.Generator().manual_seed(size)
    wide = torch.randn(3 * size, rank, generator=made, dtype=torch.float64)
    scales = torch.logspace(0, -fall, rank, dtype=torch.float64)
    return (wide * scales) @ torch.randn(rank, size, generator=made, dtype=torch.float64)


@pytest.mark.parametrize("fall", [0.0, 3.0, 9.0])
@pytest.mark.parametrize(("rank", "size"), [(150, 150), (40, 90), (1, 20), (7, 7)])
def test_the_gram_matrix_gives_the_pivots_of_the_reflections(
    rank: int, size: int, fall: float
) -> None:
    z = _drawn(rank, size, fall)
    before = z.clone()
    order, r = _householder(z.clone())
    found = pivoted_qr(z)
    assert torch.equal(z, before)
    # Behind the numerical rank any order is as good as another.
    sure = int((r.diagonal().abs() > 1e-9 * float(r[0, 0].abs())).sum())
    assert torch.equal(found.order[:sure], order[:sure])
    torch.testing.assert_close(found.diagonal[:sure], r.diagonal().abs()[:sure], rtol=1e-6, atol=0)


def test_columns_that_are_dead_or_equal() -> None:
    z = _drawn(10, 20, 1.0)
    z[:, 3], z[:, 5] = 0, z[:, 4]
    found = pivoted_qr(z)
    assert sorted(found.order.tolist()) == list(range(20))
    kept = found.keep(10)
    assert kept.relative < 1e-12
    assert 3 not in kept.kept.tolist()
    assert pivoted_qr(torch.zeros(8, 4)).keep(2).error == 0
