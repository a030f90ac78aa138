"""Compute what depends on constants only.

Rewrite:
    f(c1, ..., cn)        -> c,  c = f(c1, ..., cn) computed once by the real operators
    new_ones(x, [2, 3])   -> c,  likewise for every factory that reads only the type of ``x``
    sym_size(x, i)        -> n,  where that size, or arithmetic on sizes, is a number
Shapes:    any; every size of the result must be a number.
Requires:  f is deterministic; its tensors are constants. Only the last value of a chain of
           constants is stored, never what lies in between.
Contract:  exact; the same operators run on the same bits, only earlier.
Cost:      one evaluation; linear in nodes. The file grows by at most ``max_growth_bytes`` for each
           fold: what the result takes beyond the constants that nobody else reads.
Refuses:   a result that is too big (``expand`` of a small table), an output of the program (it
           would be the constant's own memory), a constant with a sparse layout. Dequantization is
           never folded: it would undo the quantization.
Fails:     PassError if an operator fails on its constants; it would fail at every call.
Source:    Wegman and Zadeck, "Constant Propagation with Conditional Branches", TOPLAS 1991.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import RecipeError, source_line
from planish.ir.ops import is_view, op_name
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.cleanup._known import Known, as_number, known_values, size_bytes
from planish.passes.cleanup._memory import escapes

_FOLD, _SIZE = "FoldConstant", "FoldSize"


def growth_bytes(result: int, freed: Mapping[str, int]) -> int:
    """By how many bytes the constants grow if a result is stored and others are dropped."""
    return result - sum(freed.values())


class _Ledger:
    """Which constants the folds free; what one fold has gained by, no other can gain by again."""

    def __init__(self, program: Program):
        self.readers: dict[str, list[Node]] = defaultdict(list)
        self.left: dict[str, int] = {}
        for reader in program.graph.find_nodes(op="get_attr"):
            held = program.constant(reader)
            if held is not None:
                self.readers[str(reader.target)].append(reader)
                self.left[str(reader.target)] = size_bytes(held)

    def freed(self, leaves: Iterable[str], known: Mapping[Node, Known]) -> dict[str, int]:
        """Bytes of the constants among these that nobody unknown reads, as far as not spent."""
        return {
            name: self.left[name]
            for name in sorted(leaves)
            if all(user in known for reader in self.readers[name] for user in reader.users)
        }

    def spend(self, freed: Mapping[str, int], needed: int) -> None:
        """Set what a result needs against what it frees."""
        for name, held in freed.items():
            self.left[name] = held - min(held, needed)
            needed -= min(held, needed)


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute what depends on constants only; see the module's docstring.

    Attributes:
        max_growth_bytes: bytes one fold may add to the constants.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Wegman and Zadeck, Constant Propagation with Conditional Branches, TOPLAS 1991",
    )

    max_growth_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.max_growth_bytes < 0:
            raise RecipeError(
                f"{self.name}: max_growth_bytes is {self.max_growth_bytes}",
                hint="give the bytes one fold may add, 0 or more",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fold every value that is known and worth storing."""
        rewriter = Rewriter(program, self.name, context.sites)
        refusals: dict[Node, str] = {}
        known = known_values(program, refusals)
        stored = self._stored(program, known, refusals)
        for node in [n for n in program.operators if n in stored]:
            number = as_number(known[node].value)
            with rewriter.site(_FOLD if number is None else _SIZE, node) as allowed:
                if allowed and number is not None:
                    rewriter.replace(node, number)
                elif allowed:
                    rewriter.replace(node, _constant(node, known[node], rewriter))
        alive = set(program.operators)
        found = [
            Refusal(_FOLD, node.name, reason, source_line(node))
            for node, reason in refusals.items()
            if node in alive
        ]
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(found))

    def _stored(
        self, program: Program, known: dict[Node, Known], refusals: dict[Node, str]
    ) -> set[Node]:
        """Which known values become constants: those that something unknown reads.

        A refused value counts as unknown, so its operands are asked again, until nothing changes.
        """
        order = [n for n in reversed(program.operators) if n in known]
        stored: set[Node] = set()
        settled = False
        while not settled:
            settled = True
            stored.clear()
            ledger = _Ledger(program)
            for node in order:
                if node not in known or all(user in known for user in node.users):
                    continue
                reason = self._reason(node, program, known, ledger)
                if reason is None:
                    stored.add(node)
                    continue
                refusals[node] = reason
                del known[node]
                settled = False
        return stored

    def _reason(
        self, node: Node, program: Program, known: dict[Node, Known], ledger: _Ledger
    ) -> str | None:
        """Why a known value is not stored."""
        value, leaves = known[node].value, known[node].leaves
        if as_number(value) is not None:
            return None
        if not isinstance(value, Tensor):
            return "it returns several tensors, and not all of them are needed as constants"
        if escapes(node):
            return "it is an output, which must not be a constant's own memory"
        sparse = [name for name in sorted(leaves) if name in program.layouts]
        if sparse:
            return f"@{sparse[0]} is {program.layouts[sparse[0]]}, which the result would not be"
        freed, needed = ledger.freed(leaves, known), size_bytes(value)
        growth = growth_bytes(needed, freed)
        if growth > self.max_growth_bytes:
            return (
                f"the file would grow by {growth} bytes, more than "
                f"max_growth_bytes={self.max_growth_bytes}"
            )
        ledger.spend(freed, needed)
        return None


def _constant(node: Node, known: Known, rewriter: Rewriter) -> Node:
    """A constant that holds a known value: one that exists, or new memory of its own."""
    value: Tensor = known.value
    for source in node.all_input_nodes:
        held = rewriter.program.constant(source)
        if held is not None and _is_same_memory(held, value):
            return source
    (name,) = known.leaves if len(known.leaves) == 1 else (f"folded.{_short(node)}",)
    # A view would keep the whole constant it was cut from alive, and share its memory.
    copied = value.clone(memory_format=torch.contiguous_format)
    own = copied if is_view(node.target) else value.contiguous()
    return rewriter.constant(own, name, like=node)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
    )


def _short(node: Node) -> str:
    return op_name(node.target).split(".")[1]
