"""Where the accuracy went: the error of every value that a lossy pass rewrote.

The original program, the one before the pass and the one after it run side by side, once per batch
(``planish.ir.lockstep``), and every value meets its partners:

    local       the value after against the value before whose place it took
    cumulative  the value after against the value of the original that this one stands for
    own         the site alone, fed with the values before, against the value before

Sums run over all batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from planish.ir.changes import Change
from planish.ir.compare import Accumulator, worst
from planish.ir.errors import PlanishError, UsageError, VerificationError, source_line
from planish.ir.execute import Observer
from planish.ir.lockstep import Meeting, Place, lockstep
from planish.ir.program import Program
from planish.passes.debug.alone import Replay, feedable, replay
from planish.passes.debug.ancestry import origins
from planish.passes.debug.lineage import Stands, stands
from planish.passes.debug.rewritten import Rewritten, fixed_nodes, rewritten
from planish.passes.steps import NodeError

_BEFORE, _AFTER, _ORIGINAL = 0, 1, 2


def attribute(
    original: Program,
    before: Program,
    after: Program,
    changes: Sequence[Change],
    batches: Iterable[Sequence[Any]],
    seed: int = 0,
    *,
    lineage: Mapping[str, str] | None = None,
) -> tuple[NodeError, ...]:
    """Measure every value that a pass rewrote.

    Args:
        original: the program the run began with.
        before: the program before the pass.
        after: the program after it.
        changes: what the pass recorded.
        batches: flat inputs; sizes may differ from batch to batch.
        seed: programs that draw random numbers each draw those of this seed.
        lineage: node of ``before`` -> node of ``original`` whose value it stands for; None takes
            nodes of the same name, which is right where no name was given twice.

    Returns:
        One entry per rewritten value and site, in the order in which the values are computed.

    Raises:
        UsageError: there is no batch.
        VerificationError: a value has another shape than its type says.
        PassError: an operator failed.
    """
    names = origins(original) if lineage is None else lineage
    sweep = Sweep(original, before, after, stands(before, after, changes), names, seed)
    for inputs in batches:
        sweep.run(inputs)
    return sweep.errors()


@dataclass(frozen=True)
class Outputs:
    """The flat outputs of the three programs for one batch."""

    original: tuple[Any, ...]
    before: tuple[Any, ...]
    after: tuple[Any, ...]


@dataclass
class _Errors:
    own: Accumulator = field(default_factory=Accumulator)
    local: Accumulator = field(default_factory=Accumulator)
    cumulative: Accumulator | None = None


class Sweep:
    """Runs the programs side by side, batch by batch, and adds up the errors.

    Args:
        original: the program the run began with.
        before: the program before the pass.
        after: the program after it.
        found: which values stand for which.
        lineage: node of ``before`` -> node of ``original``.
        seed: of random numbers.
    """

    def __init__(
        self,
        original: Program,
        before: Program,
        after: Program,
        found: Stands,
        lineage: Mapping[str, str],
        seed: int = 0,
    ):
        self.programs = [before, after] if original is before else [before, after, original]
        self.seed = seed
        self.rewritten = rewritten(before, after, found)
        old = {n.name: n for n in original.graph.nodes}
        fixed = fixed_nodes(after)
        place = {node: position for position, node in enumerate(after.graph.nodes)}
        shared: dict[tuple[Node, Node], tuple[Accumulator, Accumulator | None]] = {}
        self._errors: list[_Errors] = []
        self._meetings: list[Meeting] = []
        for item in self.rewritten:
            both = item.node, item.old
            if both not in shared:
                first = old.get(lineage.get(item.old.name, ""))
                shared[both] = self._compare(item, first)
            errors = _Errors(Accumulator(), *shared[both])
            self._errors.append(errors)
            plan = replay(after, found, fixed, item.change, item.node, place, reader=item.reader)
            self._meetings.append(_alone(item, plan, errors.own))

    def _compare(
        self, item: Rewritten, first: Node | None
    ) -> tuple[Accumulator, Accumulator | None]:
        """Let a value meet the one before and, if there is one, that of the original."""
        local = Accumulator()
        self._meetings.append(_meeting(item, (_BEFORE, item.old), local))
        if len(self.programs) == 2 or first is None or not feedable(first, item.node):
            return local, local if first is item.old else None
        cumulative = Accumulator()
        self._meetings.append(_meeting(item, (_ORIGINAL, first), cumulative))
        return local, cumulative

    def run(self, inputs: Sequence[Any], observe: Observer | None = None) -> Outputs:
        """Run one batch; every program runs once.

        Args:
            inputs: flat inputs.
            observe: called with every operator node of the program after, and its value.
        """
        found = lockstep(
            self.programs,
            inputs,
            self._meetings,
            seed=self.seed,
            observe={_AFTER: observe} if observe is not None else None,
        )
        return Outputs(found[-1] if len(found) > 2 else found[_BEFORE], *found[:2])

    def errors(self) -> tuple[NodeError, ...]:
        """The errors of all batches so far.

        Raises:
            UsageError: there was no batch.
        """
        return tuple(
            NodeError(
                site=item.change.number,
                rule=item.change.rule,
                node=item.node.name,
                replaces=item.old.name,
                source=source_line(item.node) or item.change.source,
                own=errors.own.fidelity(),
                local=errors.local.fidelity(),
                cumulative=errors.cumulative.fidelity() if errors.cumulative else None,
                constant=item.constant,
            )
            for item, errors in zip(self.rewritten, self._errors, strict=True)
        )


def with_errors(changes: Sequence[Change], errors: Iterable[NodeError]) -> tuple[Change, ...]:
    """The changes of a pass with ``Change.error`` filled in: the worst own error of each site."""
    own: dict[int, list[NodeError]] = {}
    for error in errors:
        own.setdefault(error.site, []).append(error)
    done = []
    for change in changes:
        found = worst([e.own for e in own.get(change.number, ())])
        if found is not None:
            change = replace(change, error={"sqnr_db": found.sqnr_db, "rel_l2": found.rel_l2})
        done.append(change)
    return tuple(done)


def _meeting(item: Rewritten, reference: Place, errors: Accumulator) -> Meeting:
    def act(values: tuple[Any, ...]) -> None:
        _add(errors, values[0], values[1], item)

    return Meeting((reference, (_AFTER, item.node)), act)


def _alone(item: Rewritten, plan: Replay, errors: Accumulator) -> Meeting:
    needs = tuple(dict.fromkeys(plan.feeds.values()))

    def act(values: tuple[Any, ...]) -> None:
        try:
            value = plan.value(dict(zip(needs, values[1:], strict=True)))
        except PlanishError as error:
            error.within(f"measuring rule {item.change.rule} at {item.change.node} alone")
            raise
        _add(errors, values[0], value, item)

    return Meeting(((_BEFORE, item.old), *((_BEFORE, node) for node in needs)), act)


def _add(errors: Accumulator, reference: object, value: object, item: Rewritten) -> None:
    try:
        errors.add(reference, value)
    except UsageError as error:
        raise VerificationError(
            f"it stands for {item.old.name}, but {error.what}", where=item.node
        ) from error
