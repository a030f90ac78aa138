"""Judge weights by gradients of the loss, as many at a time as memory allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.sparsify.fisher import (
    Accumulator,
    DiagonalFisher,
    GradientMean,
    InverseFisher,
)
from planish.passes.sparsify.gradients import count_batches, gradients
from planish.passes.sparsify.hessian import checked_rows
from planish.passes.sparsify.scores import magnitude, undecayed
from planish.passes.sparsify.sites import Site
from planish.passes.sparsify.woodfisher import Diagonal, WoodFisher

Judge: TypeAlias = Diagonal | WoodFisher
_BYTES = 1 << 30  # of accumulators that are filled by one reading of the batches


@dataclass(frozen=True)
class How:
    """How weights are judged; see the options of ``Sparsify``."""

    score: str
    block_size: int = 64
    damping: float | None = None
    decay: float = 5e-4
    taylor: bool = False
    gradients: int | None = None
    exact: bool = True
    bytes_at_once: int = _BYTES

    @property
    def reads_gradients(self) -> bool:
        """Whether labeled batches are read."""
        return self.score != "magnitude"

    def absolute_damping(self) -> float:
        """Lambda of F."""
        if self.damping is not None:
            return self.damping
        if self.score == "fisher":
            return 0.0
        return 1e-1 if self.taylor else 1e-5

    def cost(self, numel: int) -> int:
        """Bytes that a weight of so many entries takes while gradients are read."""
        return 8 * numel * (self.block_size + 1 if self.score == "woodfisher" else 2)


@dataclass
class Layer:
    """A weight on its way.

    Attributes:
        site: where it is.
        rows: what it is by now, ``[outputs, inputs]``, in its own type.
        kept: bool, what has not gone.
        loss: what the loss is said to have risen by, None where the score says nothing.
    """

    site: Site
    rows: Tensor
    kept: Tensor
    loss: float | None = None

    @classmethod
    def of(cls, site: Site) -> Layer:
        """The weight as it is in the program.

        Raises:
            PassError: it is not finite.
        """
        rows = site.rows()
        checked_rows(rows)
        return cls(site, rows, torch.ones(rows.shape, dtype=torch.bool))


class Judging:
    """Judges of several weights of a program.

    Args:
        program: is not changed.
        layers: the weights.
        context: holds labeled batches and a loss; told of every batch.
        how: by what. As many gradients are planned as it says, else as there are batches.
        steps: how often they are going to be judged, for the progress told.
        twice: whether each time their judges are wanted again, once all were seen.

    Attributes:
        held: whether the caller should keep judges for that, in place of asking twice.

    Raises:
        RequirementError: there are no labeled batches, or there is no loss.
        UsageError: labeled can be read only once, or gives no batch.
    """

    def __init__(
        self,
        program: Program,
        layers: Sequence[Layer],
        context: PassContext,
        how: How,
        steps: int = 1,
        *,
        twice: bool = False,
    ):
        self._program, self._layers, self._context, self._how = program, layers, context, how
        self.parts = _parts(layers, how)
        self._planned = 0
        if how.reads_gradients:
            self._planned = how.gradients or count_batches(context)
        # Judges that are light, or all made in one reading, are kept in between.
        self.held = len(self.parts) == 1 or how.score != "woodfisher"
        readings = steps * (1 + (twice and not self.held))
        self._total = max(1, readings * len(self.parts) * self._planned)
        self._told = 0
        context.tell(0, self._total)
        self._warned = False

    def all(self) -> Iterator[tuple[int, Judge]]:
        """The number of each layer, and its judge, which the caller lets go before the next part.

        Weights that change meanwhile are differentiated at what they were.
        """
        values = {
            layer.site.name: layer.site.from_rows(layer.rows).to(layer.site.weight.value.dtype)
            for layer in self._layers
        }
        for part in self.parts:
            makers = self._read(part, values) if self._how.reads_gradients else None
            for number in part:
                layer = self._layers[number]
                if makers is None:
                    yield number, Diagonal(layer.rows, magnitude(layer.rows.double()), False)
                else:
                    yield number, makers.pop(number)()

    def finish(self) -> None:
        """Tell that nothing is left to be done."""
        self._context.tell(self._total, self._total)

    def _read(
        self, part: Sequence[int], values: Mapping[str, Tensor]
    ) -> dict[int, Callable[[], Judge]]:
        """Read all batches for some of the layers."""
        layers = [self._layers[n] for n in part]
        made = [_accumulators(layer, self._planned, self._how) for layer in layers]
        names = [layer.site.name for layer in layers]
        arrived = 0
        context = self._context
        found = gradients(self._program, names, context, limit=self._planned, constants=values)
        for by_name in found:
            arrived += 1
            for layer, (accumulator, _) in zip(layers, made, strict=True):
                rows = layer.site.rows(by_name.pop(layer.site.name))
                # What has gone does not come back: F is of the entries that are left.
                accumulator.add(torch.where(layer.kept, rows, 0).flatten())
            self._told += 1
            context.tell(self._told, self._total)
        self._warn(arrived)
        return {number: finish for number, (_, finish) in zip(part, made, strict=True)}

    def _warn(self, arrived: int) -> None:
        if arrived == self._planned or self._warned:
            return
        self._warned = True
        meaning = (
            "it is the mean of those" if self._how.score == "undecayed" else
            f"F divides by {self._planned} as planned, so that damping weighs "
            f"{self._planned / arrived:.3g} times as much"
        )  # fmt: skip
        self._context.remark(f"{arrived} of {self._planned} planned gradients arrived: {meaning}")


def _accumulators(layer: Layer, planned_: int, how: How) -> tuple[Accumulator, Callable[[], Judge]]:
    """What takes the gradients of a layer, and what makes its judge of them."""
    numel = layer.rows.numel()
    rows = layer.rows.double()
    if how.score == "woodfisher":
        fisher = InverseFisher(numel, how.block_size, planned_, how.absolute_damping())
        return fisher, lambda: WoodFisher(
            rows, fisher.inverse(), fisher.gradient() if how.taylor else None, how.exact
        )
    if how.score == "fisher":
        squares = DiagonalFisher(numel, planned_, how.absolute_damping())
        return squares, lambda: Diagonal(
            layer.rows, rows.square() * squares.diagonal().reshape(rows.shape) / 2, True
        )
    mean = GradientMean(numel)
    return mean, lambda: Diagonal(
        layer.rows, undecayed(rows, mean.mean().reshape(rows.shape), how.decay), False
    )


def _parts(layers: Sequence[Layer], how: How) -> list[list[int]]:
    """Layers whose accumulators fit into memory together, at least one at a time."""
    parts: list[list[int]] = []
    room = 0
    for number, layer in enumerate(layers):
        cost = how.cost(layer.rows.numel())
        if not parts or cost > room:
            parts.append([])
            room = how.bytes_at_once
        parts[-1].append(number)
        room -= cost
    return parts


def check_options(how: How) -> None:
    """Hold options to what they mean.

    Raises:
        ValueError: one is out of range.
    """
    if how.block_size < 1:
        raise ValueError(f"block_size is {how.block_size}: entries of a block of F, at least 1")
    if not 0 <= how.decay < math.inf:
        raise ValueError(f"decay is {how.decay}: the weight decay of the training, 0 or more")
    if how.gradients is not None and how.gradients < 1:
        raise ValueError(f"gradients is {how.gradients}: how many are planned, at least 1")
    if how.damping is not None and not 0 <= how.damping < math.inf:  # nor NaN
        raise ValueError(f"damping is {how.damping}: it is added, 0 or more")
    if how.score == "woodfisher" and how.damping == 0:
        raise ValueError("woodfisher needs damping above 0: F of few gradients is singular")
    if how.taylor and how.score != "woodfisher":
        raise ValueError(f"taylor is of score=woodfisher; {how.score} has no gradient term")
