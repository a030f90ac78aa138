"""What structured pruning cuts: groups of units, and every place each unit lies in.

A unit is one neuron, channel, attention head, ...: whatever can only leave the program as a
whole. :func:`planish.passes.prune.coupling.find_groups` finds the groups and
:func:`planish.passes.prune.cut.cut` removes units of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.fx import Node

Kind = Literal["neurons", "channels", "heads", "head-dims", "other"]


@dataclass(frozen=True, eq=False)
class Place:
    """The indices of one axis of one value that belong to units.

    Attributes:
        node: The value, mostly a constant (its ``get_attr`` node).
        axis: The axis, counted from 0.
        unit: int64 ``[size of the axis]``: the unit of each index, -1 where it is of none.
    """

    node: Node
    axis: int
    unit: Tensor


@dataclass(frozen=True, eq=False)
class Read:
    """An operator that sums over the units: a linear, a convolution, a matrix product.

    Attributes:
        reader: The operator.
        value: The activation it reads, and the units along the axis it sums over.
        weight: The constant it multiplies by; None where both factors are computed.
    """

    reader: Node
    value: Place
    weight: Place | None


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be cut from a program, each one from all its places at once.

    Attributes:
        name: For people: "encoder.layer.3.intermediate: 1536 neurons".
        kind: What a unit is.
        size: How many units there are.
        constants: Every axis of every constant that is cut with them: rows of the writers,
            biases, norms, columns of the readers. A constant whose one axis holds several
            groups, or the same group twice, has one place for each of them.
        reads: The operators that sum over the units.
        exact: Cutting units equals setting them to zero at all reads.
        first: Their producer, for names, ``where=`` and source lines.
    """

    name: str
    kind: Kind
    size: int
    constants: tuple[Place, ...]
    reads: tuple[Read, ...]
    exact: bool
    first: Node
