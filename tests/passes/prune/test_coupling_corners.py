"""Structures where a group once did not fit: each is cut right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.passes.prune.coupling import find_groups
from planish.tools.bench.structure.masking import masked, share_kept, without
from tests.passes.prune.test_coupling import B, Net, T, check


def _all_right(module: nn.Module, x: Tensor, dynamic: object = None) -> list[str]:
    """Cut each group to a share, and to a single unit; what the groups are called."""
    program = capture(module.eval(), (x,), dynamic_shapes=dynamic)
    groups, _ = find_groups(program)
    for group in groups:
        check(program, [group], (x,))
        one = {group: share_kept(group, 0.01, 0)}
        mine, wanted = run(without(program, one), (x,))[0], run(masked(program, one), (x,))[0]
        assert mine.shape == wanted.shape
        assert torch.allclose(mine, wanted, atol=1e-5, rtol=1e-5)
    return [group.name for group in groups]


def _refused(module: nn.Module, x: Tensor, dynamic: object = None) -> str:
    groups, refusals = find_groups(capture(module.eval(), (x,), dynamic_shapes=dynamic))
    assert not groups
    return " ".join(refusal.reason for refusal in refusals)


def _linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def test_parts_behind_one_of_dynamic_size_are_tied_too() -> None:
    def what(s: Any, x: Tensor) -> Tensor:
        return s.o(torch.cat([s.a(x), s.b(x.mean(1, keepdim=True))], 1).cos())

    net = Net(what, **_linears(a=(6, 8), b=(6, 8), o=(8, 3)))
    assert _all_right(net, torch.randn(2, 5, 6), ({0: B, 1: T},)) == ["a: 8 neurons"]


@pytest.mark.parametrize("pinned", [True, False])
def test_halves_of_an_axis_of_dynamic_size(pinned: bool) -> None:
    def what(s: Any, x: Tensor) -> Tensor:
        half = (x if pinned else s.p(x)).chunk(2, 1)[0]
        return s.o(half + s.a(x).mean(1, keepdim=True))

    net = Net(what, **_linears(p=(6, 6), a=(6, 6), o=(6, 3)))
    dynamic = ({0: B, 1: 2 * torch.export.Dim("half", min=2)},)
    x = torch.randn(2, 6, 6)
    if pinned:
        assert "it is an input of the program" in _refused(net, x, dynamic)
    else:
        assert _all_right(net, x, dynamic) == ["p: 6 features"]


def test_a_squeeze_takes_the_same_axes_when_one_unit_is_left() -> None:
    torch.manual_seed(0)
    pooled = Net(
        lambda s, x: s.o(s.a(x).mean((2, 3), keepdim=True).squeeze().cos()),
        a=nn.Conv2d(3, 8, 1),
        o=nn.Linear(8, 3),
    )
    assert _all_right(pooled, torch.randn(2, 3, 4, 4)) == ["a: 8 channels"]
    named = Net(lambda s, x: s.o(s.a(x).squeeze(1).cos()), **_linears(a=(6, 8), o=(8, 3)))
    assert _all_right(named, torch.randn(2, 6)) == ["a: 8 neurons"]


def test_a_value_whose_type_alone_is_read_may_have_any_rank() -> None:
    net = Net(
        lambda s, x: s.o(s.a(x.mean((0, 1, 2))).type_as(x).cos()), **_linears(a=(6, 8), o=(8, 3))
    )
    assert _all_right(net, torch.randn(2, 5, 4, 6)) == ["a: 8 neurons"]


@pytest.mark.parametrize("causal", [False, True])
def test_units_along_the_queries(causal: bool) -> None:
    """A causal mask counts them."""

    def what(s: Any, x: Tensor) -> Tensor:
        q = s.t(x.transpose(1, 2)).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q[:, None], s.k(x)[:, None], x[:, None], is_causal=causal
        )
        return s.o(y[:, 0].transpose(1, 2))

    net = Net(what, **_linears(t=(5, 7), k=(6, 6), o=(7, 3)))
    if causal:
        assert "a causal mask counts its units" in _refused(net, torch.randn(2, 5, 6))
    else:
        assert len(_all_right(net, torch.randn(2, 5, 6))) == 1


def test_a_constant_that_is_split_after_it_is_cut() -> None:
    """As torch's own attention does with its three projections."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
            self.m = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.o(self.m(self.a(x), self.a(x), self.a(x))[0])
            return found

    torch.manual_seed(0)
    assert "m: 8 neurons" in _all_right(Attention(), torch.randn(2, 5, 6))
