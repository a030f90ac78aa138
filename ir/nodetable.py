"""What torch's JSON form of a graph leaves out: the order of the nodes, and where they came from.

Torch writes the items of a tuple as outputs of the node that makes it, so the order of ``getitem``
nodes is lost, and it knows nothing of planish's provenance.
"""

from __future__ import annotations

import math
import operator
import re
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from planish.ir.program import Constant, Program

# Functions on symbolic numbers that a graph may call and torch's JSON has no name for.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": operator.abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "not": operator.not_,
    "round": round,
    "sum": torch.sym_sum,
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_STAND_INS = {1: operator.neg, 2: operator.add}

_FILE = re.compile(r'File "([^"]+)"')


@dataclass(frozen=True)
class NodeTable:
    """One row per node, in order, and the strings and module paths they share.

    A row has: ``name``; ``read`` (the constant a ``get_attr`` reads); ``from`` (pass, rule, names
    of the nodes it came from); ``trace`` and ``modules`` (indices); ``function`` (``torch_fn``);
    ``call`` (a function on numbers that torch's JSON has no name for).
    """

    rows: list[dict[str, Any]]
    traces: list[str]
    modules: list[Any]

    @classmethod
    def of(cls, program: Program, exported: ExportedProgram) -> Self:
        """The table of a program that was translated to ``exported`` under the same names."""
        present = {node.name for node in exported.graph.nodes}
        traces: dict[str, int] = {}
        modules: dict[tuple[tuple[str, str, str], ...], int] = {}
        rows = []
        for node in program.graph.nodes:
            if node.op == "output" or (node.op != "get_attr" and node.name not in present):
                continue  # a second getitem of one item, which torch merged into the first
            row: dict[str, Any] = {"name": node.name}
            if node.target in _FUNCTION_NAMES:
                row["call"] = _FUNCTION_NAMES[node.target]
            if node.op == "get_attr":
                row["read"] = str(node.target)
            if "from" in node.meta:
                origin, rule, sources = node.meta["from"]
                row["from"] = [origin, rule, list(sources)]
            if trace := node.meta.get("stack_trace"):
                row["trace"] = traces.setdefault(shorten(trace), len(traces))
            if stack := node.meta.get("nn_module_stack"):
                key = tuple((k, path, _type_name(kind)) for k, (path, kind) in stack.items())
                row["modules"] = modules.setdefault(key, len(modules))
            if function := node.meta.get("torch_fn"):
                row["function"] = list(function)
            rows.append(row)
        return cls(rows, list(traces), [[list(entry) for entry in key] for key in modules])

    def to_json(self) -> dict[str, Any]:
        """The table as JSON."""
        return {"rows": self.rows, "traces": self.traces, "modules": self.modules}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        return cls(list(data["rows"]), list(data["traces"]), list(data["modules"]))

    def meta(self, row: dict[str, Any]) -> dict[str, Any]:
        """The metadata a row stands for, without the type."""
        meta: dict[str, Any] = {}
        if "from" in row:
            origin, rule, sources = row["from"]
            meta["from"] = (origin, rule, tuple(sources))
        if "trace" in row:
            meta["stack_trace"] = self.traces[row["trace"]]
        if "modules" in row:
            stack = self.modules[row["modules"]]
            meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in stack}
        if "function" in row:
            meta["torch_fn"] = tuple(row["function"])
        return meta


def _type_name(kind: Any) -> str:  # noqa: ANN401 - a class or its name
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


_SITE = tuple(
    sorted(
        {
            str(Path(torch.__file__).parent.parent),
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
        }
    )
)


def shorten(trace: str) -> str:
    """A stack trace in which installed packages are ``.../package/file.py``."""

    def short(match: re.Match[str]) -> str:
        for site in _SITE:
            if match[1].startswith(site + "/"):
                return f'File "...{match[1][len(site) :]}"'
        return match[0]

    return _FILE.sub(short, trace)


def shorten_bodies(graph: Any) -> None:  # noqa: ANN401 - torch's JSON
    """Shorten the stack traces that torch's JSON holds (those in bodies of branches)."""
    if isinstance(graph, dict):
        if isinstance(trace := graph.get("stack_trace"), str):
            graph["stack_trace"] = shorten(trace)
        for value in graph.values():
            shorten_bodies(value)
    elif isinstance(graph, list):
        for value in graph:
            shorten_bodies(value)


def make_writable(node: Node) -> None:
    """Bring a call into a form that torch's JSON has, with the same arguments.

    ``[2, 0.5]`` becomes ``[2.0, 0.5]``; a call that gives a number takes its arguments by position;
    a function that has no name there is replaced by a stand-in (``NodeTable`` keeps the real one).
    """
    if node.target in _FUNCTION_NAMES:
        stand_in: Any = _STAND_INS[len(node.args)]
        node.target = stand_in
    if not isinstance(node.target, OpOverload):
        return
    node.args = tuple(_even(a) for a in node.args)
    node.kwargs = {k: _even(v) for k, v in node.kwargs.items()}
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        declared = node.target._schema.arguments[len(node.args) :]
        node.args += tuple(node.kwargs[a.name] for a in declared if a.name in node.kwargs)
        node.kwargs = {}


def _even(value: Any) -> Any:  # noqa: ANN401 - any argument
    """Torch's JSON has lists of ints and lists of floats, and none of both."""
    if isinstance(value, (list, tuple)) and {type(v) for v in value} == {int, float}:
        return [float(v) for v in value]
    return value


# -- back to a graph ------------------------------------------------------------------------------


def rebuild(
    exported: ExportedProgram,
    table: NodeTable,
    results: list[Any],
    decode: Callable[[Any], Any],
) -> Graph:
    """The graph over ``get_attr`` nodes, in the order of the table and with its metadata.

    Raises:
        KeyError, ValueError: table and graph do not fit each other.
    """
    nodes = {node.name: node for node in exported.graph.nodes}
    lifted = {
        str(spec.target): nodes[spec.arg.name]
        for spec in exported.graph_signature.input_specs
        if spec.target is not None
    }
    bodies: dict[str, list[Node]] = {}
    for node in exported.graph.find_nodes(op="get_attr"):
        bodies.setdefault(str(node.target), []).append(node)
    graph = Graph()
    new: dict[Node, Node] = {}
    for row in table.rows:
        if "read" in row:
            target = str(row["read"])
            made = graph.create_node("get_attr", target, name=row["name"])
            if target in lifted:
                made.meta["val"] = lifted[target].meta["val"]
                new[lifted[target]] = made
            else:
                new.update(dict.fromkeys(bodies[target], made))
        else:
            old = nodes[row["name"]]
            made = graph.node_copy(old, lambda n: new[n])
            if "call" in row:
                made.target = _FUNCTIONS[row["call"]]
            made.meta = {"val": old.meta["val"]} if "val" in old.meta else {}
            new[old] = made
        made.meta |= table.meta(row)
    graph.output(
        tuple(
            new[nodes[entry["node"]]] if "node" in entry else decode(entry["value"])
            for entry in results
        )
    )
    graph.lint()
    return graph


def body_orders(constants: Mapping[str, Constant], prefix: str = "") -> dict[str, list[str]]:
    """For every body of a branch, nested ones included, the names of its nodes in order."""
    orders: dict[str, list[str]] = {}
    for name, body in constants.items():
        if isinstance(body, GraphModule):
            orders[prefix + name] = [n.name for n in body.graph.nodes if n.op != "output"]
            inner = {k: v for k, v in body.named_children() if isinstance(v, GraphModule)}
            orders |= body_orders(inner, f"{prefix}{name}.")
    return orders


def reorder_bodies(module: GraphModule, orders: Mapping[str, list[str]]) -> dict[str, GraphModule]:
    """Bring the bodies of branches into their recorded order; returns the outermost ones."""
    for path, order in orders.items():
        body = module.get_submodule(path)
        if not isinstance(body, GraphModule):
            raise ValueError(f"{path} is not the body of a branch")
        present = {n.name: n for n in body.graph.nodes}
        wanted = [present[name] for name in order if name in present]
        graph = Graph()
        new: dict[Node, Node] = {}
        for node in wanted:
            new[node] = graph.node_copy(node, lambda n: new[n])  # noqa: B023 - called at once
        output = graph.output(map_arg(body.graph.output_node().args[0], lambda n: new[n]))  # noqa: B023
        output.meta = dict(body.graph.output_node().meta)
        body.graph = graph
    return {path: module.get_submodule(path) for path in orders if "." not in path}  # type: ignore[misc]
