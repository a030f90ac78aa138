"""How much each unit of a group matters, by three scores of the literature.

magnitude: the Euclidean norm of the weights that make a unit. taylor: how much the loss would
change without it, to first order, its size in the mean over batches. fisher: half the mean square
of the same, which is the loss's second order where training has ended. Both come from one number
a unit and batch, the gradient of the loss by a mask on the unit at all its reads.

Source: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017;
Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource Efficient
Inference", ICLR 2017; Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense
networks and Fisher pruning", 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from planish.ir.program import Program
from planish.passes.prune.groups import Group, Place


def writers(program: Program, group: Group) -> list[Place]:
    """The matrices that make the units: constants of two axes or more that no read multiplies by.

    Biases and norms, of one axis, say little of how large a unit gets.
    """
    read = [(r.weight.node, r.weight.axis) for r in group.reads if r.weight is not None]
    found = []
    for place in group.constants:
        value = program.constant(place.node)
        if value is not None and value.dim() >= 2 and (place.node, place.axis) not in read:
            found.append(place)
    return found


def magnitude(program: Program, group: Group) -> Tensor | None:
    """The norm of what makes each unit, float64 ``[units]``; None where no matrix does."""
    places = writers(program, group)
    if not places:
        return None
    total = torch.zeros(group.size, dtype=torch.float64)
    for place in places:
        value = program.constant(place.node)
        assert value is not None  # writers() gives constants
        squares = value.double().square().movedim(place.axis, 0).flatten(1).sum(1)
        mine = place.unit >= 0
        total.index_add_(0, place.unit[mine], squares[mine])
    return total.sqrt()


def of_gradients(
    gradients: Iterable[Mapping[Group, Tensor]], groups: Sequence[Group], *, squared: bool
) -> dict[Group, Tensor]:
    """Scores of the loss, float64 ``[units]`` each.

    Args:
        gradients: for each batch the derivative by the masks of each group, ``[units]``.
        groups: which to score.
        squared: half the mean square (fisher), else the mean size (taylor).

    Raises:
        ValueError: there is no batch.
    """
    totals = {g: torch.zeros(g.size, dtype=torch.float64) for g in groups}
    count = 0
    for batch in gradients:
        count += 1
        for group in groups:
            g = batch[group].double()
            totals[group] += g.square() / 2 if squared else g.abs()
    if not count:
        raise ValueError("there is no batch to score by")
    return {group: total / count for group, total in totals.items()}


def best(scores: Tensor, k: int) -> Tensor:
    """The k units of the highest scores, ascending; of equal ones the first."""
    return torch.argsort(scores, descending=True, stable=True)[:k].sort().values


def leveled(scores: Tensor) -> Tensor:
    """Scores that several groups can be ranked by together: divided by their root mean square.

    Layers differ in the size of their weights and gradients by more than units do (Molchanov et
    al., section 2.4).
    """
    size = scores.square().mean().sqrt()
    return scores / size if float(size) else scores
