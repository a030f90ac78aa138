"""Ratios of layers by what pruning each of them alone does to the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from planish.ir.errors import source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.passes.base import OperatorError, PassContext
from planish.passes.observe.feeding import required
from planish.passes.sparsify.allocation import Curve, allocate, least_harm
from planish.passes.sparsify.alone import Alone, Way, measure_alone
from planish.passes.sparsify.methods import LAYER_METHODS, Score
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import RULE, Site

# What a layer is pruned by while it is measured. OBC's choice is near SparseGPT's, at a multiple of
# the time; scores of the loss have no part in what one layer does to the outputs.
_MEASURED: Mapping[Score, Score] = {"obc": "sparsegpt", "wanda": "wanda", "sparsegpt": "sparsegpt"}


@dataclass(frozen=True)
class Bounds:
    """What is asked for.

    Attributes:
        ratio: share of the entries of all layers that is to be zero.
        least: that every layer gives up, but for groups.
        most: that any layer gives up; None for three quarters of the way from ratio to 1.
        batches: calibration batches to measure on, at most.
    """

    ratio: float
    least: float = 0.0
    most: float | None = None
    batches: int = 4

    @property
    def top(self) -> float:
        """``most``, or what stands for it."""
        return (3 + self.ratio) / 4 if self.most is None else self.most

    def problem(self) -> str | None:
        """Say what is wrong with it, or None."""
        if not 0 <= self.least <= self.ratio <= self.top < 1:
            return (
                f"least {self.least:g}, ratio {self.ratio:g} and most {self.top:g} are not in "
                "this order between 0 and 1"
            )
        return f"{self.batches} batches measure nothing" if self.batches < 1 else None

    def shares(self) -> tuple[float, ...]:
        """At which layers are measured, ``ratio`` among them."""
        between = {self.least, self.ratio / 2, self.ratio, (self.ratio + self.top) / 2, self.top}
        return tuple(sorted(s for s in between if s > 0 and self.least <= s <= self.top))


@dataclass(frozen=True)
class Chosen:
    """The ratio of every layer.

    Attributes:
        ratios: by name of weight; 0 where it stays dense.
        refusals: what stays dense, and why.
        operators: what every layer does alone, with the pattern or at the global ratio.
    """

    ratios: dict[str, float]
    refusals: tuple[Refusal, ...]
    operators: tuple[OperatorError, ...]


def choose_ratios(
    program: Program,
    sites: Sequence[Site],
    pattern: Pattern,
    score: Score,
    bounds: Bounds,
    context: PassContext,
    *,
    damping: float | None = None,
    refit: int = 0,
    padding_mask: str = "",
) -> Chosen:
    """Measure every layer alone, and choose ratios of least summed error.

    Args:
        program: stays as it is.
        sites: the weights, in the order of their first readers.
        pattern: what they are to have.
        score: what they are pruned by afterwards.
        bounds: what is asked for.
        context: holds the calibration; told of every weight and of the result.
        damping: for the method.
        refit: likewise.
        padding_mask: input that is 0 for padding, or "".

    Raises:
        RequirementError: there is no calibration.
        MisusedPassError: the ratio cannot be met.
    """
    calibration = required(context.calibration)
    batches = list(islice(calibration, bounds.batches))
    measured = _MEASURED.get(score, "magnitude")
    grouped = pattern.kind == "grouped"
    way = Way(LAYER_METHODS[measured], measured != "magnitude", pattern, damping, refit)
    shares = (1.0,) if grouped else bounds.shares()
    _check(sites, pattern, bounds)
    found = measure_alone(
        program,
        sites,
        dict.fromkeys((s.name for s in sites), shares),
        way,
        batches,
        padding_mask=padding_mask,
        tell=context.tell,
    )
    place = 0 if grouped else shares.index(bounds.ratio)
    alike = {name: results[place] for name, results in found.items()}
    zeros = (_groups if grouped else _curves)(sites, pattern, shares, found, bounds)
    rows = [alike[site.name].row(site, zeros[site.name]) for site in sites]
    dense = [site for site in sites if not zeros[site.name]]
    numel = sum(site.weight.value.numel() for site in sites)
    context.remark(
        f"{len(sites) - len(dense)} of {len(sites)} layers are pruned, {len(dense)} stay dense: "
        f"{sum(zeros.values()) / numel:.4f} of their weights go, {bounds.ratio:g} asked for; each "
        f"was measured alone by {measured} on {len(batches)} batches"
    )
    return Chosen(
        {site.name: _ratio(site, pattern, zeros[site.name]) for site in sites},
        tuple(_left_dense(site, alike[site.name]) for site in dense),
        tuple(sorted(rows, key=lambda row: (row.output_db, row.own.sqnr_db))),
    )


def told_later(context: PassContext, done: int) -> PassContext:
    """The context of what follows after so many steps that were told already."""
    tell = context.tell
    return replace(context, tell=lambda now, total: tell(done + now, done + total))


def _unit(site: Site, pattern: Pattern) -> int:
    """Entries that go at a time: as many in each group of a convolution."""
    return site.groups * (pattern.n * pattern.m if pattern.kind == "blocks" else 1)


def _ratio(site: Site, pattern: Pattern, zeros: int) -> float:
    """The share that ``Pattern.zeros`` makes exactly these zeros of, in every group."""
    if pattern.kind == "grouped" or not zeros:
        return float(zeros > 0)
    unit = _unit(site, pattern)
    # the addend is far more than the error of the quotient and far less than one unit
    return (zeros // unit + 1e-5) / (site.weight.value.numel() // unit)


def _check(sites: Sequence[Site], pattern: Pattern, bounds: Bounds) -> None:
    """Refuse what cannot be met, before anything is measured."""
    if pattern.kind == "grouped":
        zeros = {s.name: pattern.zeros(s.weight.value.numel(), 1.0) for s in sites}
        least_harm(zeros, dict.fromkeys(zeros, 0.0), _numel(sites), bounds.ratio)


def _numel(sites: Sequence[Site]) -> int:
    return sum(site.weight.value.numel() for site in sites)


def _groups(
    sites: Sequence[Site],
    pattern: Pattern,
    shares: Sequence[float],
    found: Mapping[str, Sequence[Alone]],
    bounds: Bounds,
) -> dict[str, int]:
    """Zeros of layers that have the pattern or stay dense."""
    zeros = {s.name: pattern.zeros(s.weight.value.numel(), shares[0]) for s in sites}
    errors = {name: results[0].noise for name, results in found.items()}
    chosen = least_harm(zeros, errors, _numel(sites), bounds.ratio)
    return {name: count if name in chosen else 0 for name, count in zeros.items()}


def _curves(
    sites: Sequence[Site],
    pattern: Pattern,
    shares: Sequence[float],
    found: Mapping[str, Sequence[Alone]],
    bounds: Bounds,
) -> dict[str, int]:
    """Zeros of layers that may have any share between the bounds."""
    curves = []
    for site in sites:
        numel, unit = site.weight.value.numel(), _unit(site, pattern)
        errors = {} if bounds.least else {0: 0.0}
        for share, result in zip(shares, found[site.name], strict=True):
            # of two shares that are as many units, the results are the same
            errors[int(numel // unit * share + 1e-9) * unit] = result.noise
        curves.append(Curve(site.name, numel, unit, tuple(errors.items())))
    return allocate(curves, bounds.ratio)


def _left_dense(site: Site, alone: Alone) -> Refusal:
    db = alone.output_db
    said = f"{site.name} is left dense: pruned alone it costs {db:.1f} dB at the outputs"
    return Refusal(RULE, site.reader.name, said, source_line(site.reader))
