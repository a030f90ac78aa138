"""Types derived a second time, and compared with what the nodes claim.

Each node is derived from the *stored* types of its operands, so that a fault shows at the node
that has it and not at all that follow; if every node agrees, all types follow from the inputs'.
Equal calls on equal types are derived once: the layers of a transformer repeat themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import sympy
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from planish.ir.infer import infer_node
from planish.ir.program import Program
from planish.ir.tensortype import type_text

# Sizes at which two expressions are tried: small and coprime, with many divisors, and large.
_TRIALS = ((2, 3), (13, 7), (48, 24), (240, 120), (8192, 4096))


def changed_operators(program: Program, since: Program | None) -> list[Node]:
    """Operators whose type must be derived again; all of them without ``since``.

    A node is changed if it is new, calls another operator, has other arguments, claims another
    type, or reads a value whose type is another. Linear in the size of the two programs.
    """
    if since is None:
        return program.operators
    old = {node.name: node for node in since.nodes}
    retyped: set[Node] = set()
    changed: list[Node] = []
    for node in program.nodes:
        before = old.get(node.name)
        known = before is not None and before.op == node.op
        if before is None or not known or not _same_claim(node, before):
            retyped.add(node)
        if node.op != "call_function":
            continue
        same = (
            before is not None
            and known
            and node not in retyped
            and node.target is before.target
            and _same_argument(node.args, before.args)
            and _same_argument(dict(node.kwargs), dict(before.kwargs))
            and not any(operand in retyped for operand in node.all_input_nodes)
        )
        if not same:
            changed.append(node)
    return changed


def _same_claim(node: Node, before: Node) -> bool:
    now, then = node.meta.get("val"), before.meta.get("val")
    return now is then or (now is not None and then is not None and same_type(now, then))


def _same_argument(a: Any, b: Any) -> bool:  # noqa: ANN401 - whatever fx allows
    """Whether two arguments are the same value, or nodes of the same name."""
    if a is b:
        return True
    if isinstance(a, Node) or isinstance(b, Node):
        return isinstance(a, Node) and isinstance(b, Node) and a.name == b.name
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same_argument, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_argument(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


class Derivation:
    """Derives types of one program, each distinct call once."""

    def __init__(self, program: Program):
        self.program = program
        self._known: dict[Hashable, Any] = {}

    def covers(self, node: Node) -> bool:
        """Whether the type can be derived; the bodies of ``torch.cond`` are opaque."""
        return not isinstance(node.target, HigherOrderOperator)

    def type_of(self, node: Node) -> Any:  # noqa: ANN401 - whatever a node may hold
        """The type that follows from the operands' stored types.

        Raises:
            PassError: the operator rejects them.
        """
        key = call_key(node.target, node.args, node.kwargs)
        if key is not None and key in self._known:
            return self._known[key]
        shape_env = self.program.fake_mode.shape_env
        # A data-dependent size is a new symbol each time; nobody keeps this one.
        quiet = shape_env.ignore_fresh_unbacked_symbols() if shape_env else nullcontext()
        with quiet:
            value = infer_node(self.program, node)
        if key is not None:
            self._known[key] = value
        return value


def call_key(target: Any, args: Any, kwargs: Mapping[str, Any]) -> Hashable | None:  # noqa: ANN401
    """A key that is equal for calls that give the same type; None where there is none."""
    key = (target, type_key((args, dict(kwargs))))
    try:
        hash(key)
    except TypeError:  # an argument of a kind unknown here
        return None
    return key


def type_key(value: Any) -> Hashable:  # noqa: ANN401 - whatever a node may hold or take
    """Equal for equal arguments, where an operand is equal to all of exactly its type.

    It may not be hashable, if an argument is of a kind unknown here.
    """
    if isinstance(value, Node):
        return ("operand", type_key(value.meta.get("val")))
    if isinstance(value, Tensor):
        constant = id(getattr(value, "constant", None))  # a fake tensor may know its value
        shape = tuple(map(type_key, value.shape))
        strides = tuple(map(type_key, value.stride()))
        return (value.dtype, shape, strides, value.device, value.layout, constant)
    if isinstance(value, (SymInt, SymFloat, SymBool)):
        expression: Hashable = value.node.expr
        return expression
    if isinstance(value, Mapping):
        return tuple((k, type_key(v)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(type_key, value))
    return (type(value), value)  # True, 1 and 1.0 are one key otherwise


def same_type(claimed: object, expected: object) -> bool:
    """Whether a value's type is the expected one: element type and shape, or kind of number.

    A size of ``expected`` that depends on data (an unbacked symbol) says nothing, so anything fits
    it. Sizes are compared as expressions, and where those are written differently, by value.
    """
    if isinstance(claimed, Tensor) and isinstance(expected, Tensor):
        return (
            claimed.dtype == expected.dtype
            and claimed.dim() == expected.dim()
            and all(map(same_size, claimed.shape, expected.shape))
        )
    if isinstance(claimed, (tuple, list)) and isinstance(expected, (tuple, list)):
        return len(claimed) == len(expected) and all(map(same_type, claimed, expected))
    if _is_size(claimed) and _is_size(expected):
        return same_size(claimed, expected)  # type: ignore[arg-type]
    return type_text(claimed, {}) == type_text(expected, {})


def _is_size(value: object) -> bool:
    return isinstance(value, (int, SymInt)) and not isinstance(value, bool)


def same_size(claimed: int | SymInt, expected: int | SymInt) -> bool:
    """Whether two sizes are the same for all sizes of the dynamic dimensions; see ``same_type``."""
    if isinstance(claimed, int) and isinstance(expected, int):
        return claimed == expected
    a, b = _expression(claimed), _expression(expected)
    if a == b or _is_unbacked(b):
        return True
    if a.is_Integer and b.is_Integer:
        return False
    if _is_unbacked(a):
        return not b.is_Integer
    tried = [(_evaluate(a, at), _evaluate(b, at)) for at in _assignments(a, b)]
    # Where one has no value (x // (y // 128) at small y), nothing is learned; somewhere it must be.
    told = [(x, y) for x, y in tried if x is not None and y is not None]
    return bool(told) and all(x == y for x, y in told)


def _expression(size: int | SymInt) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _is_unbacked(expr: sympy.Expr) -> bool:
    return any(symbol_is_type(s, SymT.UNBACKED_INT) for s in expr.free_symbols)


def _assignments(a: sympy.Expr, b: sympy.Expr) -> Iterator[dict[sympy.Symbol, sympy.Integer]]:
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for first, step in _TRIALS:
        yield {s: sympy.Integer(first + i * step) for i, s in enumerate(symbols)}


def _evaluate(expr: sympy.Expr, at: dict[sympy.Symbol, sympy.Integer]) -> sympy.Expr | None:
    """The value of an expression; None where it divides by zero."""
    try:
        return expr.xreplace(at)
    except ZeroDivisionError:
        return None
