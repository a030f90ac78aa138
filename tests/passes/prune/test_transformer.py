"""Heads and neurons cut to a budget: under it, equal to masks, and better when tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.errors import NothingToDoError, RequirementError
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.transformer import PruneTransformer
from planish.passes.prune.tuned_scales import tuned_scales
from planish.passes.recipe import Recipe


class Block(nn.Module):
    """Two layers' worth of a transformer: 4 heads of 4, 24 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).view(4, 6, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 6, 16)
        x = x + self.out(mixed)
        z: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return z


class Encoder(nn.Module):
    """Two blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x).mean(1))
        return y


def _loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def _data(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(4, 6, 16, generator=generator) for _ in range(count)]
    return [(b, torch.randint(3, (4,), generator=generator)) for b in x]


class MacsTimer:
    """A multiply-accumulate takes a microsecond."""

    def seconds(self, programs: Sequence[tuple[Program, Sequence[Any]]]) -> list[float]:
        """By the cost of each."""
        return [1e-6 * cost(program).macs for program, _ in programs]


@pytest.fixture(name="program", scope="module")
def _program() -> Program:
    return capture(Encoder().eval(), (torch.randn(4, 6, 16),))


def _run(
    program: Program, timer: MacsTimer | None = None, **options: Any
) -> tuple[Program, list[str]]:
    remarks: list[str] = []
    data = _data(24, 1)
    context = PassContext(
        labeled=data,
        loss=_loss,
        calibration=spool([(x,) for x, _ in data], program),
        remark=remarks.append,
        timer=timer,
    )
    result = PruneTransformer(**options).run(program.clone(), context)
    verify(result.program)
    return result.program, remarks


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_budget_holds(program: Program, share: float) -> None:
    after, remarks = _run(program, macs=share)
    left = cost(after).macs / cost(program).macs
    assert left <= share
    assert left > share - 0.05  # and is spent
    assert len(remarks) == 1
    assert after(_data(1, 5)[0][0]).shape == (4, 3)


def test_a_budget_that_cannot_be_met_is_said(program: Program) -> None:
    after, remarks = _run(program, macs=0.01)
    assert "is the least that can be reached" in remarks[0]
    assert sum("1 kept" in remark for remark in remarks) == 1
    assert cost(after).macs < 0.3 * cost(program).macs


def _constant(program: Program, name: str) -> Tensor:
    value = program.constants[name]
    assert isinstance(value, Tensor)
    return value


def _masked(program: Program, after: Program) -> Program:
    """The program with the columns of what was cut set to zero, by the rows that were kept."""
    masked = program.clone()
    for block in ("blocks.0", "blocks.1"):
        for made, read in (("v", "out"), ("up", "down")):
            rows = _constant(program, f"{block}.{made}.weight")
            left = _constant(after, f"{block}.{made}.weight")
            stays = (rows.unsqueeze(1) == left.unsqueeze(0)).all(-1).any(1)
            weight = _constant(program, f"{block}.{read}.weight")
            masked.constants[f"{block}.{read}.weight"] = weight * stays
    return masked


def test_equal_to_the_masked_model(program: Program) -> None:
    after, _ = _run(program, macs=0.6, tune=False)
    assert _constant(after, "blocks.0.down.weight").shape[1] < 24
    masked = _masked(program, after)
    for x, _ in _data(4, 7):
        assert torch.allclose(after(x), masked(x), atol=1e-5)


def test_tuning_comes_closer_on_data_that_it_has_not_seen(program: Program) -> None:
    plain, _ = _run(program, macs=0.5, tune=False)
    tuned, _ = _run(program, macs=0.5)
    held = _data(16, 9)

    def error(other: Program) -> float:
        return sum(float((other(x) - program(x)).square().sum()) for x, _ in held)

    assert error(tuned) < error(plain)


def _twins(program: Program) -> Program:
    """Every even neuron and the one behind it alike, in what makes and what reads them."""
    made = program.clone()
    for block in ("blocks.0", "blocks.1"):
        for name, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            value = _constant(made, f"{block}.{name}")
            even = torch.arange(0, value.shape[axis], 2).repeat_interleave(2)
            made.constants[f"{block}.{name}"] = value.index_select(axis, even).clone()
    return made


def test_one_twin_of_each_layer_takes_over(program: Program) -> None:
    twins = _twins(program)
    groups = [g for g in find_groups(twins)[0] if g.kind == "neurons"]
    kept = {g: torch.arange(0, 24, 2) for g in groups}
    assert len(kept) == 2
    inputs = [(x,) for x, _ in _data(8, 3)]
    context = PassContext(calibration=spool(inputs, twins))
    found = tuned_scales(twins, kept, context, damping=0.0, padding_mask="")
    for r in found.values():
        assert r is not None
        assert torch.allclose(r, torch.full((12,), 2.0, dtype=torch.float64), atol=1e-3)


def test_all_units_kept_give_ones_exactly(program: Program) -> None:
    groups = [g for g in find_groups(program)[0] if g.kind in ("heads", "neurons")]
    kept = {g: torch.arange(g.size) for g in groups}
    context = PassContext(calibration=spool([(x,) for x, _ in _data(4, 3)], program))
    found = tuned_scales(program, kept, context, damping=0.01, padding_mask="")
    assert len(found) == 4
    for r in found.values():
        assert r is not None
        assert torch.equal(r, torch.ones_like(r))


def test_latency_by_the_tables_of_a_timer(program: Program) -> None:
    after, _ = _run(program, MacsTimer(), latency=0.6)
    left = cost(after).macs / cost(program).macs
    assert 0.5 < left <= 0.6 + 1e-6
    with pytest.raises(RequirementError, match="latency"):
        _run(program, latency=0.6)


def test_in_a_recipe(program: Program) -> None:
    data = _data(8, 1)
    recipe = Recipe.parse("prune-transformer{macs=0.7,tune=false}")
    after = run_pipeline(program, recipe, PassContext(labeled=data, loss=_loss)).program
    assert cost(after).macs <= 0.7 * cost(program).macs


def test_options() -> None:
    with pytest.raises(ValueError, match="not both"):
        PruneTransformer(macs=0.5, latency=0.5)
    with pytest.raises(ValueError, match="share"):
        PruneTransformer(macs=1.5)
    assert len(PruneTransformer(tune=False).needs()) == 2


def test_nothing_to_cut() -> None:
    net = nn.Linear(16, 3).eval()
    program = capture(net, (torch.randn(4, 6, 16),))
    with pytest.raises(NothingToDoError, match="no heads or neurons"):
        _run(program)


class Padded(nn.Module):
    """A feed-forward unit over tokens, and their mean without padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x + self.down(F.gelu(self.up(x)))
        z: Tensor = (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return z


def test_padding_has_no_say() -> None:
    mask = (torch.arange(6) < torch.tensor([[3], [6], [2], [5]])).float()
    program = capture(Padded().eval(), (torch.randn(4, 6, 16), mask))
    (group,) = find_groups(program)[0]
    kept = {group: torch.arange(0, 24, 2)}

    def found(junk: float, name: str) -> Tensor:
        inputs = [(x + junk * (1 - mask).unsqueeze(-1), mask) for x, _ in _data(8, 3)]
        context = PassContext(calibration=spool(inputs, program))
        r = tuned_scales(program, kept, context, damping=0.01, padding_mask=name)[group]
        assert r is not None
        return r

    assert torch.equal(found(0.0, "mask"), found(3.0, "mask"))
    assert not torch.allclose(found(0.0, ""), found(3.0, ""), atol=1e-2)
