"""Which value of the original program a value stands for, after any number of passes.

What a pair says is what the rewrite *meant*: an exact pass that moves a factor from one operator
into the next also leaves a pair of values that differ by this factor. So over exact passes a pair
is believed only where the two values agree, of which a few elements of each, noted while the
program ran, are proof enough. Over a lossy pass there is nothing to go by but what it recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.compare import SMALLEST_SCALE, bound_of
from planish.ir.program import Program
from planish.passes.base import Contract
from planish.passes.debug.lineage import Stands
from planish.passes.steps import Run, Step

_ELEMENTS = 64  # of one value, that are noted
_SLACK = 10.0  # times the bound of the type: a bound is for outputs, whose scale is the largest


class Notes:
    """A few elements of every value of one run; give ``observe`` to whoever runs the program."""

    def __init__(self) -> None:
        self._found: dict[Node, list[object]] = {}

    def observe(self, node: Node, value: Any) -> None:  # noqa: ANN401 - whatever operators give
        """Note one value."""
        self._found[node] = [_noted(leaf) for leaf in _leaves(value)]

    def agree(self, node: Node, other: Notes, mine: Node) -> bool:
        """Whether a value noted here may be one noted there.

        Args:
            node: of the other program.
            other: its notes, of a run on the same inputs.
            mine: of this program.
        """
        old, new = other._found.get(node), self._found.get(mine)
        if old is None or new is None or len(old) != len(new):
            return False
        return all(_alike(b, a) for b, a in zip(old, new, strict=True))


def _leaves(value: object) -> Iterable[object]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    return (value,)


def _noted(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    count = value.numel()
    if not count or value.layout is not torch.strided:
        return tuple(value.shape), None  # the shape is all there is to tell
    flat = torch.arange(min(count, _ELEMENTS)) * (count - 1) // max(1, min(count, _ELEMENTS) - 1)
    picked = value[torch.unravel_index(flat, value.shape)] if value.dim() else value.reshape(1)
    return tuple(value.shape), picked.detach().clone()


def _alike(b: object, a: object) -> bool:
    if not isinstance(b, tuple) or not isinstance(a, tuple):
        return type(b) is type(a) and bool(b == a)
    if b[0] != a[0]:
        return False
    old, new = b[1], a[1]
    if old is None or new is None:
        return old is new
    if bound_of(old) == 0.0 or bound_of(new) == 0.0:
        return torch.equal(old, new)
    bound = _SLACK * max(bound_of(old), bound_of(new))
    wide = torch.complex128 if old.is_complex() or new.is_complex() else torch.float64
    old, new = old.to(wide), new.to(wide)
    finite = old.isfinite() & new.isfinite()
    if not torch.equal(old.isfinite(), new.isfinite()):
        return False
    if not bool(finite.any()):
        return True
    scale = max(SMALLEST_SCALE, float(old[finite].abs().max()))
    return float((old - new)[finite].abs().max()) <= bound * scale


def origins(original: Program) -> dict[str, str]:
    """Every value of the original stands for itself."""
    return {node.name: node.name for node in original.graph.nodes}


def follow(
    lineage: Mapping[str, str],
    found: Stands,
    after: Program,
    agree: Callable[[Node, Node], bool] | None = None,
) -> dict[str, str]:
    """Carry a lineage over one pass.

    Args:
        lineage: node before the pass -> node of the original whose value it stands for.
        found: what the pass replaced.
        after: the program after the pass.
        agree: for an exact pass, whether (node before, node after) hold one value; None believes
            what the pass recorded, which is all there is to go by where values may change.

    Returns:
        The lineage of the program after the pass.
    """
    carried = {}
    for node in after.graph.nodes:
        if node.op == "placeholder" or agree is None:
            old = found.partner(node)
        else:
            old = next((c for c in found.candidates(node) if agree(c, node)), None)
        if old is not None and old.name in lineage:
            carried[node.name] = lineage[old.name]
    return carried


class Ancestry:
    """Which value of the original each value of the current program stands for.

    Args:
        run: where every value stands for itself yet.
    """

    def __init__(self, run: Run):
        self.names: Mapping[str, str] = origins(run.original)
        self.notes: Notes | None = None  # of the current program, on the first sample
        lossy = [s.index for s in run.steps if s.pass_.contract is Contract.LOSSY]
        self._last = max(lossy, default=0)
        self._samples = bool(run.original.samples)

    def wanted(self, index: int) -> bool:
        """Whether a lossy pass follows on a step, which will ask."""
        return index < self._last

    def new_notes(self, index: int) -> Notes | None:
        """To note values in after a step; None where nobody will ask, or there is no sample."""
        return Notes() if self._samples and self.wanted(index) else None

    def follow(self, step: Step, after: Program, found: Stands, notes: Notes | None) -> None:
        """Carry it over a pass, whose values on the first sample were noted."""
        if not self.wanted(step.index):
            return
        old, self.notes = self.notes, notes
        if step.pass_.contract is Contract.LOSSY or old is None or notes is None:
            self.names = follow(self.names, found, after)
        else:
            known, fresh = old, notes
            self.names = follow(self.names, found, after, lambda b, a: fresh.agree(b, known, a))
