"""Decide comparisons of index arithmetic that come out the same for every size.

Rewrite:
    f(arange(n), arange(m), c, ...)  ->  expand(c)    where every element of f is one number c
    embedding(W, c everywhere)       ->  expand(W[c])
Such as:   ``arange(n)[:, None] >= 0`` is True everywhere, and so is the test that positions
           ``0, 1, 2, ...`` belong to one sequence: ``cumsum(diff(arange(n)) != 1)`` is 0. Traced
           masks of attention are full of both.
How:       integer tensors are followed as lines ``start + sum(step[a] * i[a])`` over their own
           coordinates, through views, sums, differences and comparisons. Sizes stay symbols; since
           coordinates start at 0, the signs of the steps often decide.
Shapes:    any. ``c`` is a constant of one element; ``expand`` gives it the shape.
Requires:  integers of 32 or 64 bits, and booleans made from them.
Contract:  exact, bit by bit, for every legal size.
Cost:      one walk, linear in nodes.
Refuses:   a result whose symbolic sizes no operator has computed before it, and an output of the
           program, which would be the constant's own memory.
Source:    Cousot and Halbwachs, "Automatic Discovery of Linear Restraints Among Variables of a
           Program", POPL 1978: lines are the simplest of their domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.cleanup._affine import Affine
from planish.passes.cleanup._follow import affine_values
from planish.passes.cleanup._memory import escapes
from planish.passes.cleanup._sizes import shape_of, size_arguments
from planish.passes.cleanup._uniform import uniform

aten = torch.ops.aten

_FOLD, _LOOKUP = "FoldUniform", "FoldLookup"


@dataclass(frozen=True, kw_only=True)
class FoldRanges(Pass):
    """Decide comparisons of index arithmetic; see the module's docstring."""

    name: ClassVar[str] = "fold-ranges"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Cousot and Halbwachs, Automatic Discovery of Linear Restraints Among Variables of a "
        "Program, POPL 1978",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace each decided value that something undecided reads."""
        rewriter = Rewriter(program, self.name, context.sites)
        known = affine_values(program)
        found, refusals = _undecided_readers(program, known)
        for node, sizes in found.items():
            with rewriter.site(_FOLD, node) as allowed:
                if allowed:
                    _replace(node, _number(node, known[node].start), sizes, rewriter)
        rows, declined = _lookups(program)
        for node, (row, wide, name) in rows.items():
            with rewriter.site(_LOOKUP, node) as allowed:
                if allowed:
                    _replace(node, row, wide, rewriter, name)
        refusals += declined
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _undecided_readers(
    program: Program, known: dict[Node, Affine]
) -> tuple[dict[Node, list[Any]], list[Refusal]]:
    """Decided values that something undecided reads, with their sizes as arguments.

    What already is one number, spread out, would only be written anew.
    """
    refusals: list[Refusal] = []
    found: dict[Node, list[Any]] = {}
    decided = {n for n, line in known.items() if line.is_uniform and n.op == "call_function"}
    for node in reversed(program.operators):
        if node not in decided or uniform(node, program) is not None:
            continue
        if all(user in decided for user in node.users):
            continue
        sizes = _spread(node, program)
        if isinstance(sizes, str):
            decided.discard(node)
            refusals.append(Refusal(_FOLD, node.name, sizes, source_line(node)))
        else:
            found[node] = sizes
    return dict(reversed(found.items())), refusals


def _lookups(program: Program) -> tuple[dict[Node, tuple[Tensor, list[Any], str]], list[Refusal]]:
    """Lookups of one and the same row of a table: the row, the sizes, the table's name."""
    refusals: list[Refusal] = []
    found: dict[Node, tuple[Tensor, list[Any], str]] = {}
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        source, index = node.args[0], uniform(node.args[1], program)
        table = program.constant(source)
        if table is None or not isinstance(source, Node) or not isinstance(index, int):
            continue
        sizes = _spread(node, program)
        if isinstance(sizes, str):
            refusals.append(Refusal(_LOOKUP, node.name, sizes, source_line(node)))
        else:
            found[node] = (table[index], sizes, str(source.target))
    return found, refusals


def _spread(node: Node, program: Program) -> list[Any] | str:
    """The sizes a constant has to be spread to in order to stand for a node; or why it cannot."""
    if escapes(node):
        return "it is an output, which must not be a constant's own memory"
    sizes = size_arguments(shape_of(node), program, node)
    return "it is a constant, but no operator has computed its sizes" if sizes is None else sizes


def _number(node: Node, value: int) -> Tensor:
    return torch.tensor(value, dtype=node.meta["val"].dtype)


def _replace(
    node: Node,
    value: Tensor,
    sizes: list[Any],
    rewriter: Rewriter,
    name: str = "folded.uniform",
) -> None:
    """Let the users of a node read a value, spread to the node's shape."""
    if value.dim() == 0:
        rewriter.note(f"it is {value.item()} everywhere")
    # Of full rank, so that it takes part in type promotion as the node did.
    held = value.reshape((1,) * (len(sizes) - value.dim()) + value.shape).clone()
    constant = rewriter.constant(held, name, like=node)
    rewriter.replace(node, rewriter.call(aten.expand.default, (constant, sizes), like=node))
