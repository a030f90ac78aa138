"""Every score of sparsify ranks the weights of a lottery ticket."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.errors import RequirementError, UsageError
from planish.lottery import find_ticket, magnitudes
from planish.lottery_scores import scorer
from planish.masking import prunable
from planish.passes.sparsify.methods import Score
from planish.passes.sparsify.sparsify import Sparsify

torch.manual_seed(0)
X, Y = torch.randn(24, 6), torch.randint(0, 3, (24,))
EXAMPLE = (X[:4],)
LABELED = [(x, y) for x, y in zip(X.split(4), Y.split(4), strict=True)]
CALIBRATION = list(X.split(4))


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


GIVEN: dict[str, Any] = {"calibration": CALIBRATION, "labeled": LABELED, "loss": loss}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def first(model: nn.Module) -> nn.Parameter:
    return next(model.parameters())


def train(model: nn.Module, *, start: int, stop: int | None, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(start, stop or 20):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).float().mean())


def masks_of(model: nn.Module, share: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(p.shape, generator=generator) >= share
        for name, p in prunable(model).items()
    }


@pytest.mark.parametrize("score", get_args(Score))
def test_a_ticket_is_found_by_every_score(score: str) -> None:
    ticket = find_ticket(
        net(), train, accuracy, levels=2, rate=0.25, score=scorer(score, EXAMPLE, **GIVEN)
    )
    assert sum(int(m.sum()) for m in ticket.masks.values()) == 41  # 72, 54, 41
    for name, parameter in prunable(ticket.model).items():
        assert not bool(parameter[~ticket.masks[name]].any())


def test_magnitudes_are_those_of_the_driver() -> None:
    model = net()
    masks = masks_of(model)
    found, known = scorer("magnitude", EXAMPLE)(model, masks), magnitudes(model, masks)
    assert all(torch.equal(found[n], known[n].double()) for n in masks)


def test_woodfisher_holds_what_is_gone_at_zero() -> None:
    model = net()
    masks = masks_of(model, 0.4)
    with torch.no_grad():
        for name, parameter in prunable(model).items():
            parameter.masked_fill_(~masks[name], 0)
    how = Sparsify(score="woodfisher", block_size=1000, damping=1e-3)
    found = scorer(how, EXAMPLE, labeled=LABELED, loss=loss)(model, masks)
    name = "0.weight"
    kept = masks[name].flatten()
    rows = []
    for x, y in LABELED:
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), [first(model)])
        rows.append(g.flatten()[kept].double())
    g = torch.stack(rows)
    f = 1e-3 * torch.eye(g.shape[1]).double() + g.t() @ g / len(g)
    w = first(model).detach().flatten()[kept].double()
    known = w.square() / (2 * torch.linalg.inv(f).diagonal())
    torch.testing.assert_close(found[name].flatten()[kept], known, rtol=1e-5, atol=1e-12)


def test_obc_scores_are_the_rise_of_the_layers_error() -> None:
    model = net()
    masks = masks_of(model, 0.3)
    with torch.no_grad():
        for name, parameter in prunable(model).items():
            parameter.masked_fill_(~masks[name], 0)
    found = scorer("obc", EXAMPLE, calibration=CALIBRATION)(model, masks)["0.weight"]
    h = 2 * X.double().t() @ X.double() / len(X)
    h += 0.01 * h.diagonal().mean() * torch.eye(6)
    for row, mask in enumerate(masks["0.weight"]):
        inverse = torch.linalg.inv(h[mask][:, mask])
        w = first(model).detach()[row][mask].double()
        known = w.square() / (2 * inverse.diagonal())
        torch.testing.assert_close(found[row][mask], known, rtol=1e-5, atol=1e-9)


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(F.relu(self.one(x)))
        return y


def test_a_shared_weight_has_one_score_of_the_summed_gradient() -> None:
    model = Tied().eval()
    masks = masks_of(model)
    assert list(masks) == ["one.weight"]
    found = scorer("fisher", EXAMPLE, labeled=LABELED, loss=loss)(model, masks)["one.weight"]
    squares = torch.zeros(6, 6)
    for x, y in LABELED:
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.one.weight])
        squares += g.square() / len(LABELED)
    known = model.one.weight.detach().square() * squares / 2
    torch.testing.assert_close(found.float(), known, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("score", "given", "message"),
    [
        ("woodfisher", {}, "woodfisher requires labels and loss"),
        ("fisher", {"labeled": LABELED}, "fisher requires loss"),
        ("obc", {"labeled": LABELED, "loss": loss}, "obc requires calibrated"),
    ],
)
def test_what_a_score_lacks_is_named_at_once(score: str, given: Any, message: str) -> None:
    with pytest.raises(RequirementError, match=message):
        scorer(score, EXAMPLE, **given)


def test_an_unknown_score_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no score 'taylor'") as caught:
        scorer("taylor", EXAMPLE)
    assert "woodfisher" in str(caught.value.hint)


def test_a_generator_of_labels_is_refused() -> None:
    def once() -> Iterator[Any]:
        yield from LABELED

    judge = scorer("fisher", EXAMPLE, labeled=once(), loss=loss)
    with pytest.raises(UsageError, match="read only once"):
        judge(net(), masks_of(net()))


def test_a_weight_that_no_product_reads_is_named() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(6, 3, 1)).eval()
    judge = scorer("magnitude", (torch.randn(2, 6, 5),))
    with pytest.raises(UsageError, match=r"0\.weight has no score"):
        judge(model, masks_of(model))
