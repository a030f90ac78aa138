"""The pass: exact where units are combinations of others, within its budget, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.errors import NothingToDoError, PassError, RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.rewriter import SiteCounter
from planish.passes.base import PassContext, PassResult
from planish.passes.calibrate import spool
from planish.passes.prune.activations import Activations
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.interpolate import Interpolate
from planish.passes.quantize.where import Where
from tests.passes.rounding.nets import tensor
from tests.support.check import run_checked


class Small(nn.Module):
    """Three convolutions, one of them depthwise, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(1, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.two = nn.Conv2d(8, 12, 1)
        self.four, self.five = nn.Linear(12 * 9, 16), nn.Linear(16, 5)
        for layer in (self.one, self.deep, self.two, self.four):
            # No unit is dead, and none is an affine function of the others.
            nn.init.kaiming_normal_(layer.weight)
            nn.init.constant_(layer.bias, 0.2)  # type: ignore[arg-type]  # each has one

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).relu()
        h = nn.functional.max_pool2d(self.deep(h).relu(), 2)
        h = self.two(h).relu().flatten(1)
        y: Tensor = self.five(self.four(h).relu())
        return y


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def program(module: nn.Module, x: Tensor) -> Program:
    return capture(module.eval(), (x[:2],), dynamic_shapes=({0: Dim("batch", max=999)},))


def context(made: Program, x: Tensor, said: list[str] | None = None) -> PassContext:
    found = PassContext(calibration=spool(list(x.split(20)), made))
    if said is not None:
        found.remark = said.append
    return found


def copied(small: Small) -> Small:
    """Half of the units of every layer but the last become copies of the other half."""
    with torch.no_grad():
        for layer in (small.one, small.deep, small.two, small.four):
            half = len(layer.weight) // 2
            layer.weight[half:] = layer.weight[:half]
            assert layer.bias is not None
            layer.bias[half:] = layer.bias[:half]
    return small


def macs(result: PassResult, made: Program) -> float:
    return cost(result.program).macs / cost(made).macs


X = drawn(60, 1, 6, 6, seed=1)


@pytest.mark.parametrize(
    "options",
    [
        Interpolate(),
        Interpolate(keep=0.5),
        Interpolate(tolerance=1e-5),
        Interpolate(mode="iterated", macs=0.45, step=0.9),
        Interpolate(tolerance=1e-5, constant=True),
    ],
    ids=["default", "keep", "tolerance", "iterated", "constant"],
)
def test_copies_leave_and_nothing_changes(options: Interpolate) -> None:
    made = program(copied(Small()), X)
    said: list[str] = []
    result = run_checked(made, options, context(made, X, said))
    (wanted,), (found,) = run(made, (X,)), run(result.program, (X,))
    assert torch.allclose(found, wanted, atol=1e-5)
    groups, _ = find_groups(result.program)
    sizes = [g.size for g in groups]
    if options.mode == "one-shot":
        # A tolerance also finds what the copies' readers make of fewer inputs.
        assert sizes == [4, 6, 8] if options.tolerance is None else sizes <= [4, 6, 8]
    assert macs(result, made) < 0.45
    assert "decisions agree with those before on 100.00 % of 60 calibration inputs" in said


def test_the_next_layer_makes_up_for_what_is_gone() -> None:
    """Against the same units cut and nothing folded: what bisection sees when folds are denied."""
    made = program(Small(), X)
    result = run_checked(made, Interpolate(keep=0.75), context(made, X))
    folds = frozenset(f"{c.rule}@{c.node}" for c in result.changes if c.rule == "fold-units")
    assert len(folds) == 3
    given = context(made, X)
    given.sites = SiteCounter(excluded=folds)
    bare = Interpolate(keep=0.75).run(made.clone(), given)
    assert cost(bare.program) == cost(result.program)
    (wanted,) = run(made, (X,))
    error, bare_error = (
        float((run(p, (X,))[0] - wanted).norm()) for p in (result.program, bare.program)
    )
    assert error < 0.8 * bare_error


def test_the_budget_of_work_is_met_and_barely() -> None:
    made = program(Small(), X)
    said: list[str] = []
    result = run_checked(made, Interpolate(mode="iterated", macs=0.6), context(made, X, said))
    assert 0.45 < macs(result, made) <= 0.6
    assert any(line.endswith("rounds") for line in said)


def test_a_budget_that_cannot_be_met_gives_the_least_and_says_so() -> None:
    made = program(Small(), X)
    said: list[str] = []
    options = Interpolate(mode="iterated", macs=0.01, step=0.5)
    result = run_checked(made, options, context(made, X, said))
    assert {g.size for g in find_groups(result.program)[0]} <= {1}
    assert any("is the least that can be reached; macs asks for 1.0 %" in line for line in said)


@pytest.mark.parametrize(("limit", "cuts"), [(0, 0), (2, 1), (3, 1)])
def test_sites_may_be_denied(limit: int, cuts: int) -> None:
    """Each round has a fold for each reader and a cut; a fold alone changes nothing but numbers."""
    made = program(Small(), X)
    given = context(made, X)
    given.sites = SiteCounter(limit=limit)
    result = Interpolate(mode="iterated", macs=0.7).run(made.clone(), given)
    assert len(result.changes) == limit
    before, after = (sum(g.size for g in find_groups(p)[0]) for p in (made, result.program))
    assert (before > after) == bool(cuts)
    assert len(run(result.program, (X,))[0]) == len(X)


def test_rounds_run_only_what_is_behind_the_cut() -> None:
    made = program(Small(), X)
    groups, _ = find_groups(made)
    work = Activations(made, spool([X], made))
    first = work.triangles(groups, resume=[g.first for g in groups])
    whole = work.evaluated
    nodes = list(made.graph.nodes)
    work.forget(set(nodes[: nodes.index(groups[-1].first)]))
    again = work.triangles(groups[-1:])
    assert 0 < work.evaluated - whole <= 2, "the last linear and its activation"
    assert torch.equal(first[groups[-1]].r(), again[groups[-1]].r())
    work = Activations(made, spool([X], made), limit=0)
    assert torch.allclose(work.triangles(groups[-1:])[groups[-1]].r(), again[groups[-1]].r())


def test_too_few_positions_are_refused_by_name() -> None:
    made = program(Small(), X)
    result = run_checked(made, Interpolate(), context(made, X[:20]))
    (refusal,) = [r for r in result.refusals if "positions" in r.reason]
    assert "seen at 20 positions" in refusal.reason
    assert "at least 32 are wanted" in refusal.reason
    assert tensor(result.program, "five.weight").shape == (5, 16)


def test_dead_units_leave_first() -> None:
    small = Small()
    with torch.no_grad():
        small.two.weight[[1, 4, 7]] = 0
        assert small.two.bias is not None
        small.two.bias[[1, 4, 7]] = -1
    made = program(small, X)
    where = Where(include=("two",))
    result = run_checked(made, Interpolate(keep=0.75, where=where), context(made, X))
    assert torch.allclose(run(result.program, (X,))[0], run(made, (X,))[0], atol=1e-5)
    assert len(tensor(result.program, "two.weight")) == 9
    assert len(tensor(result.program, "one.weight")) == 8


def test_all_units_dead() -> None:
    small = Small()
    with torch.no_grad():
        small.two.weight.zero_()
        assert small.two.bias is not None
        small.two.bias.fill_(-1)
    made = program(small, X)
    result = run_checked(
        made, Interpolate(keep=0.5, where=Where(include=("two",))), context(made, X)
    )
    assert torch.equal(run(result.program, (X,))[0], run(made, (X,))[0])


def test_padding_is_left_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x).relu()) * mask.unsqueeze(-1)
            return y

    x, mask = drawn(8, 10, 4), torch.ones(8, 10)
    x[:, 6:], mask[:, 6:] = 50 * drawn(8, 4, 4, seed=3), 0
    made = capture(
        Tokens().eval(),
        (x, mask),
        dynamic_shapes=({0: Dim("b", max=99), 1: Dim("t", max=99)},) * 2,
    )
    short = [(x[:, :6].contiguous(), mask[:, :6].contiguous())]
    masked, bare, alone = (
        tensor(
            Interpolate(keep=0.5, padding_mask=name)
            .run(made.clone(), PassContext(calibration=spool(batches, made)))
            .program,
            "two.weight",
        )
        for name, batches in (("mask", [(x, mask)]), ("", [(x, mask)]), ("mask", short))
    )
    assert torch.allclose(masked, alone, atol=1e-6)
    assert masked.shape == bare.shape
    assert not torch.allclose(masked, bare, atol=1e-2)


def test_values_that_are_not_finite_are_named() -> None:
    made = program(Small(), X)
    broken = X.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(PassError, match="not all values are finite"):
        Interpolate().run(made.clone(), context(made, broken))


def test_nothing_to_cut() -> None:
    made = program(nn.Sequential(nn.Linear(4, 3)), drawn(8, 4))
    with pytest.raises(NothingToDoError, match="no units to cut"):
        Interpolate().run(made, context(made, drawn(8, 4)))
    with pytest.raises(RequirementError):
        Interpolate().run(made, PassContext())


def test_a_tolerance_that_nothing_meets_leaves_the_program() -> None:
    made = program(Small(), X)
    said: list[str] = []
    options = Interpolate(tolerance=0.0, where=Where(include=("one", "deep")))
    result = run_checked(made, options, context(made, X, said))
    assert not result.changes
    assert "within this tolerance every unit stays" in said


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1.5},
        {"tolerance": -1.0},
        {"keep": 0.5, "tolerance": 0.1},
        {"macs": 0.5},
        {"mode": "iterated", "keep": 0.5},
        {"mode": "iterated", "step": 1.0},
    ],
)
def test_options_that_contradict(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"keep|tolerance|macs|step"):
        Interpolate(**options)  # type: ignore[arg-type]  # strings and numbers, on purpose
