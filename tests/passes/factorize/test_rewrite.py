"""Two operators in the place of one: at full rank they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.verify import verify
from planish.passes.factorize.factors import Task, solve
from planish.passes.factorize.rewrite import write_factors
from planish.passes.factorize.sites import find_sites
from planish.passes.quantize.where import Where


class Addmm(nn.Module):
    """``b + x W`` as GPT-2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Product(nn.Module):
    """A constant matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


CASES: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 9), torch.randn(2, 5, 6)),
    "no bias": (nn.Linear(6, 9, bias=False), torch.randn(5, 6)),
    "addmm": (Addmm(), torch.randn(4, 6)),
    "matmul": (Product(), torch.randn(3, 4, 6)),
    "conv1d": (nn.Conv1d(3, 8, 5, stride=2, padding=2), torch.randn(2, 3, 20)),
    "conv2d": (nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2)), torch.randn(2, 3, 9, 11)),
    "dilated": (nn.Conv2d(4, 8, 3, padding=2, dilation=2, bias=False), torch.randn(1, 4, 9, 9)),
    "same": (nn.Conv2d(3, 8, 3, padding="same"), torch.randn(1, 3, 8, 8)),
    "conv3d": (nn.Conv3d(2, 20, 2), torch.randn(1, 2, 4, 5, 6)),
    "table": (nn.Embedding(30, 6, padding_idx=0), torch.randint(0, 30, (2, 7))),
}
SPATIAL = {
    "square": (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)),
    "strided": (nn.Conv2d(3, 6, (3, 5), stride=(2, 3), padding=(1, 2)), torch.randn(1, 3, 9, 16)),
    "dilated": (nn.Conv2d(3, 6, 3, padding=(0, 2), dilation=(1, 2)), torch.randn(1, 3, 9, 9)),
}


def _factored(program: Program, *, spatial: bool = False) -> Program:
    (site,), refusals = find_sites(program, Where(), spatial=spatial, embeddings=True)
    assert not refusals
    rewriter = Rewriter(program, "factorize")
    factors = solve(Task(site.rows), "svd").factors(site.largest)
    assert write_factors(rewriter, site, factors, "all of it")
    return rewriter.finish()


@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_exact(name: str) -> None:
    module, x = CASES[name]
    program = capture(module.eval(), (x,))
    after = _factored(program.clone())
    verify(after)
    assert len(after.operators) == len(program.operators) + 1
    torch.testing.assert_close(run(after, (x,)), run(program, (x,)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPATIAL)
def test_rows_then_columns_are_exact_at_full_rank(name: str) -> None:
    module, x = SPATIAL[name]
    program = capture(module.eval(), (x,))
    after = _factored(program.clone(), spatial=True)
    verify(after)
    first, second = (n.args[1] for n in after.operators)
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    assert (first.meta["val"].shape[3], second.meta["val"].shape[2]) == (1, 1)
    torch.testing.assert_close(run(after, (x,)), run(program, (x,)), rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_stay_dynamic() -> None:
    batch = torch.export.Dim("batch", max=64)
    x = torch.randn(3, 6)
    program = capture(nn.Linear(6, 9).eval(), (x,), dynamic_shapes=({0: batch},))
    after = _factored(program.clone())
    verify(after)
    more = (torch.randn(7, 6),)
    torch.testing.assert_close(run(after, more), run(program, more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "args", "reason"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), (torch.randn(1, 4, 6, 6),), "come in groups"),
        (nn.Linear(4, 1), (torch.randn(2, 4),), "hold no fewer numbers than its 4"),
    ],
)
def test_what_cannot_be_factored_says_why(
    module: nn.Module, args: tuple[Any, ...], reason: str
) -> None:
    both = nn.ModuleList([module, nn.Linear(6, 6)])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.both[0](x), self.both[1](y)

    program = capture(Two().eval(), (*args, torch.randn(2, 6)))
    sites, refusals = find_sites(program, Where(), spatial=False, embeddings=True)
    assert len(sites) == 1
    assert reason in refusals[0].reason


def test_a_tied_weight_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.middle = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.middle(self.table(ids)) @ self.table.weight.t()

    program = capture(Tied().eval(), (torch.randint(0, 20, (2, 3)),))
    sites, refusals = find_sites(program, Where(), spatial=False, embeddings=True)
    assert [s.name for s in sites] == ["middle.weight"]
    assert refusals
