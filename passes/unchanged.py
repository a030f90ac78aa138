"""Prove that a pass left every output as it is, bit for bit, by running only up to what it changed.

Two programs give the same outputs if each value that a rewrite put in the place of another equals
it in every bit and stride, and if all else is the same operator on the same operands. So where a
pass changed only the beginning of a program, it is enough to run the program before up to there, to
compute each new value from the values before, and to compare. Which value took which place is what
the rewrites claim, and the comparison decides; where it fails, or nothing can be said, both have to
run to the end. Taken on trust is only that the pass did not write into constants that both programs
share, of which ``planish.ir.snapshot`` misses a few bytes written behind torch's count; the result
of a whole run is therefore run in full once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Node

from planish.ir.changes import Change
from planish.ir.errors import PlanishError
from planish.ir.execute import evaluate
from planish.ir.lockstep import Meeting, is_random, lockstep
from planish.ir.program import Program
from planish.passes.debug.lineage import Stands, stands

# Beyond this share of the program before, running the program after is no dearer.
_WORTH_IT = 0.5

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class _Claim:
    """One value after that is to equal one before.

    Attributes:
        old: of the program before.
        new: of the program after.
        order: the nodes to compute for it, operands first.
        feeds: node after -> the node before whose value it has.
    """

    old: Node
    new: Node
    order: tuple[Node, ...]
    feeds: Mapping[Node, Node]


class Proof:
    """What must be equal for all outputs to be.

    Args:
        before: the program before the pass.
        after: the program after it.
        changes: what the pass recorded.

    Attributes:
        possible: whether a proof may succeed and costs less than to run the program after.
    """

    def __init__(self, before: Program, after: Program, changes: Sequence[Change]):
        self.before, self.after = before, after
        self.claims: list[_Claim] = []
        self.possible = False
        if len(before.placeholders) != len(after.placeholders):
            return  # it does not run at all
        if any(_beyond_values(node) for p in (before, after) for node in p.operators):
            return
        same, claimed = _same(before, after, stands(before, after, changes))
        if not _alike(after.results, before.results, same):
            return
        if any(not node.users and node not in same for node in after.operators):
            return  # something that acts by itself, and may fail
        order = {node: number for number, node in enumerate(after.graph.nodes)}
        self.claims = [_claim(new, old, sure, same, order) for new, old, sure in claimed]
        place = {node: number for number, node in enumerate(before.operators, 1)}
        needed = [n for c in self.claims for n in (c.old, *c.feeds.values())]
        last = max((place.get(node, 0) for node in needed), default=0)
        self.possible = last <= _WORTH_IT * len(place)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether the outputs are the same on these inputs; False where that is not proven."""
        found: list[bool] = []

        def meeting(claim: _Claim) -> Meeting:
            olds = tuple(dict.fromkeys(claim.feeds.values()))

            def act(values: tuple[Any, ...]) -> None:
                fed = dict(zip(olds, values[1:], strict=True))
                found.append(_identical(values[0], self._value(claim, fed)))

            return Meeting(((0, claim.old), *((0, node) for node in olds)), act)

        try:
            lockstep([self.before], inputs, [meeting(c) for c in self.claims], to_end=False)
        except PlanishError:
            return False  # the program after fails: running it tells where, and on what
        return all(found)

    def _value(self, claim: _Claim, fed: Mapping[Node, Any]) -> Any:  # noqa: ANN401
        env = {node: fed[old] for node, old in claim.feeds.items()}
        for node in claim.order:
            if node.op == "get_attr":
                env[node] = self.after.constants[str(node.target)]
            else:
                env[node] = evaluate(node, env)
        return env[claim.new]


def _beyond_values(node: Node) -> bool:
    """Whether a result hangs on more than operands: random numbers, or memory around a view.

    A branch holds a program of its own, in which anything may stand.
    """
    branch = isinstance(node.target, HigherOrderOperator)
    around = any(name in str(node.target) for name in ("as_strided", "storage_offset"))
    return is_random(node) or branch or around


def _same(
    before: Program, after: Program, found: Stands
) -> tuple[dict[Node, list[Node]], list[tuple[Node, Node, list[Node]]]]:
    """Nodes after -> the nodes before that they equal; and what of that is a claim.

    A claim is (node after, node before, the nodes before that it surely equals). Sure is what is
    the same operator with the same arguments, given that what they read is equal.
    """
    constants: dict[int, list[Node]] = {}
    for node in before.graph.find_nodes(op="get_attr"):
        constants.setdefault(id(before.constants[str(node.target)]), []).append(node)
    inputs = zip(after.placeholders, before.placeholders, strict=True)
    same = {new: [old] for new, old in inputs}
    claimed: list[tuple[Node, Node, list[Node]]] = []
    for node in after.graph.nodes:
        if node.op == "placeholder":
            sure = same[node]
        elif node.op == "get_attr":
            sure = constants.get(id(after.constants[str(node.target)]), [])
        else:
            old = found.itself.get(node)
            sure = [old] if old is not None and _same_call(node, old, same) else []
        others = [old for old, _ in found.replaced.get(node, ()) if old not in sure]
        claimed += [(node, old, sure) for old in others]
        if sure or others:
            same[node] = [*sure, *others]
    return same, claimed


def _claim(
    new: Node,
    old: Node,
    sure: list[Node],
    same: Mapping[Node, list[Node]],
    order: Mapping[Node, int],
) -> _Claim:
    feeds: dict[Node, Node] = {}
    computed: set[Node] = set()
    pending = [new]
    while pending:
        node = pending.pop()
        # No claim about this node may be used to show another; those about what it reads are shown
        # by themselves, and they come before it.
        known = sure if node is new else same.get(node)
        if known:
            feeds[node] = known[0]
        elif node not in computed:
            computed.add(node)
            pending.extend(node.all_input_nodes)
    return _Claim(old, new, tuple(sorted(computed, key=order.__getitem__)), feeds)


def _same_call(node: Node, old: Node, same: Mapping[Node, list[Node]]) -> bool:
    return (
        node.op == old.op == "call_function"
        and node.target is old.target
        and _alike(node.args, old.args, same)
        and _alike(node.kwargs, old.kwargs, same)
    )


def _alike(new: Any, old: Any, same: Mapping[Node, list[Node]]) -> bool:  # noqa: ANN401 - as fx allows
    """Whether arguments are equal, given which nodes are."""
    if isinstance(new, Node):
        return isinstance(old, Node) and old in same.get(new, ())
    if isinstance(new, (tuple, list)):
        return (
            isinstance(old, (tuple, list))
            and len(new) == len(old)
            and all(_alike(a, b, same) for a, b in zip(new, old, strict=True))
        )
    if isinstance(new, Mapping):
        return (
            isinstance(old, Mapping)
            and new.keys() == old.keys()
            and all(_alike(value, old[name], same) for name, value in new.items())
        )
    return type(new) is type(old) and repr(new) == repr(old)


def _identical(old: Any, new: Any) -> bool:  # noqa: ANN401 - whatever operators give
    """Whether values are equal in every bit and stride."""
    if isinstance(old, Tensor):
        return (
            isinstance(new, Tensor)
            and _plain(old)
            and _plain(new)
            and old.dtype == new.dtype
            and old.shape == new.shape
            and old.stride() == new.stride()
            and torch.equal(_bits(old), _bits(new))
        )
    if isinstance(old, (tuple, list)):
        return (
            isinstance(new, (tuple, list))
            and len(old) == len(new)
            and all(_identical(b, a) for b, a in zip(old, new, strict=True))
        )
    return type(old) is type(new) and bool(old == new) and repr(old) == repr(new)


def _plain(value: Tensor) -> bool:
    """Whether a tensor is what its bits and strides say: no conjugation or sign is put off."""
    put_off = value.is_conj() or value.is_neg()
    return value.layout == torch.strided and not value.is_quantized and not put_off


def _bits(value: Tensor) -> Tensor:
    """As integers, which compare for every element type, and tell -0 from 0 and NaN from NaN."""
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.view(_INTEGERS[real.element_size()])
