"""Whether a pass changed a program: by canonical text and identity of constants, never by claim.

Two programs print the same if their operators agree one by one, which is far cheaper to see than
to print. Only where two operators do not agree structurally are their lines printed and compared,
since an argument that is written out may equal the default that another leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from planish.ir.program import Constant, Program
from planish.ir.rewriter import Change
from planish.ir.tensortype import type_text
from planish.ir.text import node_text, value_names


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
    """Compares two graphs operator by operator, in the order in which they print."""

    def __init__(self, before: Program, after: Program):
        self.before = before
        self.after = after
        self.partner: dict[Node, Node] = {}
        self._names: tuple[dict[Node, str], dict[Node, str]] | None = None

    def differs(self) -> bool:
        old, new = self.before, self.after
        if not self._paired(old.placeholders, new.placeholders):
            return True
        if not all(self._same_type(a, b) for a, b in self.partner.items()):
            return True
        if not self._paired(old.operators, new.operators):
            return True
        for a, b in zip(old.operators, new.operators, strict=True):
            if not self._same_operator(a, b) and not self._same_line(a, b):
                return True
        return not self._same(old.results, new.results)

    def _paired(self, old: list[Node], new: list[Node]) -> bool:
        if len(old) != len(new):
            return False
        self.partner.update(zip(old, new, strict=True))
        return True

    def _same_operator(self, a: Node, b: Node) -> bool:
        return (
            a.target is b.target
            and self._same(a.args, b.args)
            and self._same_named(a.kwargs, b.kwargs)
            and self._same_type(a, b)
        )

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
        return a.keys() == b.keys() and all(self._same(value, b[name]) for name, value in a.items())

    def _same(self, a: object, b: object) -> bool:
        """Whether two arguments print the same, for sure."""
        if isinstance(a, Node):
            if a.op == "get_attr":
                return isinstance(b, Node) and b.op == "get_attr" and a.target == b.target
            return self.partner.get(a) is b
        if isinstance(a, (tuple, list)):
            if not isinstance(b, (tuple, list)) or len(a) != len(b):
                return False
            return all(map(self._same, a, b))
        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, (SymInt, SymFloat, SymBool)):
            return str(a) == str(b)
        return repr(a) == repr(b)


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
