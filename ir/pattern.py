"""Rules, refusals and the driver that applies rules until none fires.

A rule looks at one node at a time. It answers with a ``Match``, with a ``Refusal`` that says why a
node that looked right is not, or with None for a node that is no concern of its. Nothing is
edited before the match is decided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node
from torch.fx.node import Argument

from planish.ir.errors import PassError, PlanishError, source_line
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter, rule_failed


@dataclass(frozen=True)
class Refusal:
    """Why a rule declined at a node.

    Attributes:
        rule: which rule.
        node: name of the node it looked at.
        reason: a sentence for the report.
        source: the user's source line of that node, if known.
    """

    rule: str
    node: str
    reason: str
    source: str | None = None


@dataclass(frozen=True)
class Match:
    """A decided match: the root node and whatever the rewrite needs by name."""

    root: Node
    parts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - nodes, tensors and numbers
        return self.parts[name]


class Rule(ABC):
    """One rewrite."""

    name: ClassVar[str]
    roots: ClassVar[frozenset[Any]]  # operators a match can start at

    @abstractmethod
    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Decide, without editing."""

    @abstractmethod
    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Edit, through the rewriter only. Nodes in the match are alive."""

    def refuse(self, node: Node, reason: str) -> Refusal:
        """A refusal of this rule at this node."""
        return Refusal(self.name, node.name, reason, source_line(node))


class _Worklist:
    """Nodes to look at (again), fed by the rewriter's events."""

    def __init__(self, nodes: Iterable[Node]):
        self.queue = deque(nodes)
        self.waiting = set(self.queue)

    def push(self, node: Node) -> None:
        if node.op == "call_function" and node not in self.waiting:
            self.waiting.add(node)
            self.queue.append(node)

    def pop(self) -> Node | None:
        while self.queue:
            node = self.queue.popleft()
            if node in self.waiting:
                self.waiting.discard(node)
                if not node._erased:
                    return node
        return None

    def inserted(self, node: Node) -> None:
        self.push(node)

    def replaced(self, old: Node, new: Argument) -> None:
        if isinstance(new, Node):
            self.push(new)
            for user in new.users:
                self.push(user)

    def modified(self, node: Node) -> None:
        self.push(node)

    def erased(self, node: Node) -> None:
        # An operand may now have a single user, which unlocks rules at it and at its users.
        for operand in node.all_input_nodes:
            self.push(operand)
            if len(operand.users) <= 4:  # long fan-outs are not revisited for each lost user
                for user in operand.users:
                    self.push(user)


def _look(rule: Rule, node: Node, program: Program) -> Match | Refusal | None:
    try:
        return rule.match(node, program)
    except PlanishError as error:
        error.within(f"rule {rule.name}", node)
        raise
    except Exception as error:  # whatever a rule may raise; all are reported alike
        raise rule_failed(rule.name, node, error) from error


def rewrite_greedily(
    program: Program, rules: Sequence[Rule], rewriter: Rewriter
) -> tuple[Refusal, ...]:
    """Apply rules until none fires; at each node the first that matches wins.

    Every rewrite must bring the program nearer to a fixed point; one that never ends is a bug and
    is reported as such.

    Returns:
        What declined, as the last look at each node left it.

    Raises:
        PassError: the rules do not converge.
    """
    by_root: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.roots:
            by_root.setdefault(target, []).append(rule)
    operators = [n for n in program.operators if n.target in by_root]
    worklist = _Worklist(operators)
    rewriter.listeners.append(worklist)
    refusals: dict[tuple[str, str], Refusal] = {}
    bound = 20 * len(program.operators) + 200
    applied = 0
    try:
        while (node := worklist.pop()) is not None:
            if not node.users:
                # Traced models carry dead values along; what replaced one would be dead and new.
                continue
            for rule in by_root.get(node.target, ()):
                found = _look(rule, node, program)
                refusals.pop((rule.name, node.name), None)
                if isinstance(found, Refusal):
                    refusals[rule.name, node.name] = found
                if not isinstance(found, Match):
                    continue
                with rewriter.site(rule.name, found.root) as allowed:
                    if allowed:
                        rule.rewrite(found, rewriter)
                if not allowed:
                    continue
                applied += 1
                if applied > bound:
                    raise PassError(
                        f"rules of pass {rewriter.pass_name} do not converge; the last was "
                        f"{rule.name}",
                        where=None if node._erased else node,
                        hint="a rule matches what it made itself, or two undo each other: their "
                        "match must decline that",
                    )
                if node._erased:
                    break
                worklist.push(node)
                break
    finally:
        rewriter.listeners.remove(worklist)
    alive = {n.name for n in program.operators}
    return tuple(r for r in refusals.values() if r.node in alive)
