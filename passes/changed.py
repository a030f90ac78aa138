"""Whether a pass changed a program: by canonical text and identity of constants, never by claim.

Two programs print the same if their operators agree one by one, which is far cheaper to see than
to print. Only where two operators do not agree structurally are their lines printed and compared,
since an argument that is written out may equal the default that another leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from planish.ir.program import Constant, Program
from planish.ir.rewriter import Change
from planish.ir.tensortype import type_text
from planish.ir.text import node_text, value_names


class Untouched:
    """A program as it was handed to a pass, to see whether anybody laid hands on it.

    Only identities are compared, which takes a tenth of the time of ``differs``. Whoever rebuilds
    the same thing has touched it; only ``differs`` can tell then.
    """

    def __init__(self, program: Program):
        self._program = program
        self._nodes = [
            (n, n.target, n.args, n.kwargs, n.meta.get("val")) for n in program.graph.nodes
        ]
        self._constants = dict(program.constants)
        self._layouts = dict(program.layouts)

    def holds(self, program: Program) -> bool:
        """Whether a program is the one that was handed out, and as it was then."""
        if program is not self._program or len(program.graph.nodes) != len(self._nodes):
            return False
        now = program.constants
        if program.layouts != self._layouts or any(
            now.get(name) is not value for name, value in self._constants.items()
        ):
            return False
        for node, (was, target, args, kwargs, value) in zip(
            program.graph.nodes, self._nodes, strict=True
        ):
            if (
                node is not was
                or node.target is not target
                or node.args is not args
                or node.kwargs is not kwargs
                or node.meta.get("val") is not value
            ):
                return False
        return True


def differs(before: Program, after: Program) -> bool:
    """Whether two programs print differently, or hold different tensors under one name."""
    return (
        _constants_differ(before, after)
        or _Walk(before, after).differs()
        or before.layouts != after.layouts
    )


def _live(program: Program) -> dict[str, Constant]:
    names = {str(n.target) for n in program.graph.find_nodes(op="get_attr")}
    return {name: program.constants[name] for name in names if name in program.constants}


def _constants_differ(before: Program, after: Program) -> bool:
    old, new = _live(before), _live(after)
    return old.keys() != new.keys() or any(new[name] is not value for name, value in old.items())


class _Walk:
    """Compares two graphs operator by operator, in the order in which they print.

    It looks at every argument of every operator after every pass, hence the plain loops.
    """

    def __init__(self, before: Program, after: Program):
        self.before = before
        self.after = after
        self.partner: dict[Node, Node] = {}
        self._names: tuple[dict[Node, str], dict[Node, str]] | None = None

    def differs(self) -> bool:
        old, new = self.before, self.after
        inputs = _pairs(old.placeholders, new.placeholders)
        operators = _pairs(old.operators, new.operators)
        if inputs is None or operators is None:
            return True
        self.partner = dict(inputs + operators)
        if not all(self._same_type(a, b) for a, b in inputs):
            return True
        for a, b in operators:
            same = (
                a.target is b.target
                and self._same_values(a.args, b.args)
                and self._same_named(a.kwargs, b.kwargs)
                and self._same_type(a, b)
            )
            if not same and not self._same_line(a, b):
                return True
        return not self._same_values(old.results, new.results)

    def _same_line(self, a: Node, b: Node) -> bool:
        if self._names is None:
            self._names = value_names(self.before), value_names(self.after)
        old = node_text(self.before, a, self._names[0])
        return old == node_text(self.after, b, self._names[1])

    def _same_type(self, a: Node, b: Node) -> bool:
        old, new = a.meta.get("val"), b.meta.get("val")
        if old is new:
            return True
        symbols = self.before.signature.symbols
        return type_text(old, symbols) == type_text(new, symbols)

    def _same_named(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        if not a and not b:
            return True
        return a.keys() == b.keys() and self._same_values(
            tuple(a.values()), tuple(b[name] for name in a)
        )

    def _same_values(self, old: Sequence[Any], new: Sequence[Any]) -> bool:
        """Whether arguments print the same, for sure."""
        if len(old) != len(new):
            return False
        partner = self.partner
        for a, b in zip(old, new, strict=True):
            if a is b:
                continue
            if isinstance(a, Node):
                if partner.get(a) is not b and not _same_constant(a, b):
                    return False
            elif not self._same_plain(a, b):
                return False
        return True

    def _same_plain(self, a: object, b: object) -> bool:
        if isinstance(a, (tuple, list)):
            return isinstance(b, (tuple, list)) and self._same_values(a, b)
        if type(a) is not type(b):
            return False
        if isinstance(a, (SymInt, SymFloat, SymBool)):
            return str(a) == str(b)
        return repr(a) == repr(b)


def _pairs(old: list[Node], new: list[Node]) -> list[tuple[Node, Node]] | None:
    return list(zip(old, new, strict=True)) if len(old) == len(new) else None


def _same_constant(a: Node, b: object) -> bool:
    """Whether two nodes read constants of one name."""
    if a.op != "get_attr" or not isinstance(b, Node):
        return False
    return b.op == "get_attr" and a.target == b.target


def unrecorded(before: Program, after: Program, changes: Iterable[Change]) -> tuple[str, ...]:
    """Names of the nodes that came or went without any change saying so."""
    old, new = ({n.name for n in program.operators} for program in (before, after))
    told = {name for change in changes for name in (*change.added, *change.removed)}
    return tuple(sorted((old ^ new) - told))


def outline(program: Program) -> Program:
    """A program of the same graph whose constants have types but no values, to be kept cheaply."""
    constants: dict[str, Constant] = {}
    made: dict[int, Tensor] = {}  # what is one tensor stays one
    for name, value in program.constants.items():
        constants[name] = value
        if isinstance(value, Tensor):
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            constants[name] = made.setdefault(id(value), empty)
    return Program(
        program.graph,
        constants,
        program.signature,
        program.samples,
        layouts=program.layouts,
    )
