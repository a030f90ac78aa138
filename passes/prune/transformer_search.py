"""Which heads and neurons stay under a budget, when every unit counts by itself.

There are two classes, heads and neurons; what a unit is worth is its diagonal Fisher information.
Within a class units are ranked by worth for cost; for every number of heads the neurons get what
is left of the budget, and the best pair wins. With one cost for all units of a class, as in a
transformer of equal layers, no other choice is worth more; with several it is the greedy one.

Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022,
sections 4.1 and 4.4. Unlike the public code no candidate exceeds the budget, no heads at all is a
candidate, every candidate has the whole budget, and a flat table costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from planish.passes.prune.latency_table import Table

# Budgets are sums of floats: what is over by rounding alone is not over.
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Layer:
    """The heads of one attention, or the neurons of one feed-forward unit.

    Attributes:
        kind: its class.
        worth: float64 ``[units]``, at least 0.
        cost: of one unit, in the unit of the budget; a latency is given by a table instead.
        least: units that stay at any rate, the best ones.
        table: seconds by number of units, for a budget of latency.
    """

    kind: Literal["heads", "neurons"]
    worth: Tensor
    cost: float = 0.0
    least: int = 0
    table: Table | None = None

    def best(self) -> Tensor:
        """Units by falling worth; of equals the first."""
        return torch.argsort(self.worth, descending=True, stable=True)


@dataclass(frozen=True, eq=False)
class Choice:
    """What stays.

    Attributes:
        kept: of each layer, int64, ascending.
        cost: of all that.
        worth: of all that.
        met: whether the budget is; where not, this is the cheapest there is.
    """

    kept: list[Tensor]
    cost: float
    worth: float
    met: bool


def by_macs(layers: Sequence[Layer], budget: float) -> Choice:
    """The units worth most under a budget of multiply-accumulates.

    Args:
        layers: all of them, in any order.
        budget: for all their units together.
    """
    free = [layer.best()[: layer.least] for layer in layers]
    fixed = sum(layer.cost * len(f) for layer, f in zip(layers, free, strict=True))
    met = fixed <= budget * (1 + _SLACK)
    costs = [layer.cost for layer in layers]
    return _spend(layers, free, costs, budget - fixed if met else 0.0, fixed, met)


def by_latency(layers: Sequence[Layer], budget: float) -> Choice:
    """The units worth most under a budget of seconds, layers dropped where that helps.

    For every number of attentions and of feed-forward units that are dropped, those go whose best
    units are worth least; the others get the units that cost nothing more, and what is left is
    spent by the slopes.

    Args:
        layers: with tables; one whose ``least`` is above 0 cannot be dropped.
        budget: for all of them together.
    """
    heads, neurons = (_droppable(layers, kind) for kind in ("heads", "neurons"))
    best: Choice | None = None
    for some in range(len(heads) + 1):
        for more in range(len(neurons) + 1):
            dropped = {*heads[:some], *neurons[:more]}
            found = _with_dropped(layers, dropped, budget)
            if best is None or _better(found, best):
                best = found
    assert best is not None
    return best


def _better(a: Choice, b: Choice) -> bool:
    if a.met != b.met:
        return a.met
    return a.worth > b.worth if a.met else a.cost < b.cost


def _table(layer: Layer) -> Table:
    if layer.table is None:
        raise ValueError("a budget of latency takes layers with tables")
    return layer.table


def _droppable(layers: Sequence[Layer], kind: str) -> list[int]:
    """Layers of a class by rising worth of the units that their base cost pays for."""

    def base(number: int) -> float:
        layer = layers[number]
        top = layer.worth[layer.best()[: _table(layer).flat]]
        return float(top.sum())

    able = [i for i, layer in enumerate(layers) if layer.kind == kind and not layer.least]
    return sorted(able, key=base)


def _with_dropped(layers: Sequence[Layer], dropped: set[int], budget: float) -> Choice:
    """The best choice where some layers are gone and the others are not."""
    free, costs, fixed = [], [], 0.0
    for number, layer in enumerate(layers):
        if number in dropped:
            free.append(torch.empty(0, dtype=torch.int64))
            costs.append(float("inf"))
            continue
        table = _table(layer)
        count = min(len(layer.worth), max(table.flat, layer.least))
        free.append(layer.best()[:count])
        costs.append(table.slope)
        fixed += table(count)
    met = fixed <= budget * (1 + _SLACK)
    return _spend(layers, free, costs, budget - fixed if met else 0.0, fixed, met)


def _spend(
    layers: Sequence[Layer],
    free: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    fixed: float,
    met: bool,
) -> Choice:
    """Units beyond those that are free, for what is left of the budget.

    Args:
        layers: all of them.
        free: units of each that stay anyway.
        costs: of one more unit of each; infinite where none may come.
        budget: what is left.
        fixed: what was spent.
        met: whether that was within the budget.
    """
    ranked = {kind: _ranked(layers, free, costs, kind) for kind in ("heads", "neurons")}
    (h_cost, h_worth), (n_cost, n_worth) = (_sums(ranked[k]) for k in ("heads", "neurons"))
    allowed = h_cost <= budget * (1 + _SLACK)
    left = (budget * (1 + _SLACK) - h_cost).clamp_min(0)
    neurons = torch.searchsorted(n_cost, left, right=True) - 1
    total = torch.where(allowed, h_worth + n_worth[neurons], -torch.inf)
    heads = int(total.argmax())
    taken = {"heads": heads, "neurons": int(neurons[heads])}
    kept = [f.tolist() for f in free]
    for kind, count in taken.items():
        layer, unit = (column[:count].tolist() for column in ranked[kind][2:])
        for i, u in zip(layer, unit, strict=True):
            kept[i].append(u)
    units = [torch.tensor(sorted(k), dtype=torch.int64) for k in kept]
    worth = sum(float(each.worth[k].sum()) for each, k in zip(layers, units, strict=True))
    spent = fixed + float(h_cost[heads] + n_cost[taken["neurons"]])
    return Choice(units, spent, worth, met)


def _ranked(
    layers: Sequence[Layer], free: Sequence[Tensor], costs: Sequence[float], kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cost, worth, layer and unit of the units of a class, by falling worth for cost."""
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for number, layer in enumerate(layers):
        if layer.kind != kind or costs[number] == float("inf"):
            continue
        rest = torch.ones(len(layer.worth), dtype=torch.bool)
        rest[free[number]] = False
        unit = rest.nonzero().flatten()
        cost = torch.full((len(unit),), float(costs[number]), dtype=torch.float64)
        rows.append((cost, layer.worth.double()[unit], torch.full_like(unit, number), unit))
    if not rows:
        none = torch.empty(0, dtype=torch.float64)
        return none, none, none.long(), none.long()
    cost, worth, at, unit = (torch.cat(columns) for columns in zip(*rows, strict=True))
    # What costs nothing is taken first, whatever it is worth.
    value = torch.where(cost > 0, worth / cost.clamp_min(1e-300), torch.inf)
    order = torch.argsort(value, descending=True, stable=True)
    return cost[order], worth[order], at[order], unit[order]


def _sums(ranked: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cost and worth of the first 0, 1, 2, ... units."""
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, ranked[0].cumsum(0)]), torch.cat([zero, ranked[1].cumsum(0)])
