"""What groups of units are read as: rows of positions, columns of units, over calibration inputs.

A program that is cut group after group need not be run from its start each time: each batch keeps
the values that were alive where a group begins, and what follows a cut is computed from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError
from planish.ir.execute import evaluate
from planish.ir.program import Program
from planish.passes.observe.feeding import Batches, Padding
from planish.passes.observe.layout import rows_of
from planish.passes.prune.fold import columns_of
from planish.passes.prune.groups import Group, Place
from planish.passes.prune.triangle import Triangle, parts_of

# Values kept between two runs; batches beyond it start again from their inputs.
_HELD = 1 << 30


class Activations:
    """Calibration batches of a program that is cut in between.

    Args:
        program: may be edited between two calls, which ``forget`` must be told of.
        batches: calibration inputs.
        padding_mask: the input that is 1 for tokens and 0 for padding, or "".
        limit: bytes of values kept to go on from.
    """

    def __init__(
        self, program: Program, batches: Batches, padding_mask: str = "", limit: int = _HELD
    ):
        self.program = program
        self.evaluated = 0  # operators run so far, over all batches
        self._batches = batches
        self._padding = Padding.of(program, padding_mask or None)
        self._held: list[dict[Node, Any]] = [{} for _ in range(len(batches))]
        self._limit = limit
        self._used = 0

    def triangles(
        self,
        groups: Sequence[Group],
        *,
        constant: Callable[[Group], bool] = lambda group: False,
        resume: Iterable[Node] = (),
        tell: Callable[[int], None] = lambda batch: None,
    ) -> dict[Group, Triangle]:
        """R of what each group is read as; of several values that are read, one below the other.

        Args:
            groups: every unit of each owns as many columns as the others.
            constant: for which of them a column of ones comes first.
            resume: operators to keep the values before, to go on from there another time.
            tell: told of each batch that is done.

        Raises:
            PassError: a value is not finite.
        """
        found = {g: Triangle(g.size + constant(g), parts_of(g)) for g in groups}
        wanted: dict[Node, list[tuple[Group, Place]]] = {}
        for group in groups:
            for place in distinct(read.value for read in group.reads):
                wanted.setdefault(place.node, []).append((group, place))
        keep = self._alive_before(set(resume))

        def look(node: Node, value: Tensor, mask: Tensor | None, samples: int) -> None:
            for group, place in wanted.get(node, ()):
                for rows in self._rows(group, place, value, mask, samples):
                    if not bool(rows.isfinite().all()):
                        raise PassError(f"{group.name}: not all values are finite", where=node)
                    if constant(group):
                        rows = torch.cat([rows.new_ones(*rows.shape[:2], 1), rows], 2)
                    found[group].add(rows)

        for number, inputs in enumerate(self._batches):
            self._run(number, inputs, set(wanted), keep, look)
            tell(number)
        return found

    def forget(self, alike: set[Node]) -> None:
        """Drop the values of all operators but those that a cut left alone."""
        for held in self._held:
            for node in [n for n in held if n not in alike]:
                self._used -= _bytes(held.pop(node))

    def _rows(
        self, group: Group, place: Place, value: Tensor, mask: Tensor | None, samples: int
    ) -> Iterator[Tensor]:
        """``[rows, columns of a unit, units]``."""
        columns = columns_of(place, group.size)
        assert columns is not None  # what is folded has equal columns
        layout = self._padding.layout(place.node)
        for rows in rows_of(layout, value, mask, samples, place.axis):
            yield rows[:, columns].movedim(-1, 1)

    def _alive_before(self, goals: set[Node]) -> set[Node]:
        """Values that are computed before one of these operators and read by it or behind it."""
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        places = sorted(order[g] for g in goals)
        keep = set()
        for node in order:
            if node.op == "call_function" and node.users:
                last = max(order[user] for user in node.users)
                if any(order[node] < p <= last for p in places):
                    keep.add(node)
        return keep

    def _run(
        self,
        number: int,
        inputs: tuple[Any, ...],
        wanted: set[Node],
        keep: set[Node],
        look: Callable[[Node, Tensor, Tensor | None, int], None],
    ) -> None:
        samples, mask = self._padding.read(inputs)
        held = self._held[number]
        env: dict[Node, Any] = dict(zip(self.program.placeholders, inputs, strict=True))
        env.update(held)
        needed = _needed(wanted, env)
        left = {n: sum(user in needed for user in n.users) for n in needed | set(env)}
        with torch.no_grad():
            for node in list(self.program.graph.nodes):
                if node in needed:
                    if node.op == "get_attr":
                        env[node] = self.program.constants[str(node.target)]
                    else:
                        env[node] = evaluate(node, env)
                        self.evaluated += 1
                    if node in keep:
                        self._hold(held, node, env[node])
                    for operand in node.all_input_nodes:
                        left[operand] -= 1
                        if not left[operand] and operand not in wanted:
                            del env[operand]
                if node in wanted:
                    look(node, env[node], mask, samples)
                    if not left[node]:
                        del env[node]

    def _hold(self, held: dict[Node, Any], node: Node, value: object) -> None:
        size = _bytes(value)
        if self._used + size <= self._limit:
            held[node] = value
            self._used += size


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _needed(wanted: set[Node], known: Mapping[Node, Any]) -> set[Node]:
    """The operators and constants to compute for these values, where some are known."""
    found: set[Node] = set()
    pending = [node for node in wanted if node not in known]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(n for n in node.all_input_nodes if n not in known)
    return found


def distinct(places: Iterable[Place]) -> list[Place]:
    """Places without those that stand for the same axis of the same value."""
    found: dict[tuple[Node, int], Place] = {}
    for place in places:
        found.setdefault((place.node, place.axis), place)
    return list(found.values())
