"""The program before and after a run as plain data: what the HTML report draws.

Node names are unique within one state of a program only: a copy may give the name of a node that
went away to a new one. Which node is which is therefore followed from change to change.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.ir.changes import Change
from planish.ir.errors import source_line
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.ir.tensortype import tensor_type, type_text
from planish.ir.text import format_value, node_text, value_names
from planish.passes.changed import outline

_KINDS = {"placeholder": "input", "get_attr": "constant", "call_function": "operator"}


class Graphs:
    """The captured and the optimized program, kept without the values of their constants.

    Nothing is written out before ``to_dict`` is called.

    Args:
        before: the captured program; unless it is ``after`` as well, nobody edits it any more.
        after: the optimized program. Its graph is copied, since the caller may go on editing it.
    """

    def __init__(self, before: Program, after: Program):
        copy = outline(after.clone())
        self._before = copy if before is after else outline(before)
        self._after = copy

    def to_dict(self, passes: Sequence[Sequence[Change]]) -> dict[str, Any]:
        """Both programs, with what happened to each node.

        Args:
            passes: the changes of every pass, in order.

        Returns:
            ``{"before": graph, "after": graph}``. A graph holds ``nodes`` in topological order and
            ``modules`` (path -> class). Every node has a ``name``, ``id`` (as the text prints it),
            ``kind`` (input, constant, operator or output), ``operator``, ``type``, ``call``,
            ``inputs`` (names), ``modules`` (paths from the outermost in), ``source``, ``status``
            (kept, edited, removed or added), ``change`` (number of the change that made or removed
            it; None where none says so), ``edits`` (numbers of changes that edited it in place)
            and ``partners`` (nodes of the other graph whose values stand for its own).
        """
        story = _Story(self._before, passes)
        before, after = _Rows(self._before), _Rows(self._after)
        ends = {token.name: token for token in story.first.values()}
        for row in before.values:
            token = ends.get(row["name"])
            kept = token is not None and story.alive.get(token.name) is token
            row |= _fate("kept" if kept else "removed", token.gone if token else None, token)
        for row in after.values:
            token = story.alive.get(row["name"])
            kept = token is not None and token is ends.get(row["name"])
            row |= _fate("kept" if kept else "added", token.made if token else None, token)
        _join(story, before, after)
        for rows, other in ((before, after), (after, before)):
            for row in rows.values:
                if row["status"] == "kept" and (row["edits"] or _differ(row, rows, other)):
                    row["status"] = "edited"
        return {"before": before.to_dict(), "after": after.to_dict()}


@dataclass(eq=False)
class _Token:
    """One node, whatever state of the program it is in.

    Attributes:
        name: its name for as long as it lives.
        made: number of the change that made it; None for a captured node.
        gone: number of the change that removed it.
        edits: numbers of changes that edited it in place.
        heirs: nodes whose values stand for its own.
    """

    name: str
    made: int | None = None
    gone: int | None = None
    edits: list[int] = field(default_factory=list)
    heirs: list[_Token] = field(default_factory=list)


class _Story:
    """Follows nodes through the changes of a run.

    Attributes:
        first: the captured nodes by name.
        alive: the nodes of the last state by name.
    """

    def __init__(self, program: Program, passes: Sequence[Sequence[Change]]):
        self.first = {n.name: _Token(n.name) for n in program.graph.nodes if n.op != "output"}
        self.alive = dict(self.first)
        for changes in passes:
            for change in changes:
                self._follow(change)

    def _follow(self, change: Change) -> None:
        old: dict[str, _Token] = {}
        for name in change.removed:
            if (token := self.alive.pop(name, None)) is not None:
                token.gone = change.number
                old[name] = token
        new: dict[str, _Token] = {}
        for name in change.added:
            if name in change.removed and name not in old:
                continue  # it came and went within this one rewrite
            new[name] = self.alive[name] = _Token(name, made=change.number)
        for before, after in change.replaced:
            former = old.get(before) or self.alive.get(before)
            latter = new.get(after) or self.alive.get(after)
            if former is None or latter is None:
                continue  # a value that this very rewrite had made
            if former is latter:
                former.edits.append(change.number)
            else:
                former.heirs.append(latter)

    def heirs(self, token: _Token) -> list[str]:
        """Names of the nodes of the last state whose values stand for a node's."""
        found: dict[str, None] = {}
        seen = {token}
        pending = [token]
        while pending:
            current = pending.pop()
            if current is not token and self.alive.get(current.name) is current:
                found[current.name] = None
            for heir in current.heirs:
                if heir not in seen:
                    seen.add(heir)
                    pending.append(heir)
        return list(found)


class _Rows:
    """The nodes of one program, written out."""

    def __init__(self, program: Program):
        self._program = program
        self._symbols = program.signature.symbols
        self._ids = value_names(program)
        self._names = {n: n.name for n in program.graph.nodes}
        self._anonymous: dict[Node, str] = defaultdict(lambda: "_")
        self.modules: dict[str, str] = {}
        self.shapes: dict[str, str] = {}  # name -> the call without the names of its operands
        self.values = [self._row(n) for n in program.graph.nodes if n.op in _KINDS]
        self.rows = [*self.values, *self._outputs()]
        self.by_name = {row["name"]: row for row in self.rows}

    def _row(self, node: Node) -> dict[str, Any]:
        kind = _KINDS[node.op]
        operator = op_name(node.target) if kind == "operator" else kind
        call = str(node.target)
        type_ = type_text(node.meta.get("val"), self._symbols)
        if kind == "operator":
            call = _call(node_text(self._program, node, self._names))
            self.shapes[node.name] = _call(node_text(self._program, node, self._anonymous))
        row: dict[str, Any] = {
            "name": node.name,
            "id": self._ids[node],
            "kind": kind,
            "operator": operator,
            "type": type_,
            "call": call if kind == "operator" else self._ids[node],
            "inputs": list(dict.fromkeys(n.name for n in node.all_input_nodes)),
            "modules": self._stack(node),
            "source": source_line(node),
        }
        if kind == "constant":
            value = self._program.constants.get(call)
            if isinstance(value, Tensor):
                layout = self._program.layouts.get(call)
                row["type"] = str(tensor_type(value, self._symbols, layout))
                row["bytes"] = math.prod(value.shape) * value.element_size()
            else:
                row["operator"], row["type"] = "body", "body of a branch"
            self.shapes[node.name] = f"{call}: {row['type']}"
        return row

    def _stack(self, node: Node) -> list[str]:
        """Paths of the modules it was called in, from the outermost; the model itself left out."""
        stack = []
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else kind.__qualname__
            self.modules.setdefault(str(path), name.rpartition(".")[2])
            if path:
                stack.append(str(path))
        return stack

    def _outputs(self) -> Iterable[dict[str, Any]]:
        for position, value in enumerate(self._program.results):
            # No node has a colon in its name.
            names = self._program.signature.output_names
            label = names[position] if position < len(names) else f"output_{position}"
            is_node = isinstance(value, Node)
            yield {
                "name": f"output:{position}",
                "id": label,
                "kind": "output",
                "operator": "output",
                "type": type_text(value.meta.get("val"), self._symbols) if is_node else "",
                "call": format_value(value, self._names, self._symbols),
                "inputs": [value.name] if is_node else [],
                "modules": [],
                "source": None,
                **_fate("kept", None, None),
            }

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"nodes": self.rows, "modules": self.modules}


def _call(line: str) -> str:
    """``aten.relu(x)`` of ``%0: f32[2] = aten.relu(x)``."""
    return line.partition(" = ")[2]


def _fate(status: str, change: int | None, token: _Token | None) -> dict[str, Any]:
    edits = list(token.edits) if token is not None else []
    return {"status": status, "change": change, "edits": edits, "partners": []}


def _join(story: _Story, before: _Rows, after: _Rows) -> None:
    """Say of every node which nodes of the other graph stand for it."""
    for name, token in story.first.items():
        row = before.by_name[name]
        heirs = [heir for heir in story.heirs(token) if heir in after.by_name]
        row["partners"] = [name] if row["status"] == "kept" else heirs
        for partner in row["partners"]:
            after.by_name[partner]["partners"].append(name)
    for row in before.rows:
        if row["kind"] == "output" and row["name"] in after.by_name:
            row["partners"] = [row["name"]]
            after.by_name[row["name"]]["partners"] = [row["name"]]


def _differ(row: dict[str, Any], rows: _Rows, other: _Rows) -> bool:
    """Whether a kept node's operator, or arguments that are no values, are others than before."""
    name = row["name"]
    return name in other.by_name and rows.shapes.get(name) != other.shapes.get(name)
