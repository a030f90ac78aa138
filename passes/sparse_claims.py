"""Sparse weights stay typed sparse: what a pass let go is found after it, whatever it was.

An operator *reads* a constant through operators that keep zeros where they are (``dequantize``,
casts, views, products). Where it read one that claims a layout, whatever stands for it afterwards
must read such a one too; a new constant without a claim in its place is a weight that went dense,
even if it still holds its zeros: nothing would check them any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from planish.ir.changes import Change
from planish.ir.errors import VerificationError
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout
from planish.passes.base import PassResult
from planish.passes.steps import Step

# Operators whose result is zero where their first operand is, in whatever order.
_KEEP_ZEROS = frozenset(
    {
        "planish.dequantize",
        *(
            f"aten.{name}"
            for name in (
                "alias", "clone", "contiguous", "detach", "div.Scalar", "div.Tensor", "expand",
                "flatten.using_ints", "mul.Scalar", "mul.Tensor", "neg", "numpy_T", "permute",
                "reshape", "slice.Tensor", "squeeze", "squeeze.dim", "t", "to.dtype",
                "to.dtype_layout", "_to_copy", "transpose.int", "unflatten.int", "unsqueeze",
                "view",
            )
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class LostClaim:
    """A weight that was sparse and is not any more.

    Attributes:
        constant: the one that claimed it.
        layout: what it claimed.
        reader: the operator that read it.
        now: the constant without a claim that is read in its place.
        node: what reads that.
    """

    constant: str
    layout: SparseLayout
    reader: str
    now: str
    node: Node


@dataclass
class _Read:
    """Constants that an operator reads: those that claim a layout, and the others."""

    sparse: dict[str, SparseLayout]
    dense: dict[str, Tensor]


def lost_claims(before: Program, after: Program, changes: Sequence[Change]) -> Iterator[LostClaim]:
    """Readers of sparse weights that read dense ones after a pass.

    Args:
        before: the program the pass got.
        after: what it made of it.
        changes: the rewrites it recorded.
    """
    if not before.layouts:
        return
    known = {id(value) for name, value in before.constants.items() if name not in before.layouts}
    edited = {name for change in changes for name in change.added}
    edited.update(goal for change in changes for source, goal in change.replaced if source == goal)
    goals = _goals(changes)
    now = {node.name: node for node in after.operators}
    fixed, fixed_now = _constant_nodes(before), _constant_nodes(after)
    for reader in before.operators:
        was = _read(before, reader, frozenset(), fixed)
        if not was.sparse:
            continue
        for name in sorted({reader.name, *goals.get(reader.name, ())} & now.keys()):
            node = now[name]
            read = _read(after, node, edited | {reader.name}, fixed_now)
            new = [n for n, value in read.dense.items() if id(value) not in known]
            if new and len(read.sparse) < len(was.sparse):
                constant, layout = next(iter(was.sparse.items()))
                yield LostClaim(constant, layout, reader.name, new[0], node)


def check_claims(step: Step, result: PassResult) -> None:
    """Hold a pass to the layouts it found, unless it declares that it gives them up.

    Raises:
        VerificationError: an operator whose weight was sparse reads a dense one; names the pass,
            the constant and its layout.
    """
    if not step.record.changed or step.pass_.gives_up_sparsity or step.before is None:
        return
    for lost in lost_claims(step.before, result.program, result.changes):
        raise VerificationError(
            f"{step.name} let go of a sparse weight: {lost.reader} read @{lost.constant}, which is "
            f"{lost.layout}, and {lost.node.name} reads @{lost.now}, which claims no layout",
            where=lost.node,
            hint="carry the claim along (`rewriter.constant(..., layout=...)`), or refuse",
        )


def _goals(changes: Iterable[Change]) -> dict[str, set[str]]:
    """Name of a node before -> names of all that were put in its place, through chains."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for change in changes:
        for source, goal in change.replaced:
            for old, goals in list(found.items()):
                if source in goals:
                    found[old].add(goal)
            found[source].add(goal)
    return dict(found)


def _read(program: Program, node: Node, through: Container[str], fixed: Container[Node]) -> _Read:
    """What an operator reads, also through new operators and through constant subgraphs."""
    found = _Read({}, {})
    seen: set[tuple[Node, bool]] = set()
    pending = [(operand, True) for operand in node.all_input_nodes]
    while pending:
        current, keeps = pending.pop()
        if (current, keeps) in seen:
            continue
        seen.add((current, keeps))
        value = program.constant(current)
        if value is not None:
            name = str(current.target)
            if keeps and name in program.layouts:
                found.sparse[name] = program.layouts[name]
            elif value.dim() > 1:
                found.dense[name] = value
        elif current in fixed:
            kept = keeps and op_name(current.target) in _KEEP_ZEROS
            pending += [
                (operand, kept and (position == 0 or operand.op == "call_function"))
                for position, operand in enumerate(current.all_input_nodes)
            ]
        elif current.name in through:
            pending += [(operand, True) for operand in current.all_input_nodes]
    return found


def _constant_nodes(program: Program) -> frozenset[Node]:
    """Operators that compute on constants only."""
    found: set[Node] = set()
    for node in program.operators:
        operands = node.all_input_nodes
        if operands and all(n in found or n.op == "get_attr" for n in operands):
            found.add(node)
    return frozenset(found)
