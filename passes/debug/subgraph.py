"""Programs made of some of another program's operators: what ``planish reduce`` tries one by one.

    y = f(x); z = g(y, w); out = h(z)      keep {g}:      program(%y, @w): z = g(y, w); return z

What the kept operators read from outside becomes an input, typed as the value was, whose sample is
the value the whole program computed there. What they give to the outside becomes an output. So any
set of operators makes a legal program that computes what it computed within the whole, and names,
source lines and module paths stay, so that rewrite rules see what they saw.

Only plain tensors can be cut. A size, a tuple, or a tensor whose shape depends on data comes along
with the operators that make it (``closure``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from planish.ir.program import Constant, Program, Signature
from planish.passes.debug.subgraph_sizes import plain_symbols, symbols_of, untold_by

aten = torch.ops.aten

# These read how a tensor lies in memory, which an input does not keep.
_READS_MEMORY = frozenset(
    {
        aten.as_strided.default,
        aten.as_strided_copy.default,
        aten.sym_stride.int,
        aten.sym_stride.default,
        aten.sym_storage_offset.default,
    }
)


class Values(Protocol):
    """What a program computed on its samples."""

    def of(self, names: Iterable[str]) -> Mapping[str, tuple[Any, ...]]:
        """The values of these nodes, one per sample."""


def can_cut(node: Node, user: Node) -> bool:
    """Whether a user may get this operator's value as an input instead."""
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and user.target not in _READS_MEMORY
        and not any(symbol_is_type(s, SymT.UNBACKED_INT) for s in symbols_of(value))
    )


def closure(program: Program, keep: Set[str]) -> frozenset[str]:
    """The named operators, and those whose values they need and cannot get as inputs.

    An operator that gives a tuple brings one that reads it, since a tuple is no output.
    """
    kept = set(keep)
    for node in program.operators:
        if node.name in keep and node.users and not _is_read(node, keep):
            kept.add(next(iter(node.users)).name)
    for node in reversed(program.operators):
        if any(
            user.name in kept and not can_cut(node, user)
            for user in node.users
            if user.op == "call_function"
        ):
            kept.add(node.name)
    return frozenset(kept)


def without(program: Program, keep: Set[str], drop: Set[str]) -> frozenset[str]:
    """The named operators less some, less those that cannot do without these or only serve them."""
    left = set(keep - drop)
    for node in program.operators:
        if any(
            o.name not in left and not can_cut(o, node)
            for o in node.all_input_nodes
            if o.op == "call_function"
        ):
            left.discard(node.name)
    for node in reversed(program.operators):
        if node.name in left and node.users and not _is_read(node, left):
            left.remove(node.name)
    return frozenset(left)


def _is_read(node: Node, kept: Set[str]) -> bool:
    """Whether a kept operator, or the outside, can read what a node gives."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return True
    return any(user.name in kept for user in node.users)


def induced(program: Program, keep: Set[str], values: Values) -> Program:
    """The program made of some operators of another one.

    Args:
        program: where they come from; not edited. Constants are shared with it.
        keep: names of operators; what they cannot do without is added.
        values: what ``program`` computed, for the samples of the new inputs.

    Returns:
        A program over flat tuples. Inputs and outputs are named like the nodes; an output that is
        no tensor is left out. Inputs that nobody reads are there where only they tell the size of
        a dynamic dimension.
    """
    kept = closure(program, keep)
    read, outputs = _border(program, kept)
    cut = [n for n in program.operators if n in read and n.name not in kept]
    samples = values.of(n.name for n in cut)
    witnesses = _witnesses(program, kept, read, cut)
    graph = Graph()
    mapping: dict[Node, Any] = {}
    rows: list[list[Any]] = [[] for _ in program.samples]
    for position, node in enumerate(program.placeholders):
        if node in read or node in witnesses:
            mapping[node] = _input(graph, node, node.meta.get("val"))
            for row, sample in zip(rows, program.samples, strict=True):
                row.append(sample[position])
    for node in cut:
        mapping[node] = _input(graph, node, _contiguous(program, node.meta["val"]))
        for row, value in zip(rows, samples[node.name], strict=True):
            row.append(value)
    for node in program.nodes:
        if node.name in kept or (node.op == "get_attr" and node in read):
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in outputs))
    return assembled(program, graph, program.constants, tuple(map(tuple, rows)))


def assembled(
    origin: Program,
    graph: Graph,
    constants: Mapping[str, Constant],
    samples: tuple[tuple[Any, ...], ...],
) -> Program:
    """A program over flat tuples, with the names of the graph and the dimensions of ``origin``."""
    inputs = tuple(n.name for n in graph.find_nodes(op="placeholder"))
    results: tuple[Node, ...] = tuple(graph.output_node().args[0])  # type: ignore[arg-type]  # a tuple
    symbols = {str(s) for n in graph.nodes for s in symbols_of(n.meta.get("val"))}
    signature = Signature(
        parameters=inputs,
        positional=len(inputs),
        input_names=inputs,
        fixed={},
        in_spec=pytree.tree_structure(((0,) * len(inputs), {})),
        out_spec=pytree.tree_structure((0,) * len(results)),
        output_names=_output_names(results, inputs),
        symbols={s: n for s, n in origin.signature.symbols.items() if s in symbols},
        ranges={s: r for s, r in origin.signature.ranges.items() if s in symbols},
    )
    program = Program(graph, dict(constants), signature, samples, layouts=origin.layouts)
    program.drop_dead_constants()
    return program


def _output_names(results: tuple[Node, ...], inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the nodes; one that is an input, or returned twice, gets a number."""
    taken = set(inputs)
    names = []
    for position, node in enumerate(results):
        name = node.name if node.name not in taken else f"output_{position}"
        taken.add(name)
        names.append(name)
    return tuple(names)


def _border(program: Program, kept: frozenset[str]) -> tuple[set[Node], list[Node]]:
    """All values the kept operators read, and the tensors they give to the outside.

    Where there is no such tensor, what none of them reads: a program has something to say.
    """
    read: set[Node] = set()
    outputs: list[Node] = []
    ends: list[Node] = []
    for node in program.operators:
        if node.name in kept:
            read.update(node.all_input_nodes)
            value = node.meta.get("val")
            users = [user.name in kept for user in node.users]
            if isinstance(value, Tensor) and not all(users):
                outputs.append(node)
            if isinstance(value, (Tensor, int, float, SymInt, SymFloat)) and not any(users):
                ends.append(node)
    return read, outputs or ends


def _input(graph: Graph, node: Node, value: object) -> Node:
    """A placeholder that stands for a node."""
    made = graph.create_node("placeholder", node.name, name=node.name)
    made.meta = {**node.meta, "val": value}
    return made


def _contiguous(program: Program, value: Tensor) -> Tensor:
    """The type of the same tensor in row-major order, as a sample of it is kept."""
    mode = program.fake_mode
    shape_env = mode.shape_env
    quiet = shape_env.suppress_guards() if shape_env is not None else nullcontext()
    with mode, quiet:
        if value.is_contiguous():
            return value
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _witnesses(
    program: Program, kept: frozenset[str], read: set[Node], cut: list[Node]
) -> set[Node]:
    """Inputs of the whole program that tell a size which the new inputs would leave open."""
    inputs = [*(n for n in program.placeholders if n in read), *cut]
    needed = untold_by(inputs, [n for n in program.operators if n.name in kept])
    found: set[Node] = set()
    for node in program.placeholders:
        told = needed & set(plain_symbols(node.meta.get("val")))
        if told:
            found.add(node)
            needed -= told
    return found
