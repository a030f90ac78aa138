"""Which operator of one program is which of another: before and after passes, or of two models.

Evidence is used from strong to weak, each kind for what the stronger ones left open:

1. the same operator with the same arguments on aligned operands, from the inputs on;
2. the only operator of its kind with these constants, numbers and type on both sides;
3. the same operator with the same arguments, where one operand is aligned;
4. the same name, operator, module and source line;
5. the same place in the arguments of aligned readers: one value was replaced by another;
6. provenance: one was made from the other;
7. the same operator, module and source line; the same name; aligned operands alone.

Names come late because two captures of nearly the same model number the operators differently;
between candidates that are alike, an equal name decides.

Every step is a walk over the operators with look-ups by hash: linear in their number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Set
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.program import Program
from planish.ir.tensortype import type_text
from planish.ir.text import node_text, value_names

Key = Callable[[Node], Hashable]


def align(before: Program, after: Program) -> dict[Node, Node]:
    """Pair the operators of two programs.

    Returns:
        For each operator of ``after`` that has a counterpart, that one of ``before``; no two have
        the same. Deterministic: equal programs give equal pairs.
    """
    return _Aligner(before, after).pairs()


class _Aligner:
    def __init__(self, before: Program, after: Program):
        self.before, self.after = before, after
        self.partner: dict[Node, Node] = {}  # of `after` -> of `before`
        self.taken: set[Node] = set()
        self.types: dict[Node, str] = {}
        self.inputs = _inputs(before, after)
        self.local = _local_keys(before) | _local_keys(after)

    def pairs(self) -> dict[Node, Node]:
        self._forward(self._local)
        self._unique()
        self._forward(self._local)
        self._by_one_operand()
        self._by_key(_identity)
        self._forward(self._local)
        self._backward()
        self._provenance()
        self._by_key(lambda n: (n.target, _module(n), n.meta.get("stack_trace")))
        self._by_key(lambda n: (n.target, n.name))
        self._forward(lambda n: n.target)
        return self.partner

    def _local(self, node: Node) -> str:
        return self.local[node]

    def _pair(self, old: Node, new: Node) -> None:
        self.partner[new] = old
        self.taken.add(old)

    def _open(self) -> tuple[list[Node], list[Node]]:
        old = [n for n in self.before.operators if n not in self.taken]
        new = [n for n in self.after.operators if n not in self.partner]
        return old, new

    def _by_key(self, key: Key) -> None:
        """Pair those with equal keys, in order."""
        old, new = self._open()
        waiting = _Waiting((key(n), n) for n in old)
        for node in new:
            if (found := waiting.take(key(node), node.name)) is not None:
                self._pair(found, node)

    def _unique(self) -> None:
        old, new = self._open()
        counts = [Counter(map(self._local, nodes)) for nodes in (old, new)]
        only = {self._local(n): n for n in old if counts[0][self._local(n)] == 1}
        for node in new:
            key = self._local(node)
            if key in only and counts[1][key] == 1:
                self._pair(only[key], node)

    def _forward(self, key: Key) -> None:
        """Pair those with equal keys whose operands are paired one by one."""
        old, new = self._open()
        waiting = _Waiting(((key(n), self._read(n, old=True)), n) for n in old)
        for node in new:
            read = self._read(node, old=False)
            if None not in read and (found := waiting.take((key(node), read), node.name)):
                self._pair(found, node)

    def _by_one_operand(self) -> None:
        """Pair those of one line, but for the numbers of values, that read one value in common."""
        old, new = self._open()
        waiting = _Waiting(((self._local(n), o), n) for n in old for o in n.all_input_nodes)
        for node in new:
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    continue
                key = (self._local(node), self._token(operand, old=False))
                found = waiting.take(key, node.name, self.taken)
                if found is not None:
                    self._pair(found, node)
                    break

    def _read(self, node: Node, *, old: bool) -> tuple[Hashable, ...]:
        """The operands, as those of ``before``; None for one without a counterpart."""
        return tuple(self._token(operand, old=old) for operand in node.all_input_nodes)

    def _token(self, operand: Node, *, old: bool) -> Hashable:
        if operand.op == "get_attr":
            return f"@{operand.target}"
        if old:
            return operand
        return self.inputs.get(operand) or self.partner.get(operand)

    def _backward(self) -> None:
        """Pair values of one type that stand at the same place of paired readers."""
        self._operands(self.before.results, self.after.results)
        for node in reversed(self.after.operators):
            old = self.partner.get(node)
            if old is not None and old.target is node.target:
                self._operands(_flat(old), _flat(node))

    def _operands(self, old: Iterable[Any], new: Iterable[Any]) -> None:
        olds, news = list(old), list(new)
        if len(olds) != len(news):
            return
        for a, b in zip(olds, news, strict=True):
            if self._free(a, b) and self._type(a, self.before) == self._type(b, self.after):
                self._pair(a, b)

    def _free(self, old: object, new: object) -> bool:
        return (
            isinstance(old, Node)
            and isinstance(new, Node)
            and old.op == new.op == "call_function"
            and old not in self.taken
            and new not in self.partner
        )

    def _provenance(self) -> None:
        """Pair what was made with the last of what it was made from, the same operator first."""
        old, new = self._open()
        named = {n.name: n for n in old}
        order = {n: i for i, n in enumerate(old)}
        for node in reversed(new):
            _, _, sources = node.meta.get("from") or ("", "", ())
            found = [named[s] for s in sources if s in named and named[s] not in self.taken]
            alike = [
                n
                for n in found
                if n.target is node.target
                or self._type(n, self.before) == self._type(node, self.after)
            ]
            if alike:
                best = max(alike, key=lambda n: (n.target is node.target, order[n]))
                self._pair(best, node)

    def _type(self, node: Node, program: Program) -> str:
        if node not in self.types:
            self.types[node] = type_text(node.meta.get("val"), program.signature.symbols)
        return self.types[node]


class _Waiting:
    """Nodes by key, handed out once: the one of a wished name first, else in order."""

    def __init__(self, entries: Iterable[tuple[Hashable, Node]]):
        self._by_key: dict[Hashable, dict[str, Node]] = defaultdict(dict)
        for key, node in entries:
            self._by_key[key][node.name] = node

    def take(self, key: Hashable, name: str, taken: Set[Node] = frozenset()) -> Node | None:
        nodes = self._by_key.get(key)
        while nodes:
            node = nodes.pop(name if name in nodes else next(iter(nodes)))
            if node not in taken:
                return node
        return None


def _inputs(before: Program, after: Program) -> dict[Node, Node]:
    """Inputs of ``after`` -> of ``before``: by name, else by position where the counts agree."""
    named = dict(zip(before.signature.tensor_names, before.placeholders, strict=True))
    names = after.signature.tensor_names
    found = {
        node: named[name]
        for node, name in zip(after.placeholders, names, strict=True)
        if name in named
    }
    if not found and len(before.placeholders) == len(after.placeholders):
        return dict(zip(after.placeholders, before.placeholders, strict=True))
    return found


def _local_keys(program: Program) -> dict[Node, str]:
    """Each operator's line, without the numbers of values."""
    names = value_names(program)
    blank = {n: name if name.startswith("@") else "%" for n, name in names.items()}
    return {n: node_text(program, n, blank) for n in program.operators}


def _flat(node: Node) -> list[Node]:
    """The operands in order, repeated as often as they are read."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _identity(node: Node) -> Hashable:
    return node.name, node.target, _module(node), node.meta.get("stack_trace")
