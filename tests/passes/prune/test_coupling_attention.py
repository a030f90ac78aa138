"""Heads, and what is in a head, of attentions of each kind; sizes stay dynamic after a cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.prune.coupling import find_groups
from planish.tools.bench.structure.masking import share_kept, without
from tests.passes.prune.test_coupling import B, T, check

SIZE, HEADS, EACH = 24, 4, 6


class Separate(nn.Module):
    """Three linears, a view into heads, attention, a view back; as BERT has it."""

    def __init__(self, *, product: bool = False, shared: int = 1, way: str = "gqa"):
        super().__init__()
        self.product, self.shared, self.way = product, shared, way
        self.q = nn.Linear(SIZE, SIZE)
        self.k, self.v = (nn.Linear(SIZE, SIZE // shared) for _ in range(2))
        self.o = nn.Linear(SIZE, SIZE)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, EACH).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        if self.shared > 1 and self.way == "expand":
            k, v = (
                y[:, :, None]
                .expand(b, HEADS // self.shared, self.shared, t, EACH)
                .reshape(b, HEADS, t, EACH)
                for y in (k, v)
            )
        if self.product:
            y = (q @ k.transpose(-1, -2) / EACH**0.5).softmax(-1) @ v
        else:
            gqa = self.shared > 1 and self.way == "gqa"
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        return self.o(y.transpose(1, 2).reshape(b, t, SIZE))


class Fused(nn.Module):
    """One linear for query, key and value, taken apart in one of several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.qkv, self.o = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x)
        if self.way == "view":
            q, k, v = y.reshape(b, t, 3, HEADS, EACH).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = y.chunk(3, -1) if self.way == "chunk" else y.split(SIZE, -1)
            q, k, v = (p.view(b, t, HEADS, EACH).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, t, SIZE))


class Rotary(Separate):
    """Query and key are turned by an angle that depends on the place."""

    def _heads(self, x: Tensor) -> Tensor:
        y = super()._heads(x)
        rates = torch.arange(EACH // 2, device=x.device) * 0.3
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rates
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-y[..., EACH // 2 :], y[..., : EACH // 2]], -1)
        return y * angle.cos() + half * angle.sin()


def _program(module: nn.Module) -> Program:
    x = torch.randn(3, 5, SIZE)
    return capture(module.eval(), (x,), dynamic_shapes=({0: B, 1: T},))


def _kinds(program: Program) -> set[tuple[str, int]]:
    return {(g.kind, g.size) for g in find_groups(program)[0]}


ALL = {("heads", HEADS), ("head-dims", EACH)}


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (Separate, ALL),
        (lambda: Separate(product=True), ALL),
        (lambda: Separate(shared=2), {("heads", 2), ("head-dims", EACH)}),
        (lambda: Separate(shared=2, way="expand"), {("heads", 2), ("head-dims", EACH)}),
        (lambda: Fused("view"), ALL),
        (lambda: Fused("chunk"), ALL),
        (lambda: Fused("split"), ALL),
        (Rotary, {("heads", HEADS)}),
    ],
    ids=["sdpa", "product", "gqa", "expand", "view", "chunk", "split", "rotary"],
)
def test_heads_and_what_is_in_them(module: type[nn.Module], wanted: set[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    program = _program(module())
    assert wanted <= _kinds(program)
    inputs = [(torch.randn(*shape, SIZE),) for shape in ((3, 5), (2, 11))]
    groups = find_groups(program)[0]
    for group in groups:
        check(program, [group], *inputs)
    check(
        program,
        [g for g in groups if g.kind == "heads"][:1]
        + [g for g in groups if g.kind == "head-dims"][:2],
        *inputs,
    )


def test_a_view_of_what_attention_gives_fits_after_the_cut() -> None:
    """With 8 numbers to a head it lies in memory as the view wants it, with 6 it does not."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
            self.o = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).view(2, 5, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
            z: Tensor = self.o(y.view(2, 5, 32))
            return z

    torch.manual_seed(0)
    program = capture(Viewed().eval(), (x := torch.randn(2, 5, 16),))
    groups, _ = find_groups(program)
    assert {"heads", "head-dims"} <= {group.kind for group in groups}
    for group in groups:
        cut = without(program, {group: share_kept(group, 0.75, 0)})
        verify(cut, since=program)
        assert run(cut, (x,))[0].shape == (2, 5, 16)
