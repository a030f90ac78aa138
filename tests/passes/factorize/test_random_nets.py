"""Networks drawn at random: at full rank factors change nothing, and every weight is accounted for.

A pass that keeps every rank does not exist (it would save nothing), so the sites are written at the
rank at which they are exact, by every method, one after another as the pass does.
"""

from __future__ import annotations

import random
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.verify import verify
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.factorize.factorize import Factorize
from planish.passes.factorize.factors import Task, solve
from planish.passes.factorize.rewrite import write_factors
from planish.passes.factorize.sequence import Reading
from planish.passes.factorize.sites import Site, find_sites
from planish.passes.quantize.where import Where
from tests.passes.factorize.test_edges import tensors

SEEDS = range(24)


class RandomNet(nn.Module):
    """A table, linears, and convolutions, some of whose weights or biases are shared."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.width = draw.choice([5, 6, 8])
        self.table = nn.Embedding(30, self.width, padding_idx=draw.choice([None, 0]))
        self.steps = nn.ModuleList(self._step(draw) for _ in range(draw.randint(2, 5)))
        self.residual = [draw.random() < 0.4 for _ in self.steps]
        self.tied = draw.random() < 0.3
        linears = [s for s in self.steps if isinstance(s, nn.Linear) and s.bias is not None]
        if len(linears) > 1 and draw.random() < 0.7:
            linears[-1].bias = linears[0].bias
            if draw.random() < 0.5:
                linears[-1].weight = linears[0].weight
        if draw.random() < 0.3:  # called twice
            self.steps.append(self.steps[0])
            self.residual.append(False)
        self.head = nn.Linear(self.width, 4, bias=draw.random() < 0.5)

    def _step(self, draw: random.Random) -> nn.Module:
        w, bias = self.width, draw.random() < 0.6
        kind = draw.choice(["linear", "product", "line", "plane", "plane", "grouped"])
        if kind == "linear":
            return nn.Linear(w, w, bias=bias)
        if kind == "product":
            return Product(w)
        if kind == "line":
            dilation = draw.choice([1, 2])
            return Line(nn.Conv1d(w, w, 3, padding=dilation, dilation=dilation, bias=bias))
        if kind == "grouped":
            return Plane(nn.Conv2d(w, w, 3, padding=1, groups=w, bias=bias))
        window = draw.choice([(3, 3), (1, 1), (1, 3), (5, 3)])
        stride = (1, 1) if window == (1, 1) else draw.choice([(1, 1), (2, 1), (1, 2)])
        dilation = draw.choice([1, 2]) if window == (3, 3) else 1
        padding = (dilation * (window[0] // 2), dilation * (window[1] // 2))
        return Plane(nn.Conv2d(w, w, window, stride, padding, dilation, bias=bias))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for step, added in zip(self.steps, self.residual, strict=True):
            y = step(x)
            x = torch.tanh(x + y if added and y.shape == x.shape else y)
        if self.tied:
            x = x + x @ self.table.weight.t() @ self.table.weight
        y = self.head(x)
        return y


class Product(nn.Module):
    """``b + x W``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, width)),
            nn.Parameter(torch.randn(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.flatten(0, 1), self.weight)
        return y.unflatten(0, x.shape[:2])


class Line(nn.Module):
    """A convolution over tokens."""

    def __init__(self, inner: nn.Conv1d) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return y


class Plane(nn.Module):
    """A convolution over tokens laid out in a plane of four columns."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4)).movedim(3, 1))
        result: Tensor = y.movedim(1, 3).flatten(1, 2)
        return result


def _net(seed: int) -> tuple[Program, list[tuple[Tensor]]]:
    torch.manual_seed(seed)
    net = RandomNet(seed).eval()
    batches = [(torch.randint(0, 30, (3, 16)),) for _ in range(4)]
    return capture(net, batches[0]), batches


def _weights(program: Program) -> set[str]:
    """Constants of two axes or more."""
    return {n for n, v in tensors(program).items() if v.dim() > 1}


@pytest.mark.parametrize("method", ["svd", "whitened", "fisher"])
@pytest.mark.parametrize("seed", SEEDS)
def test_full_rank_changes_nothing(seed: int, method: Literal["svd", "whitened", "fisher"]) -> None:
    program, batches = _net(seed)
    after = program.clone()
    sites, _ = find_sites(after, Where(), spatial=bool(seed % 2), embeddings=True)
    rewriter = Rewriter(after, "factorize")
    with spool(batches, after) as calibration:
        reading = Reading(after, PassContext(calibration=calibration), before=program.clone())
        for site in sites:
            basis = solve(_task(site, method, reading), method)
            assert write_factors(rewriter, site, basis.factors(site.largest), "all of it")
    after = rewriter.finish()
    verify(after)
    for batch in batches:
        torch.testing.assert_close(run(after, batch), run(program, batch), rtol=1e-4, atol=1e-4)


def _task(site: Site, method: str, reading: Reading) -> Task:
    if method == "fisher":
        return Task(site.rows, fisher=torch.rand(len(site.rows)), center=False)
    if method == "svd":
        return Task(site.rows, center=False)
    if site.form == "table":
        return Task(site.rows, counts=reading.counts(site), center=False)
    return Task(site.rows, reading.of(site), center=site.form != "spatial", damping=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_weight_is_smaller_or_told(seed: int) -> None:
    program, batches = _net(seed)
    options = Factorize(
        keep=0.7,
        rank_multiple=1,
        embeddings=True,
        convolution="spatial" if seed % 2 else "pair",
    )
    context = PassContext()
    with spool(batches, program) as context.calibration:
        result = options.run(program.clone(), context)
    verify(result.program)
    gone = _weights(program) - _weights(result.program)
    assert len(gone) == len(result.changes)
    told = {r.node for r in result.refusals}
    readers = {n.name: n for n in program.operators}
    left = {
        str(operand.target)
        for name in told
        for operand in readers[name].all_input_nodes
        if operand.op == "get_attr"
    }
    assert _weights(program) <= gone | left
    before, after = tensors(program), tensors(result.program)
    for change in result.changes:
        name = change.detail.split(" to rank ")[0]
        stem = name.removesuffix(".weight")
        size = sum(after[f"{stem}.{n}.weight"].numel() for n in ("first", "second"))
        assert size <= 0.7 * before[name].numel()
