"""Pruning by the loss as a pass: counts, order, steps, memory, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import RequirementError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe
from planish.passes.sparsify.gradual import prune_by_loss, schedule
from planish.passes.sparsify.judging import How
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import find_sites
from planish.passes.sparsify.sparsify import Sparsify
from tests.support.check import run_checked

LOSS_SCORES = ("woodfisher", "fisher", "undecayed")


class Net(nn.Module):
    """A grouped convolution, and two linears of one shared weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 2, groups=2)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(F.relu(self.one(self.conv(x).relu().mean((2, 3)))))
        return y


def loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def labeled(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 8, 3, 3, generator=made), torch.randint(0, 8, (4,), generator=made))
        for _ in range(count)
    ]


DATA = labeled()
PROGRAM = capture(Net().eval(), (DATA[0][0],))


def context(**changes: Any) -> PassContext:
    return replace(PassContext(labeled=DATA, loss=loss), **changes)


def weights(program: Program) -> list[Tensor]:
    """The pruned weights by their shapes: the convolution's, and the shared one."""
    found = {tuple(v.shape): v for v in program.constants.values() if isinstance(v, Tensor)}
    return [found[8, 4, 2, 2], found[8, 8]]


def zeros(program: Program) -> list[int]:
    return [int((w == 0).sum()) for w in weights(program)]


@pytest.mark.parametrize("score", LOSS_SCORES)
@pytest.mark.parametrize("pattern", ["2:4", "2x2", "unstructured"])
def test_it_fires_and_keeps_all_promises(score: str, pattern: str) -> None:
    pass_ = Sparsify(score=score, pattern=pattern, ratio=0.75)  # type: ignore[arg-type]  # a literal from a table
    result = run_checked(PROGRAM, pass_, context())
    assert len(result.changes) == 2  # the shared weight once
    assert len(result.program.layouts) == 2
    total = 128 + 64
    assert sum(zeros(result.program)) == (total // 2 if pattern == "2:4" else total * 3 // 4)
    again = run_checked(PROGRAM, pass_, context())
    for a, b in zip(weights(result.program), weights(again.program), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("score", ["magnitude", *LOSS_SCORES])
def test_the_scope_says_who_is_ranked_with_whom(score: str) -> None:
    options: dict[str, Any] = {"score": score, "pattern": "unstructured", "ratio": 0.5}
    apart = run_checked(PROGRAM, Sparsify(**options, scope="layer"), context())
    assert zeros(apart.program) == [64, 32]
    together = run_checked(PROGRAM, Sparsify(**options, scope="global"), context())
    assert sum(zeros(together.program)) == 96
    assert zeros(together.program) != [64, 32]


def autograd() -> list[list[Tensor]]:
    """The gradients of the module itself, batch by batch."""
    model = Net().eval()
    parameters = [model.conv.weight, model.one.weight]
    return [[*torch.autograd.grad(loss(model(b[0]), b), parameters)] for b in DATA]


def test_fisher_takes_the_lowest_of_all_layers_by_the_sum_of_squares() -> None:
    model = Net().eval()
    values = [model.conv.weight.detach(), model.one.weight.detach()]
    scores = [
        w.square() * torch.stack(g).square().mean(0) / 2
        for w, g in zip(values, zip(*autograd(), strict=True), strict=True)
    ]
    limit = torch.cat([s.flatten() for s in scores]).sort().values[96]
    pass_ = Sparsify(score="fisher", pattern="unstructured")
    found = weights(run_checked(PROGRAM, pass_, context()).program)
    for w, s, v in zip(found, scores, values, strict=True):
        assert torch.equal(w, torch.where(s >= limit, v, 0))


def test_woodfisher_of_one_block_is_the_formula_on_all_weights() -> None:
    pass_ = Sparsify(score="woodfisher", pattern="unstructured", scope="layer", block_size=999)
    found = weights(run_checked(PROGRAM, replace(pass_, damping=1e-3), context()).program)[1]
    g = torch.stack([b[1].flatten() for b in autograd()]).double()
    f = 1e-3 * torch.eye(64).double() + g.t() @ g / len(g)
    w = Net().one.weight.detach().flatten().double()
    scores = w.square() / torch.linalg.inv(f).diagonal()
    gone = torch.zeros(64, dtype=torch.bool)
    gone[scores.argsort()[:32]] = True
    change = torch.linalg.solve(f[~gone][:, ~gone], f[~gone][:, gone] @ w[gone])
    known = torch.zeros(64).double().masked_scatter(~gone, w[~gone] + change)
    torch.testing.assert_close(found.flatten().double(), known, rtol=1e-4, atol=1e-5)


def test_equal_scores_go_by_position() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    program = capture(model.eval(), (torch.randn(2, 4),))
    pass_ = Sparsify(score="magnitude", pattern="unstructured", scope="global", ratio=0.25)
    made = run_checked(program, pass_).program
    kept = [int((v != 0).sum()) for v in made.constants.values() if isinstance(v, Tensor)]
    assert sorted(kept) == [8, 16]  # the last ones go, all of one layer


def pruned(how: How, told: list[tuple[int, int]], pattern: str, **options: Any) -> Program:
    program = PROGRAM.clone()
    rewriter = Rewriter(program, "sparsify")
    parsed = Pattern.parse(pattern)
    sites, _ = find_sites(program, parsed, Where())
    made = context(tell=lambda done, total: told.append((done, total)))
    ratios = {site.name: 0.6 for site in sites}
    prune_by_loss(rewriter, sites, made, parsed, ratios, how, **options)
    return rewriter.finish()


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_one_layer_at_a_time_gives_the_same(pattern: str) -> None:
    at_once: list[tuple[int, int]] = []
    one_by_one: list[tuple[int, int]] = []
    options: dict[str, Any] = {"together": True, "steps": 2}
    how = How("woodfisher", block_size=16)
    first = pruned(how, at_once, pattern, **options)
    second = pruned(replace(how, bytes_at_once=1), one_by_one, pattern, **options)
    for a, b in zip(weights(first), weights(second), strict=True):
        assert torch.equal(a, b)
    # Two steps, two layers; unstructured ones are ranked together, then read again to repair.
    readings = 8 if pattern == "unstructured" else 4
    assert at_once[-1] == (2 * len(DATA),) * 2
    assert one_by_one[-1] == (readings * len(DATA),) * 2
    for told in (at_once, one_by_one):
        assert told[0][0] == 0
        assert [t[0] for t in told] == sorted(t[0] for t in told)
        assert told[-2] == told[-1]  # the total that was told first is what was done


def test_steps_are_cubic_and_groups_lose_one_after_another() -> None:
    shares = [share for _, share in schedule(Pattern.parse("unstructured"), 4)]
    assert shares == [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]
    assert schedule(Pattern.parse("2:4"), 1) == [(Pattern.parse("2:4"), 1.0)]
    for steps, texts in ((2, ["3:4", "2:4"]), (9, ["3:4", "2:4"])):
        assert [str(p) for p, _ in schedule(Pattern.parse("2:4"), steps)] == texts
    assert [str(p) for p, _ in schedule(Pattern.parse("1:8"), 3)] == ["6:8", "3:8", "1:8"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_steps_read_gradients_anew_and_give_another_result(pattern: str) -> None:
    how = How("woodfisher", block_size=16)
    one, two = (pruned(how, [], pattern, together=True, steps=n) for n in (1, 2))
    assert zeros(one) == zeros(two) if pattern == "2:4" else sum(zeros(one)) == sum(zeros(two))
    assert any(not torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_more_steps_than_a_group_has_are_remarked() -> None:
    remarks: list[str] = []
    run_checked(PROGRAM, Sparsify(score="fisher", steps=5), context(remark=remarks.append))
    assert remarks == ["2 steps in place of 5: 2:4 takes 2 of each group"]


def test_fewer_gradients_than_planned_are_remarked_once() -> None:
    remarks: list[str] = []
    pass_ = Sparsify(score="woodfisher", pattern="unstructured", gradients=12, steps=2)
    found = run_checked(PROGRAM, pass_, context(remark=remarks.append)).program
    assert len(remarks) == 1
    assert remarks[0].startswith("6 of 12 planned gradients arrived: F divides by 12")
    assert remarks[0].endswith("damping weighs 2 times as much")
    # Which is F of the six, with twice the damping.
    doubled = replace(pass_, gradients=None, damping=2e-5)
    same = run_checked(PROGRAM, doubled, context()).program
    for a, b in zip(weights(found), weights(same), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_more_gradients_than_planned_are_read() -> None:
    remarks: list[str] = []
    pass_ = Sparsify(score="fisher", gradients=2)
    few = run_checked(PROGRAM, pass_, context(remark=remarks.append)).program
    same = run_checked(PROGRAM, Sparsify(score="fisher"), context(labeled=DATA[:2])).program
    assert remarks == []
    for a, b in zip(weights(few), weights(same), strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_is_gone_is_remarked() -> None:
    remarks: list[str] = []

    def half(outputs: Tensor, batch: Any) -> Tensor:
        return 1e-9 * outputs.sum() + 0 * loss(outputs, batch)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        next(model.parameters()).mul_(1e-6)
    program = capture(model, (torch.randn(2, 4),))
    data = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))]
    pass_ = Sparsify(score="fisher", pattern="unstructured")
    made = PassContext(labeled=data, loss=half, remark=remarks.append)
    run_checked(program, pass_, made)
    assert remarks == ["nothing is left of 0.weight: exclude it, or rank by layer"]


def test_labels_and_loss_are_both_named_by_the_pipeline() -> None:
    for score in LOSS_SCORES:
        recipe = Recipe.parse(f"sparsify{{score={score}}}")
        with pytest.raises(RequirementError, match="requires labels and loss") as caught:
            run_pipeline(PROGRAM, recipe, PassContext())
        assert "labeled=" in str(caught.value.hint)
        assert "loss=" in str(caught.value.hint)


def test_a_gradient_that_is_nan_is_an_error_and_names_the_batch() -> None:
    def cliff(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - outputs.detach()).square().sum().sqrt() + outputs.sum()

    with pytest.raises(UsageError, match="is not finite") as caught:
        run_pipeline(PROGRAM, Recipe.parse("sparsify{score=woodfisher}"), context(loss=cliff))
    assert "labeled batch 0" in str(caught.value.where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "obc", "scope": "global"}, "obc scores the output of one layer"),
        ({"score": "wanda", "steps": 2}, "steps is 2"),
        ({"score": "fisher", "steps": 0}, "steps is 0"),
        ({"score": "woodfisher", "damping": 0.0}, "needs damping above 0"),
        ({"score": "fisher", "taylor": True}, "taylor is of score=woodfisher"),
        ({"score": "woodfisher", "block_size": 0}, "block_size is 0"),
        ({"score": "undecayed", "decay": -1.0}, "decay is -1"),
        ({"score": "fisher", "gradients": 0}, "gradients is 0"),
        ({"score": "fisher", "damping": -1.0}, "damping is -1"),
        ({"score": "sparsegpt", "damping": float("nan")}, "damping is nan"),
        ({"score": "obc", "damping": float("inf")}, "damping is inf"),
        ({"score": "undecayed", "decay": float("nan")}, "decay is nan"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsify(**options)


def test_blocks_of_fisher_hold_whole_groups() -> None:
    assert Sparsify(score="woodfisher", block_size=50).how().block_size == 52
    assert Sparsify(score="woodfisher", pattern="3:5").how().block_size == 65
    assert (
        Sparsify(score="woodfisher", pattern="unstructured", block_size=50).how().block_size == 50
    )


def learned(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A small net that has learned its data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(120, 8)
    y = (x[:, :4].sum(1) > 0).long() + (x[:, 4:].sum(1) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def test_repair_is_worth_more_than_the_diagonal() -> None:
    """On the mean of three nets; on one so small it is a matter of luck."""
    found = {"fisher": 0.0, "woodfisher": 0.0}
    for seed in range(3):
        model, x, y = learned(seed)
        program = capture(model, (x[:1],))  # gradients of single samples
        data = list(zip(x.split(1), y.split(1), strict=True))
        for score in found:
            pass_ = Sparsify(score=score, pattern="2:4")  # type: ignore[arg-type]  # a literal from a table
            made = run_checked(program, pass_, PassContext(labeled=data, loss=loss)).program
            outputs = torch.cat([run(made, (row,))[0] for row in x.split(1)])
            found[score] += float(F.cross_entropy(outputs, y)) / 3
    assert found["woodfisher"] < 0.8 * found["fisher"]
