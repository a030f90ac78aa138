"""Run several programs side by side, and meet values of one with values of another.

Every program advances only as far as the next meeting needs. A value is freed after its last use
in its own program, once every meeting that waits for it has taken place. So at most the live
activations of each program are held, plus the values whose partners are still to come: where the
programs compute their values in about the same order, a handful.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.errors import PassError
from planish.ir.execute import Observer, evaluate, last_uses
from planish.ir.ops import argument
from planish.ir.program import Program

Place = tuple[int, Node]  # a value: number of the program, and the node


@dataclass(frozen=True)
class Meeting:
    """What is to happen once some values are there.

    Attributes:
        needs: which values.
        act: called with them, in this order; it must not keep them.
    """

    needs: tuple[Place, ...]
    act: Callable[[tuple[Any, ...]], None]


def is_random(node: Node) -> bool:
    """Whether an operator draws from torch's global generator; a dropout that is off does not."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = {a.name for a in target._schema.arguments}
    off = [
        name for name in ("train", "training") if name in names and argument(node, name) is False
    ]
    return not off and not ("dropout_p" in names and argument(node, "dropout_p") == 0)


def lockstep(
    programs: Sequence[Program],
    inputs: Sequence[Any],
    meetings: Sequence[Meeting],
    *,
    seed: int = 0,
    observe: Mapping[int, Observer] | None = None,
    to_end: bool = True,
) -> tuple[tuple[Any, ...], ...]:
    """Run programs on the same flat inputs, each once.

    Args:
        programs: what to run; different ones.
        inputs: one value per placeholder.
        meetings: in about the order in which their values are computed; any order is right, the
            wrong one holds more values.
        seed: programs that draw random numbers each draw those of this seed.
        observe: number of a program -> called with each of its operator nodes and the value.
        to_end: run on to the outputs; False stops after the last meeting, with no outputs.

    Returns:
        The flat outputs of every program.

    Raises:
        PassError: an operator failed; the message names the node and the user's source line.
    """
    pending = [_Pending(meeting, len(set(meeting.needs))) for meeting in meetings]
    waiting: dict[Place, list[_Pending]] = {}
    for entry in pending:
        for place in dict.fromkeys(entry.meeting.needs):
            waiting.setdefault(place, []).append(entry)
    walks = []
    for number, program in enumerate(programs):
        holds = Counter({n: len(w) for (k, n), w in waiting.items() if k == number})
        walks.append(_Walk(program, inputs, holds, seed, (observe or {}).get(number)))

    def step(number: int) -> None:
        node = walks[number].step()
        for entry in waiting.pop((number, node), ()):
            entry.missing -= 1
            if not entry.missing:
                entry.meeting.act(tuple(walks[k].env[n] for k, n in entry.meeting.needs))
                for k, n in dict.fromkeys(entry.meeting.needs):
                    walks[k].let_go(n)

    with torch.no_grad(), _random_states_kept(programs):
        for entry in pending:
            for number, node in entry.meeting.needs:
                while entry.missing and node not in walks[number].passed:
                    step(number)
        for number, walk in enumerate(walks):
            while to_end and walk.results is None:
                step(number)
    return tuple(walk.results or () for walk in walks)


@dataclass
class _Pending:
    meeting: Meeting
    missing: int


@dataclass
class _Walk:
    """One program under way; ``env`` holds what is live, and what meetings wait for."""

    program: Program
    inputs: Sequence[Any]
    holds: Counter[Node]
    seed: int
    observe: Observer | None
    env: dict[Node, Any] = field(default_factory=dict)
    passed: set[Node] = field(default_factory=set)
    results: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        placeholders = self.program.placeholders
        if len(self.inputs) != len(placeholders):
            raise PassError(f"the program takes {len(placeholders)} inputs, got {len(self.inputs)}")
        self._given = dict(zip(placeholders, self.inputs, strict=True))
        self._nodes: Iterator[Node] = iter(self.program.graph.nodes)
        self._frees = last_uses(self.program)
        self._used_up: set[Node] = set()
        self._random: Tensor | None = None

    def step(self) -> Node:
        """Do the next node and return it."""
        node = next(self._nodes)
        self.passed.add(node)
        if node.op == "placeholder":
            self.env[node] = self._given[node]
        elif node.op == "get_attr":
            self.env[node] = self.program.constants[str(node.target)]
        elif node.op == "call_function":
            self.env[node] = self._drawn(node) if is_random(node) else evaluate(node, self.env)
            if self.observe is not None:
                self.observe(node, self.env[node])
        elif node.op == "output":
            flat: Any = map_arg(node.args[0], lambda n: self.env[n])
            self.results = tuple(flat)
        if not node.users:
            self._use_up(node)
        for dead in self._frees[node]:
            self._use_up(dead)
        return node

    def let_go(self, node: Node) -> None:
        """One meeting that waited for this value has taken place."""
        self.holds[node] -= 1
        if not self.holds[node] and node in self._used_up:
            self.env.pop(node, None)

    def _use_up(self, node: Node) -> None:
        self._used_up.add(node)
        if not self.holds[node]:
            self.env.pop(node, None)

    def _drawn(self, node: Node) -> Any:  # noqa: ANN401 - as the operator gives
        """The value of an operator that draws; each program has its own run of numbers."""
        if self._random is None:
            torch.manual_seed(self.seed)
        else:
            torch.set_rng_state(self._random)
        value = evaluate(node, self.env)
        self._random = torch.get_rng_state()
        return value


@contextmanager
def _random_states_kept(programs: Sequence[Program]) -> Iterator[None]:
    """Nobody outside notices that random numbers were drawn."""
    if not any(is_random(node) for program in programs for node in program.operators):
        yield
        return
    with torch.random.fork_rng(devices=[]):
        yield
