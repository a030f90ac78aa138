"""Lottery tickets: counts, exactness of masks, rewinding, the barrier; known answers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.errors import UsageError, VerificationError
from planish.lottery import Ticket, error_barrier, find_ticket, prune, random_masks
from planish.masking import masked, prunable

FEATURES = torch.eye(4)
TARGET = torch.tensor([[3.0], [2.0], [0.0], [0.0]])


class Toy(nn.Module):
    """``y = x w`` on orthonormal features, all weights 0.1 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1, bias=False)
        nn.init.constant_(self.fc.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def train(
    model: nn.Module, *, start: int, stop: int | None, seed: int, steps: int = 200, **how: Any
) -> None:
    """Gradient descent on the toy; ``how`` is for the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.5, **how})
    for _ in range(start, steps if stop is None else stop):
        optimizer.zero_grad()
        ((model(FEATURES) - TARGET) ** 2).sum().backward()
        optimizer.step()


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return float(((model(FEATURES) - TARGET) ** 2).sum())


def accuracy(model: nn.Module) -> float:
    return 1 - error(model)


def test_counts_of_three_levels_are_exact() -> None:
    masks = {"w": torch.ones(1000, dtype=torch.bool)}
    scores = {"w": torch.ones(1000)}  # all alike: ties must not take more
    counts = []
    for _ in range(3):
        masks = prune(masks, scores, 0.2)
        counts.append(int(masks["w"].sum()))
    assert counts == [800, 640, 512]


def test_layers_are_ranked_together_and_none_vanishes() -> None:
    masks = {"a": torch.ones(10, dtype=torch.bool), "b": torch.ones(10, dtype=torch.bool)}
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100}
    assert [int(m.sum()) for m in prune(masks, scores, 0.5).values()] == [0, 10]
    assert [int(m.sum()) for m in prune(masks, scores, 0.5, 0.2).values()] == [2, 8]


def test_masked_weights_do_not_use_up_the_quota() -> None:
    masks = {"w": torch.tensor([True, True, False, False])}
    after = prune(masks, {"w": torch.tensor([5.0, 1.0, 9.0, -9.0])}, 0.5)
    assert after["w"].tolist() == [True, False, False, False]


def test_a_mask_of_ones_and_the_same_seed_give_the_dense_run_bit_for_bit() -> None:
    plain, held = Toy(), Toy()
    train(plain, start=0, stop=None, seed=0, momentum=0.9, weight_decay=1e-2, lr=0.05)
    with masked(held, {"fc.weight": torch.ones(1, 4, dtype=torch.bool)}):
        train(held, start=0, stop=None, seed=0, momentum=0.9, weight_decay=1e-2, lr=0.05)
    assert torch.equal(plain.fc.weight, held.fc.weight)


def test_the_toy_gives_the_mask_of_the_trained_weights_and_rewinds() -> None:
    model = Toy()
    ticket = find_ticket(model, train, accuracy, levels=1, rate=0.5, least_density=0)
    assert ticket.masks["fc.weight"].tolist() == [[True, True, False, False]]
    assert torch.equal(ticket.rewound["fc.weight"], torch.full((1, 4), 0.1))
    assert ticket.model.get_parameter("fc.weight")[0].tolist() == pytest.approx([3, 2, 0, 0])
    assert [level.density for level in ticket.levels] == [1, 0.5]
    assert ticket.levels[1].metric == pytest.approx(1)
    assert torch.equal(model.fc.weight, torch.full((1, 4), 0.1))  # the caller's is as it was


def test_rewinding_goes_to_the_weights_of_that_step() -> None:
    early = Toy()
    train(early, start=0, stop=3, seed=0, lr=0.05)

    def slow(model: nn.Module, *, start: int, stop: int | None, seed: int) -> None:
        train(model, start=start, stop=stop, seed=seed, lr=0.05)

    ticket = find_ticket(Toy(), slow, accuracy, levels=1, rate=0.5, rewind=3)
    assert torch.equal(ticket.rewound["fc.weight"], early.fc.weight.detach())


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    ],
    ids=["sgd", "nesterov", "adamw", "rmsprop"],
)
def test_masked_weights_stay_exactly_zero_even_with_an_old_optimizer(kind: Any) -> None:
    model, mask = Toy(), torch.tensor([[True, False, True, False]])
    optimizer = kind(model.parameters())

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            ((model(FEATURES) - TARGET) ** 2).sum().backward()
            optimizer.step()

    steps(5)  # momentum of the weights that will be masked
    with masked(model, {"fc.weight": mask}):
        for _ in range(20):
            steps(5)
            assert bool((model.fc.weight[~mask] == 0).all())
        assert bool((model.fc.weight[mask] != 0).all())
    steps(1)
    assert bool((model.fc.weight[~mask] != 0).any())  # nothing is held behind the context


def test_weights_brought_back_by_other_means_are_an_error() -> None:
    model, mask = Toy(), torch.tensor([[True, False, True, False]])
    with pytest.raises(VerificationError, match=r"brought back 2 weights of fc\.weight"):
        with masked(model, {"fc.weight": mask}):
            model.fc.weight.data.fill_(1)


def test_shared_weights_are_pruned_once_and_named_modules_are_left_dense() -> None:
    one = nn.Linear(3, 3)
    model = nn.Sequential(one, nn.ReLU(), one, nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    assert list(prunable(model)) == ["0.weight", "3.weight"]
    assert list(prunable(model, ("3",))) == ["0.weight"]
    with pytest.raises(UsageError, match="no module or parameter '7'"):
        prunable(model, ("7",))


def test_random_masks_keep_the_count_of_each_layer_and_follow_the_seed() -> None:
    masks = {"a": torch.rand(8, 8) > 0.7, "b": torch.rand(3, 9) > 0.2}
    drawn = random_masks(masks, torch.Generator().manual_seed(1))
    assert {n: int(m.sum()) for n, m in drawn.items()} == {
        n: int(m.sum()) for n, m in masks.items()
    }
    again = random_masks(masks, torch.Generator().manual_seed(1))
    assert all(torch.equal(drawn[n], again[n]) for n in masks)


class Point(nn.Module):
    """One number."""

    def __init__(self, x: float):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(float(x)))
        self.register_buffer("count", torch.tensor(3))


def number(model: nn.Module) -> float:
    return float(model.get_parameter("x"))


def test_the_barrier_of_a_convex_error_is_none_and_that_of_two_wells_is_their_wall() -> None:
    assert error_barrier(Point(-1), Point(1), lambda m: number(m) ** 2) <= 0
    wall = error_barrier(Point(-1), Point(1), lambda m: (number(m) ** 2 - 1) ** 2)
    assert wall == pytest.approx(1)


def test_the_barrier_changes_no_model_and_recalibrates_those_between() -> None:
    a, b, seen = Point(-1), Point(1), []
    error_barrier(a, b, number, points=3, recalibrate=lambda m: seen.append(number(m)))
    assert (number(a), number(b), seen) == (-1, 1, [0])
    with pytest.raises(UsageError, match="differ in parameters"):
        error_barrier(a, Toy(), number)


def test_control_and_barrier_are_measured_at_each_level() -> None:
    told: list[tuple[int, int]] = []
    ticket = find_ticket(
        Toy(), train, accuracy, levels=1, rate=0.5, random_control=True, barrier=True,
        tell=lambda done, total: told.append((done, total)), seed=3,
    )  # fmt: skip
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)
    dense, sparse = ticket.levels
    assert dense.random is None
    assert sparse.random is not None
    assert sparse.metric >= sparse.random
    assert dense.barrier == pytest.approx(0, abs=1e-6)


def test_another_score_is_used_and_checked() -> None:
    def upside_down(model: nn.Module, masks: Any) -> dict[str, Tensor]:
        return {n: -model.get_parameter(n).detach().abs() for n in masks}

    def run(score: Any) -> Ticket:
        return find_ticket(Toy(), train, accuracy, levels=1, rate=0.5, score=score)

    assert run(upside_down).masks["fc.weight"].tolist() == [[False, False, True, True]]
    with pytest.raises(UsageError, match=r"fc\.weight are missing"):
        run(lambda model, masks: {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels=0"),
        ({"rate": 1.0}, "rate=1.0"),
        ({"rewind": -1}, "rewind=-1"),
        ({"least_density": 1.0}, "least_density=1.0"),
        ({"dense": ("fc",)}, "no weight of a linear"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_ticket(copy.deepcopy(Toy()), train, accuracy, **{"levels": 1, **options})


def test_a_mask_of_numbers_is_refused() -> None:
    model = nn.Linear(2, 2)
    with (
        pytest.raises(UsageError, match=r"the mask of 'weight' is torch.int64, not bool"),
        masked(model, {"weight": torch.ones(2, 2, dtype=torch.int64)}),
    ):
        pass
