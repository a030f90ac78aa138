"""Which rank each layer gets.

Every rule but ``keep`` looks at what a rank costs and at the error it leaves. Under a budget all
layers are weighed together: for a price ``p`` of a unit of cost each layer takes the rank, or stays
dense, as ``error^2 + p cost`` is least, and ``p`` is found by bisection. Errors are in
one unit for all layers: what they make of the model's outputs, or relative to each layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Rule = Literal["keep", "energy", "error", "parameters", "macs", "latency"]
_HALVINGS = 60


class Layer(Protocol):
    """What a rank is chosen for."""

    @property
    def name(self) -> str:
        """Of its weight."""

    @property
    def largest(self) -> int:
        """The rank at which factors are exact."""

    @property
    def break_even(self) -> float:
        """The rank from which on factors hold no fewer numbers than the weight."""

    @property
    def limit(self) -> float:
        """The rank from which on factors save nothing: that one, or what is no faster."""


@dataclass(frozen=True)
class Choice:
    """A rank of one layer, or None for the weight as it is.

    Attributes:
        rank: of the factors.
        cost: of the layer then, in units of the rule.
        error: energy, in a unit that all layers share.
    """

    rank: int | None
    cost: float
    error: float


@dataclass(frozen=True)
class Ranks:
    """What was chosen.

    Attributes:
        rank: by layer; None where it stays dense.
        dense: why, for those.
        remarks: what the caller should know of the budget.
    """

    rank: Mapping[str, int | None]
    dense: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def rounded(rank: float, multiple: int, largest: int) -> int:
    """A rank that fits: down to a multiple where there is one, at least 1, at most ``largest``."""
    whole = int(rank + 1e-9)
    if whole >= multiple:
        whole -= whole % multiple
    return max(1, min(whole, largest))


def candidates(layer: Layer, multiple: int) -> list[int]:
    """The ranks worth a look: multiples below the limit, or the largest where there is none."""
    limit = min(layer.largest, -int(-layer.limit // 1) - 1)
    found = list(range(multiple, limit + 1, multiple))
    return found or ([max(1, limit)] if limit >= 1 else [])


def by_fraction(layers: Sequence[Layer], keep: float, multiple: int) -> Ranks:
    """The same share of parameters of every layer: ``rank = keep m n / (m + n)``, at least 1."""
    rank = {x.name: rounded(keep * x.break_even, multiple, x.largest) for x in layers}
    over = [x for x in layers if keep * x.break_even < 1 - 1e-9]
    remarks: tuple[str, ...] = ()
    if over:
        worst = min(over, key=lambda x: x.break_even)
        remarks = (
            f"{len(over)} layers cannot keep as little as {keep:.0%} of their parameters: at rank "
            f"1 {worst.name} keeps {1 / worst.break_even:.0%}",
        )
    return Ranks(rank, {}, remarks)


def by_error(
    layers: Sequence[Layer], error: Callable[[Layer, int], float], bound: float, multiple: int
) -> Ranks:
    """For every layer the smallest rank with which its relative error is within a bound.

    Args:
        layers: all of them.
        error: relative error of a rank, falling.
        bound: for it.
        multiple: ranks are rounded up to it.
    """
    rank: dict[str, int | None] = {}
    dense = {}
    for layer in layers:
        low, high = 1, layer.largest
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if error(layer, middle) <= bound else (middle + 1, high)
        up = min(layer.largest, -(-low // multiple) * multiple)
        if up < layer.limit:
            rank[layer.name] = up
            continue
        rank[layer.name] = None
        dense[layer.name] = (
            f"rank {low} is needed (rounded to {up}), and from {layer.limit:.0f} on factors are "
            f"no {'smaller' if layer.limit == layer.break_even else 'faster'}"
        )
    return Ranks(rank, dense)


def by_budget(
    layers: Sequence[Layer],
    options: Mapping[str, Sequence[Choice]],
    keep: float,
    what: str,
) -> Ranks:
    """Ranks of all layers together, of least error within a budget.

    Args:
        layers: all of them.
        options: by layer; the one of rank None is the dense layer.
        keep: share of the cost of all layers as they are that may be spent.
        what: the cost in words, for remarks.
    """
    whole = sum(_dense(options[x.name]).cost for x in layers)
    budget = keep * whole
    least = {x.name: min(options[x.name], key=lambda c: (c.cost, c.error)) for x in layers}
    spent = sum(c.cost for c in least.values())
    remarks: tuple[str, ...] = ()
    if spent > budget:
        chosen = least
        remarks = (
            f"{keep:.0%} of the {what} cannot be met: the least that these layers come to is "
            f"{spent / whole:.1%}, which is what they were given",
        )
    else:
        chosen = _filled(_within(layers, options, budget), options, budget)
    return Ranks(
        {name: c.rank for name, c in chosen.items()},
        {n: _why_dense(options[n], what) for n, c in chosen.items() if c.rank is None},
        remarks,
    )


def _dense(options: Sequence[Choice]) -> Choice:
    return next(c for c in options if c.rank is None)


def _within(
    layers: Sequence[Layer], options: Mapping[str, Sequence[Choice]], budget: float
) -> dict[str, Choice]:
    """The choices at the lowest price at which they stay within the budget."""

    def at(price: float) -> dict[str, Choice]:
        return {
            x.name: min(options[x.name], key=lambda c: (c.error + price * c.cost, c.cost))
            for x in layers
        }

    # At this price no saving of error is worth the smallest step of cost.
    low, high = 0.0, 1.0
    while sum(c.cost for c in at(high).values()) > budget:
        high *= 4
        if high > 1e30:  # only ties in cost are left
            return {x.name: min(options[x.name], key=lambda c: (c.cost, c.error)) for x in layers}
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        over = sum(c.cost for c in at(middle).values()) > budget
        low, high = (middle, high) if over else (low, middle)
    return at(high)


def _filled(
    chosen: dict[str, Choice], options: Mapping[str, Sequence[Choice]], budget: float
) -> dict[str, Choice]:
    """Spend what is left, each time where an error falls most for its cost."""
    spent = sum(c.cost for c in chosen.values())
    while True:
        steps = [
            ((now.error - c.error) / max(c.cost - now.cost, 1e-30), name, c)
            for name, now in chosen.items()
            for c in options[name]
            if c.error < now.error and spent - now.cost + c.cost <= budget
        ]
        if not steps:
            return chosen
        _, name, best = max(steps, key=lambda s: (s[0], s[1]))
        spent += best.cost - chosen[name].cost
        chosen[name] = best


def _why_dense(options: Sequence[Choice], what: str) -> str:
    dense = _dense(options)
    factored = [c for c in options if c.rank is not None]
    if not factored:
        return "no rank is below the one from which on factors are no smaller"
    least = min(factored, key=lambda c: c.cost)
    share = least.cost / dense.cost if dense.cost else 1.0
    if least.cost >= dense.cost:
        return (
            f"it would not get faster: at rank {least.rank} the {what} are {share:.2f} of those "
            "of the dense layer"
        )
    return f"its {what} are better spent than saved: rank {least.rank} would take {share:.2f}"
