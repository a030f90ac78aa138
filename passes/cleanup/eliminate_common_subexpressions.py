"""Compute equal things once.

Rewrite:
    y1 = f(a, b), y2 = f(a, b)  ->  y1 for both
    m = a * b,    n = b * a     ->  m for both, likewise for every commutative operator
    sym_size(x, 0), sym_size(y, 1), both the formula ``batch``  ->  the first of them
Shapes:    any, unchanged.
Requires:  f is pure and has no body of its own; the arguments are equal after defaults are
           filled in, and operands count as equal if they were merged before.
Contract:  exact; the same operator on the same operands gives the same bits. Swapped operands of a
           commutative operator do as well, but for which of two NaNs comes out.
Cost:      one walk and one hash per node: linear in nodes.
Refuses:   to merge two outputs of the program, which would then share their memory.
Source:    Cocke, "Global Common Subexpression Elimination", SIGPLAN 1970.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import SymInt
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import COMMUTATIVE, is_pure_call, op_name
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.cleanup._memory import escapes

aten = torch.ops.aten

_RULE = "MergeEqual"
_COMMUTATIVE = COMMUTATIVE | {
    aten.add.Tensor,  # unless its alpha scales one of the operands
    aten.eq.Tensor,
    aten.ne.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.logical_xor.default,
    aten.bitwise_xor.Tensor,
}
_SCALARS = (bool, int, float, complex, str, type(None))
_CHOICES = (torch.dtype, torch.device, torch.layout, torch.memory_format)

Identity = Callable[[Node], Hashable]


class _NotComparableError(Exception):
    """An argument whose equality cannot be told from its text."""


def expression_key(
    target: Any,  # noqa: ANN401 - overloads and Python functions have no common type
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    identity: Identity,
) -> Hashable | None:
    """What two calls have in common exactly if they compute the same value.

    Args:
        target: the operator.
        args: positional arguments.
        kwargs: named arguments.
        identity: gives each operand the name of the value it stands for.

    Returns:
        None where an argument is of a kind that cannot be compared.
    """
    try:
        named = _by_name(target, args, kwargs, identity)
    except _NotComparableError:
        return None
    if target in _COMMUTATIVE and "alpha" not in named:
        first, second = list(named)[:2]
        named[first], named[second] = sorted((named[first], named[second]), key=repr)
    return (target, tuple(sorted(named.items())))


def _by_name(
    target: Any,  # noqa: ANN401
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    identity: Identity,
) -> dict[str, Hashable]:
    """Arguments by name, without those that say what the default says."""
    if not isinstance(target, OpOverload):
        given = {str(i): _frozen(value, identity) for i, value in enumerate(args)}
        return given | {name: _frozen(value, identity) for name, value in kwargs.items()}
    declared = target._schema.arguments
    positional = [d.name for d in declared if not d.kwarg_only]
    given = dict(zip(positional, args, strict=False)) | kwargs
    defaults = {d.name: d.default_value for d in declared if d.has_default_value()}
    frozen = {name: _frozen(value, identity) for name, value in given.items()}
    return {
        name: value
        for name, value in frozen.items()
        if name not in defaults or value != _frozen(defaults[name], identity)
    }


def _frozen(value: object, identity: Identity) -> Hashable:
    if isinstance(value, Node):
        return identity(value)
    if isinstance(value, (list, tuple)):
        return ("list", *(_frozen(v, identity) for v in value))
    # 1, 1.0 and True are equal in Python and are not the same argument; nor are 0.0 and -0.0.
    if isinstance(value, (*_SCALARS, *_CHOICES)):
        return (type(value).__name__, repr(value))
    raise _NotComparableError


@dataclass(frozen=True, kw_only=True)
class EliminateCommonSubexpressions(Pass):
    """Compute equal things once; see the module's docstring."""

    name: ClassVar[str] = "eliminate-common-subexpressions"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Cocke, Global Common Subexpression Elimination, SIGPLAN Notices 5(7), 1970",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Merge in one walk from the inputs to the outputs."""
        rewriter = Rewriter(program, self.name, context.sites)
        refusals: list[Refusal] = []
        first: dict[Hashable, Node] = {}
        numbers: dict[Node, int] = {n: i for i, n in enumerate(program.graph.nodes)}

        def identity(node: Node) -> Hashable:
            return f"@{node.target}" if node.op == "get_attr" else f"%{numbers[node]}"

        for node in program.operators:
            key = _key(node, identity)
            if key is None:
                continue
            equal = first.setdefault(key, node)
            if equal is node:
                continue
            if escapes(node) and escapes(equal):
                reason = f"{equal.name} is the same, but two outputs would share their memory"
                refusals.append(Refusal(_RULE, node.name, reason, source_line(node)))
                continue
            with rewriter.site(_RULE, node) as allowed:
                if allowed:
                    rewriter.replace(node, equal)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _key(node: Node, identity: Identity) -> Hashable | None:
    """What identifies the value of a node; None where it must not be merged."""
    value = node.meta.get("val")
    if isinstance(value, SymInt):
        # Sizes are formulas: however they were computed, equal formulas are equal numbers.
        return ("size", value.node.expr)
    if isinstance(node.target, HigherOrderOperator) or not is_pure_call(node):
        return None
    if isinstance(node.target, OpOverload) and "empty" in op_name(node.target).split(".")[1]:
        return None  # memory that has not been written is not a value
    if node.target is not operator.getitem and not isinstance(node.target, OpOverload):
        return None  # arithmetic on sizes that are numbers: fold-constants takes it
    return expression_key(node.target, node.args, dict(node.kwargs), identity)
