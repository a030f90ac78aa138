"""Lottery tickets: train, prune the smallest weights, rewind to an early step, train again.

Train ``theta_0`` for ``rewind`` steps to ``theta_k``. For each level: train ``theta_k * m`` to the
end, rank the surviving weights of all layers together, let the lowest share go. The ticket is
``theta_k * m``, trained to the end once more.

Source: Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Frankle et al., "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", ICML 2020 (rewinding; the barrier); Chen et al.,
"Sparse Winning Tickets are Data-Efficient Image Recognizers", NeurIPS 2022 (random control).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from planish.ir.errors import UsageError
from planish.masking import apply_masks, masked, prunable

Masks: TypeAlias = dict[str, Tensor]
# (the trained model, its masks) -> for each masked weight a score of its shape, higher is kept
Scorer: TypeAlias = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]


class Train(Protocol):
    """Trains a model in place, from one step to another.

    Every call makes its own optimizer, with the learning rate that belongs to ``start``, and visits
    the data in an order that ``seed`` alone decides. ``stop`` None means to the end.
    """

    def __call__(self, model: nn.Module, *, start: int, stop: int | None, seed: int) -> None:
        """Train."""


@dataclass(frozen=True)
class Level:
    """One round of pruning.

    Attributes:
        number: 0 for the dense model.
        density: share of the prunable weights that are left.
        metric: of the model trained at this density, higher is better.
        random: the same for random masks with as many weights in each layer; None for the dense
            model, and where not asked for.
        barrier: the highest error between two models trained from the rewind point on different
            data orders, less the mean of the two; None where not asked for. Near 0: training is
            stable at this point, and the masks can be trusted.
    """

    number: int
    density: float
    metric: float
    random: float | None = None
    barrier: float | None = None


@dataclass(frozen=True)
class Ticket:
    """What iterative pruning found.

    Attributes:
        model: trained at the last density, in evaluation mode.
        masks: True for what may be nonzero.
        rewound: the parameters and buffers at the rewind point.
        levels: from dense to sparse.
    """

    model: nn.Module
    masks: Masks
    rewound: dict[str, Tensor]
    levels: tuple[Level, ...]

    @property
    def density(self) -> float:
        """Share of the prunable weights that are left."""
        return density(self.masks)


def find_ticket(
    model: nn.Module,
    train: Train,
    evaluate: Callable[[nn.Module], float],
    *,
    levels: int,
    rate: float = 0.2,
    rewind: int = 0,
    score: Scorer | None = None,
    dense: tuple[str, ...] = (),
    least_density: float = 0.01,
    random_control: bool = False,
    barrier: bool = False,
    recalibrate: Callable[[nn.Module], None] | None = None,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Ticket:
    """Prune a model level by level, each time from weights rewound to an early step.

    Args:
        model: untrained (or trained to where rewinding starts); it is not changed.
        train: see ``Train``. It is called ``levels + 1`` times to the end, and once to ``rewind``.
        evaluate: gives an accuracy, 1 minus which is the error; or any score, higher is better.
        levels: rounds of pruning; the density is ``(1 - rate) ** levels`` in the end.
        rate: share of the surviving weights that go at each level.
        rewind: the step that weights go back to; 0 is enough for small nets alone.
        score: ranks the weights of the trained model; None for magnitude.
        dense: modules or parameters that are not pruned.
        least_density: of each layer, below which it is not pruned: no layer may vanish.
        random_control: also train random masks of the same number of weights in each layer.
        barrier: also train a second copy on another data order, and look between the two.
        recalibrate: brings the statistics of batch norms up to date on a model that was averaged.
        seed: of data orders and random masks.
        tell: takes (trainings done, trainings in all).

    Raises:
        UsageError: nothing can be pruned, or an option is out of range.
        VerificationError: ``train`` brought masked weights back.
    """
    _check(levels, rate, rewind, least_density)
    state = copy.deepcopy(model)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in prunable(state, dense).items()}
    if not masks:
        raise UsageError("the model has no weight of a linear or convolution to prune")
    if rewind:
        train(state, start=0, stop=rewind, seed=seed)
    rewound = {name: value.detach().clone() for name, value in state.state_dict().items()}
    total, done = (levels + 1) * (1 + barrier) + levels * random_control, 0
    generator = torch.Generator().manual_seed(seed)

    def trained(chosen: Masks, order: int) -> nn.Module:
        nonlocal done
        tell(done, total)
        copied = copy.deepcopy(state)
        copied.load_state_dict(rewound)
        with masked(copied, chosen):
            train(copied, start=rewind, stop=None, seed=order)
        done += 1
        return copied.eval()

    found: list[Level] = []
    result = trained(masks, seed)
    for number in range(levels + 1):
        if number:
            scores = magnitudes(result, masks) if score is None else score(result, masks)
            masks = prune(masks, scores, rate, least_density)
            result = trained(masks, seed)
        by_chance = gap = None
        if random_control and number:
            by_chance = evaluate(trained(random_masks(masks, generator), seed))
        if barrier:
            other = trained(masks, seed + 1)
            gap = error_barrier(result, other, lambda m: 1 - evaluate(m), recalibrate=recalibrate)
        found.append(Level(number, density(masks), evaluate(result), by_chance, gap))
    tell(total, total)
    return Ticket(result, masks, rewound, tuple(found))


def prune(
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    rate: float,
    least_density: float = 0.0,
) -> Masks:
    """Let the lowest share of the surviving weights go, ranked over all layers together.

    Args:
        masks: True for what survives.
        scores: for each mask a tensor of its shape, higher is kept.
        rate: share that goes, rounded down: at 0.2, 1000 become 800, 640, 512.
        least_density: share of each layer that stays whatever its scores are.

    Raises:
        UsageError: scores are missing, of other shapes, or NaN where a weight survives.
    """
    alive = sum(int(m.sum()) for m in masks.values())
    going = int(alive * rate + 1e-9)
    values, spare = [], []
    for name, mask in masks.items():
        given = scores.get(name)
        if given is None or given.shape != mask.shape or bool(given[mask].isnan().any()):
            raise UsageError(f"the scores of {name} are missing, of another shape, or NaN")
        # float64: half precision would tie what is not equal
        flat = given.detach().double().masked_fill(~mask, -math.inf).flatten()
        held = math.ceil(least_density * mask.numel())
        values.append(flat)
        best = torch.zeros_like(flat, dtype=torch.bool)
        best[flat.argsort(descending=True, stable=True)[:held]] = True
        spare.append(mask.flatten() & ~best)
    together, may_go = torch.cat(values), torch.cat(spare)
    order = together.masked_fill(~may_go, math.inf).argsort(stable=True)
    kept = torch.cat([m.flatten() for m in masks.values()])
    kept[order[: min(going, int(may_go.sum()))]] = False
    parts = kept.split([m.numel() for m in masks.values()])
    return {n: p.reshape(m.shape) for (n, m), p in zip(masks.items(), parts, strict=True)}


def magnitudes(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``|w|`` of each masked weight."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().abs() for name in masks}


def random_masks(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Masks that keep as many weights of each layer, at places drawn by chance."""
    found = {}
    for name, mask in masks.items():
        places = torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]
        drawn = torch.zeros(mask.numel(), dtype=torch.bool)
        drawn[places] = True
        found[name] = drawn.reshape(mask.shape)
    return found


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the weights that the masks keep."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def error_barrier(
    first: nn.Module,
    second: nn.Module,
    error: Callable[[nn.Module], float],
    *,
    points: int = 11,
    recalibrate: Callable[[nn.Module], None] | None = None,
) -> float:
    """``max over a of E(a A + (1 - a) B) - (E(A) + E(B)) / 2``, on an even grid with both ends.

    Args:
        first: A; neither model is changed.
        second: B, of the same class and shapes.
        error: of a model, lower is better.
        points: of the grid.
        recalibrate: called on every model between the two.

    Raises:
        UsageError: the models differ in parameters or shapes, or there are fewer than 3 points.
    """
    if points < 3:
        raise UsageError(f"{points} points show nothing between two models", hint="use 3 or more")
    a, b = first.state_dict(), second.state_dict()
    if {n: v.shape for n, v in a.items()} != {n: v.shape for n, v in b.items()}:
        raise UsageError("the two models differ in parameters or in their shapes")
    ends = (error(first) + error(second)) / 2
    between = copy.deepcopy(first)
    worst = -math.inf
    for step in range(points):
        share = step / (points - 1)
        between.load_state_dict(
            {n: torch.lerp(b[n], a[n], share) if a[n].is_floating_point() else a[n] for n in a}
        )
        if recalibrate is not None and 0 < step < points - 1:
            recalibrate(between)
        worst = max(worst, error(between))
    return worst - ends


def _check(levels: int, rate: float, rewind: int, least_density: float) -> None:
    if levels < 1:
        raise UsageError(f"levels={levels}", hint="at least 1 round of pruning")
    if not 0 < rate < 1:
        raise UsageError(f"rate={rate}", hint="the share that goes at each level, as 0.2")
    if rewind < 0:
        raise UsageError(f"rewind={rewind}", hint="a step of the training, 0 for its start")
    if not 0 <= least_density < 1:
        raise UsageError(f"least_density={least_density}", hint="a share of a layer, as 0.01")


__all__ = [
    "Level",
    "Ticket",
    "Train",
    "apply_masks",
    "error_barrier",
    "find_ticket",
    "masked",
    "prune",
    "random_masks",
]
