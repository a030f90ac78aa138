"""What layers take by rank, with a clock that counts multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.errors import RequirementError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.factorize.factorize import Factorize
from planish.passes.factorize.latency import latencies
from planish.passes.factorize.sites import find_sites
from planish.passes.quantize.where import Where

LINEARS = Where(include=("*linear*",))


class Clock:
    """A target on which a multiply-accumulate takes a second, and an operator ``start`` more."""

    def __init__(self, start: float = 0.0):
        self.start, self.timed = start, 0

    def seconds(self, programs: Sequence[tuple[Program, Sequence[Any]]]) -> list[float]:
        self.timed += len(programs)
        return [float(cost(p).macs) + self.start * len(p.operators) for p, _ in programs]


class Net(nn.Module):
    """Linears, two of one shape, and a convolution with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(image), self.second(self.first(tokens).relu())


def _program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(1, 3, 16, 16), torch.randn(2, 5, 32)))


def test_layers_are_timed_at_the_size_of_the_sample() -> None:
    program = _program()
    sites, _ = find_sites(program, Where(), spatial=False, embeddings=False)
    clock = Clock()
    ranks = {s.name: [1, 2, 3, 4, 5, 6] for s in sites}
    found = latencies(sites, ranks, clock)
    for site in sites:
        expected: dict[int | None, float] = {r: site.macs_at(r) for r in range(1, 7)}
        assert found[site.name] == expected | {None: site.macs}
    assert clock.timed == 2 * (1 + 4)  # two shapes, the layer as it is and four ranks


def test_no_ranks_is_the_layer_alone() -> None:
    sites, _ = find_sites(_program(), Where(), spatial=False, embeddings=False)
    found = latencies(sites, {s.name: [] for s in sites}, Clock())
    assert all(list(table) == [None] for table in found.values())


def test_the_pass_stays_within_the_measured_budget() -> None:
    program = _program()
    options = Factorize(
        method="svd", rule="latency", keep=0.5, rank_multiple=2, where=Where(include=("*linear*",))
    )
    result = options.run(program, PassContext(timer=Clock()))
    assert len(result.changes) == 2
    linears = 2 * 2 * 5 * 32 * 32
    whole = cost(_program()).macs
    assert cost(result.program).macs <= whole - linears / 2


def test_layers_that_get_no_faster_stay_dense_and_say_so() -> None:
    options = Factorize(method="svd", rule="latency", keep=0.9, rank_multiple=1, where=LINEARS)
    remarks: list[str] = []
    context = PassContext(timer=Clock(start=1e6), remark=remarks.append)
    result = options.run(_program(), context)
    assert not result.changes
    assert all("stays dense: it would not get faster" in r.reason for r in result.refusals)
    assert "cannot be met" in remarks[0]


def test_without_a_target_that_runs_there_is_one_error() -> None:
    with pytest.raises(RequirementError, match="nothing runs here"):
        Factorize(method="svd", rule="latency").run(_program(), PassContext())
