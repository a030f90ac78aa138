"""Which classes a compressed classifier loses: recall against accuracy, class by class.

Accuracy can hold while the weak classes pay. For class ``c`` with recall ``r_c`` of a model of
accuracy ``a``, the recall balance is ``r_c - a`` and its normalized form ``r_c / a - 1``. If
compression stretches these, what was below the average falls further. The intensification ratio
is the slope, through the origin, of the balances after on those before: above 1 they were
stretched, below 1 drawn together.

Source: Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning
Algorithm", NeurIPS 2022, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import UsageError

_FEW = 500  # samples of a class below which its recall is too noisy for a slope of one model
_FLAT = 1e-8  # sum of squares of balances below which there is nothing to compare with


@dataclass(frozen=True)
class ClassBalance:
    """One class.

    Attributes:
        label: the class.
        samples: how many have that label.
        before: recall of the first model, in 0 to 1.
        after: recall of the second.
        balance_before: ``r / a - 1`` of the first model.
        balance_after: that of the second.
    """

    label: int
    samples: int
    before: float
    after: float
    balance_before: float
    balance_after: float


@dataclass(frozen=True)
class RecallReport:
    """What compression did to the classes.

    Attributes:
        classes: those that have samples, the greatest loss of recall first.
        accuracy_before: of the first model, in 0 to 1.
        accuracy_after: of the second.
        ratio: intensification ratio of normalized balances; None where it is not defined.
        ratio_unnormalized: the same of ``r - a``.
        interval: of ``ratio`` by bootstrap; None likewise.
        level: share of the bootstrap that ``interval`` holds.
        remarks: what to know before believing the figures.
    """

    classes: tuple[ClassBalance, ...]
    accuracy_before: float
    accuracy_after: float
    ratio: float | None
    ratio_unnormalized: float | None
    interval: tuple[float, float] | None
    level: float
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"accuracy {self.accuracy_before:.4f} -> {self.accuracy_after:.4f}",
            "class  samples  recall before   after    loss  balance before   after",
        ]
        lines += [
            f"{c.label:5}  {c.samples:7}  {c.before:13.4f}  {c.after:6.4f}  "
            f"{c.before - c.after:+.4f}  {c.balance_before:+14.4f}  {c.balance_after:+.4f}"
            for c in self.classes
        ]
        if self.ratio is not None and self.interval is not None:
            low, high = self.interval
            lines.append(
                f"intensification ratio {self.ratio:.3f} "
                f"({self.level:.0%} of the bootstrap in {low:.3f} to {high:.3f})"
            )
        return "\n".join([*lines, *self.remarks])


def recall_report(
    labels: Tensor | Sequence[int],
    before: Tensor | Sequence[int],
    after: Tensor | Sequence[int],
    *,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RecallReport:
    """Compare two classifiers class by class.

    Args:
        labels: the true class of each sample, ``[N]``.
        before: what the first model says: classes ``[N]``, or scores ``[N, C]``.
        after: what the second says, likewise.
        bootstrap: how often samples are drawn again, with both models' answers together.
        level: share of the bootstrap that the interval holds.
        seed: of the drawing.

    Raises:
        UsageError: there is no sample, sizes differ, or what is given are no classes.
    """
    truth = _classes(labels, "labels")
    first, second = _answers(before, "before"), _answers(after, "after")
    for name, given in (("before", first), ("after", second)):
        if len(given) != len(truth):
            raise UsageError(f"there are {len(truth)} labels, but {len(given)} answers in {name}")
    if not len(truth):
        raise UsageError("there is no sample to compare the models on")
    if bootstrap < 1 or not 0 < level < 1:
        raise UsageError(f"bootstrap={bootstrap}, level={level}", hint="as 1000 and 0.95")
    known, indices = truth.unique(return_inverse=True)
    hits = torch.stack([first == truth, second == truth]).double()
    whole = _Tally(indices, hits, len(known))
    ratio, plain = whole.slope(normalized=True), whole.slope(normalized=False)
    interval, undefined = None, 0
    if ratio is not None:
        slopes = _drawn(indices, hits, len(known), bootstrap, seed)
        undefined = bootstrap - len(slopes)
        if slopes:
            ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
            low, high = torch.tensor(slopes, dtype=torch.float64).quantile(ends).tolist()
            interval = (low, high)
    dense, sparse = whole.accuracy.tolist()
    return RecallReport(
        tuple(whole.rows(known)),
        dense,
        sparse,
        ratio,
        plain,
        interval,
        level,
        tuple(_remarks(whole, ratio, undefined)),
    )


class _Tally:
    """Recalls and accuracies of both models; only classes that have samples count."""

    def __init__(self, indices: Tensor, hits: Tensor, classes: int):
        self.samples = torch.bincount(indices, minlength=classes).double()
        found = torch.zeros(2, classes, dtype=torch.float64)
        found.index_add_(1, indices, hits)
        self.recalls = found / self.samples.clamp(min=1)
        self.accuracy = hits.mean(1)

    def balances(self, normalized: bool) -> Tensor:
        """``[2, classes]``; 0 for classes without samples."""
        plain = (self.recalls - self.accuracy[:, None]) * (self.samples > 0)
        return plain / self.accuracy[:, None] if normalized else plain

    def slope(self, *, normalized: bool) -> float | None:
        """Least squares through the origin, or None where it is not defined."""
        if normalized and not bool((self.accuracy > 0).all()):
            return None
        first, second = self.balances(normalized)
        size = float(first.square().sum())
        return None if size < _FLAT else float(first @ second) / size

    def rows(self, known: Tensor) -> list[ClassBalance]:
        """One for each class, the greatest loss first."""
        first, second = self.balances(bool((self.accuracy > 0).all()))
        rows = [
            ClassBalance(
                int(label), int(self.samples[i]), float(self.recalls[0, i]),
                float(self.recalls[1, i]), float(first[i]), float(second[i]),
            )
            for i, label in enumerate(known)
        ]  # fmt: skip
        return sorted(rows, key=lambda c: (c.after - c.before, c.label))


def _drawn(indices: Tensor, hits: Tensor, classes: int, times: int, seed: int) -> list[float]:
    """Slopes of samples drawn with replacement, those that are defined."""
    generator = torch.Generator().manual_seed(seed)
    count = len(indices)
    slopes = []
    for _ in range(times):
        drawn = torch.randint(count, (count,), generator=generator)
        slope = _Tally(indices[drawn], hits[:, drawn], classes).slope(normalized=True)
        if slope is not None and math.isfinite(slope):
            slopes.append(slope)
    return slopes


def _remarks(tally: _Tally, ratio: float | None, undefined: int) -> list[str]:
    found = []
    fewest = int(tally.samples.min())
    if ratio is None:
        found.append(
            "no intensification ratio: a model is never right, or all recalls of the first are "
            "equal to its accuracy"
        )
    elif fewest < _FEW:
        found.append(
            f"a class has only {fewest} samples: noise in recalls draws the ratio towards 0"
        )
    if undefined:
        found.append(f"{undefined} draws of the bootstrap gave no ratio and were left out")
    return found


def _answers(given: Tensor | Sequence[int], name: str) -> Tensor:
    values = _tensor(given, name)
    if values.dim() == 2 and values.shape[1] > 0:
        if bool(values.isnan().any()):
            raise UsageError(f"{name} holds scores that are NaN")
        return values.argmax(1)
    return _classes(values, name)


def _classes(given: Tensor | Sequence[int], name: str) -> Tensor:
    values = _tensor(given, name)
    if values.dim() != 1 or (len(values) and values.dtype.is_floating_point):
        raise UsageError(
            f"{name} is {values.dtype} of shape {list(values.shape)}",
            hint="classes are whole numbers [N]" + (", scores [N, C]" if name != "labels" else ""),
        )
    return values.long()


def _tensor(given: Tensor | Sequence[int], name: str) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises each: names, ragged rows
        raise UsageError(
            f"{name} cannot be read as numbers: {error}", hint="number the classes from 0"
        ) from error
