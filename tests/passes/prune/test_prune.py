"""The baselines: which units leave, how many, under a share or a budget, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.cost import cost
from planish.ir.errors import NothingToDoError, RequirementError
from planish.ir.execute import run
from planish.ir.rewriter import Rewriter
from planish.passes.base import PassContext, PassResult
from planish.passes.prune.budget import under_budget, work_left
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.cut import cut
from planish.passes.prune.prune import Prune
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe
from tests.passes.prune.test_interpolate import Small, X, drawn, macs, program
from tests.passes.rounding.nets import tensor
from tests.support.check import run_checked


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def labeled(said: list[str] | None = None) -> PassContext:
    labels = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(3))
    batches = list(zip(X.split(1), labels.split(1), strict=True))
    found = PassContext(labeled=batches, loss=loss)
    if said is not None:
        found.remark = said.append
    return found


def silent(small: Small) -> Small:
    """Some neurons reach no output, with weights as large as the others'."""
    with torch.no_grad():
        small.five.weight[:, [2, 9, 11, 15]] = 0
    return small


@pytest.mark.parametrize("score", ["magnitude", "taylor", "fisher"])
def test_every_group_keeps_its_share(score: str) -> None:
    made = program(Small(), X)
    said: list[str] = []
    options = Prune(score=score, keep=0.5)  # type: ignore[arg-type]  # a literal
    result = run_checked(made, options, labeled(said))
    groups, _ = find_groups(result.program)
    assert [g.size for g in groups] == [4, 6, 8]
    assert any("multiply-accumulates" in line for line in said)


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_scores_of_the_loss_find_units_that_do_nothing(score: str) -> None:
    made = program(silent(Small()), X)
    options = Prune(score=score, keep=0.75, where=Where(include=("four",)))  # type: ignore[arg-type]  # a literal from a table
    result = run_checked(made, options, labeled())
    assert torch.allclose(run(result.program, (X,))[0], run(made, (X,))[0], atol=1e-5)
    assert tensor(result.program, "five.weight").shape == (5, 12)


def test_magnitude_takes_the_smallest_rows() -> None:
    small = Small()
    with torch.no_grad():
        small.four.weight[[0, 5, 6, 13]] *= 0.01
    made = program(small, X)
    options = Prune(keep=0.75, where=Where(include=("four",)))
    result = run_checked(made, options)
    kept = [i for i in range(16) if i not in (0, 5, 6, 13)]
    assert torch.equal(tensor(result.program, "four.weight"), small.four.weight[kept])


@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.2])
def test_the_budget_of_work_is_met_and_barely(ratio: float) -> None:
    made = program(Small(), X)
    result: PassResult = run_checked(made, Prune(rule="macs", ratio=ratio))
    assert ratio - 0.15 < macs(result, made) <= ratio


def test_a_budget_that_cannot_be_met_gives_the_least_and_says_so() -> None:
    made = program(Small(), X)
    said: list[str] = []
    result = run_checked(made, Prune(rule="macs", ratio=0.001), PassContext(remark=said.append))
    assert {g.size for g in find_groups(result.program)[0]} <= {1}
    assert any("is the least that can be reached; ratio asks for 0.1 %" in line for line in said)


def test_what_is_said_to_be_left_of_the_work_is_left() -> None:
    made = program(Small(), X)
    groups, _ = find_groups(made)
    counts = dict(zip(groups, (3, 7, 5), strict=True))
    said = work_left(made, groups)(counts)
    rewriter = Rewriter(made, "test")
    cut(rewriter, {g: torch.arange(k) for g, k in counts.items()})
    assert said == cost(rewriter.finish()).macs


def test_the_fewest_units_that_meet_the_budget_leave() -> None:
    made = program(Small(), X)
    groups, _ = find_groups(made)
    scores = {g: torch.arange(1.0, g.size + 1) + 100 * i for i, g in enumerate(groups)}
    left = work_left(made, groups)
    target = 0.9 * cost(made).macs
    counts, reached = under_budget(made, scores, target)
    assert reached <= target
    assert [g.size - counts[g] for g in groups[1:]] == [0, 0]
    one_more = {**counts, groups[0]: counts[groups[0]] + 1}
    assert left(one_more) > target


def test_nothing_to_cut() -> None:
    made = program(nn.Sequential(nn.Linear(4, 3)), drawn(8, 4))
    with pytest.raises(NothingToDoError, match="no units to cut"):
        Prune().run(made, PassContext())
    small = program(Small(), X)
    with pytest.raises(RequirementError):
        Prune(score="fisher").run(small, PassContext())


def test_options() -> None:
    assert not Prune().needs()
    assert Prune(score="taylor").needs() == Prune.requires
    for options in ({"keep": 0.0}, {"ratio": 0.5}, {"rule": "macs", "keep": 0.5}):
        with pytest.raises(ValueError, match=r"keep|ratio"):
            Prune(**options)
    text = "prune{score=fisher, rule=macs, ratio=0.4}, interpolate{mode=iterated, macs=0.7}"
    assert Recipe.parse(str(Recipe.parse(text))) == Recipe.parse(text)
