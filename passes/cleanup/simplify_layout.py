"""Turn chains of operators that only move elements into one of them, or none.

Rewrite:
    reshape(reshape(x))       -> reshape(x) or x    likewise view, flatten, squeeze, unsqueeze, and
                                                    with contiguous, clone or detach in between
    reshape(x, [%n, 12, -1])  -> reshape(x, [-1, 12, 64])    no size is read that need not be
    permute(permute(x))       -> permute(x), transpose(x) or x
    permute(x)                -> reshape(x)    where only axes of size 1 move
    expand(expand(x))         -> expand(x)
    x[a:b][c:d]               -> x[a+c : min(b, a+d)]
    cat(a, cat(b, c))         -> cat(a, b, c)
    cat(split(x)), cat(x[:k], x[k:]), stack(unbind(x)) -> x;   split(cat(a, b)) -> a, b
    to(to(x, wide), narrow)   -> to(x, narrow) or x    where every value of x fits into ``wide``
    x[arange(n)[:, None], arange(m)] -> x, reshaped    whole ranges of every axis, in order
Shapes:    any. Symbolic sizes must be equal as formulas; a new reshape uses numbers, one -1, or
           the sizes that were there, and never computes sizes anew.
Requires:  what goes away is read by nobody else, so that each rewrite removes an operator.
Contract:  exact, bit by bit: elements move, none is computed. Strides are not values: a ``view``
           that cannot reach the new ones becomes a ``reshape``.
Cost:      linear; one type derivation for each operator that comes.
Refuses:   a first operator with other users; sizes or bounds known only at run time; strides that
           some operator reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from planish.ir.ops import is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.cleanup._indices import IndexIsReshape
from planish.passes.cleanup._memory import Memory
from planish.passes.cleanup._pieces import DropCatSplit, DropSplitCat, MergeCats, MergeSlices
from planish.passes.cleanup._reshapes import (
    PERMUTES,
    MergePermutes,
    MergeReshapes,
    NumberSizes,
    is_shared,
    past_copies,
    permutation,
    plan_reshape,
)
from planish.passes.cleanup._sizes import (
    same_sizes,
    shape_of,
    static,
    tensor_of,
)

aten = torch.ops.aten

_CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    }
)


def is_lossless(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of one element type is a value of the other."""
    if narrow == wide or narrow is torch.bool:
        return True
    if wide is torch.bool or narrow.is_complex or wide.is_complex:
        return False
    if narrow.is_floating_point:
        if not wide.is_floating_point:
            return False
        small, large = torch.finfo(narrow), torch.finfo(wide)
        finer = large.eps <= small.eps and large.tiny <= small.tiny
        return finer and large.max >= small.max
    low, high = torch.iinfo(narrow).min, torch.iinfo(narrow).max
    if wide.is_floating_point:
        # A float holds every integer up to 2 / eps, and no more without gaps.
        return max(-low, high) <= 2 / torch.finfo(wide).eps and high <= torch.finfo(wide).max
    return torch.iinfo(wide).min <= low and high <= torch.iinfo(wide).max


class MergeCasts(Rule):
    """``to(to(x, wide), narrow) -> to(x, narrow)``; ``x`` where that is its type."""

    name = "MergeCasts"
    roots = _CASTS

    def __init__(self, memory: Memory):
        self.memory = memory

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: a chain of casts on one device whose first loses nothing."""
        inner = past_copies(node.args[0])
        if not isinstance(inner, Node) or inner.target not in _CASTS:
            return None
        source = inner.args[0]
        values = [tensor_of(n) for n in (source, inner, node)]
        if any(v is None for v in values):
            return None
        x, wide, result = (v for v in values if v is not None)
        assert isinstance(source, Node)
        if not x.device == wide.device == result.device:
            return None
        if not is_lossless(x.dtype, wide.dtype):
            return self.refuse(node, f"the cast {inner.name} before it rounds or wraps values")
        is_back = x.dtype == result.dtype
        if not is_back and is_shared(inner, node):
            return self.refuse(node, f"{inner.name} has other users and would have to stay")
        objection = self.memory.objection(node, source) if is_back else None
        if objection:
            return self.refuse(node, objection)
        return Match(node, {"source": source, "dtype": None if is_back else result.dtype})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One cast, or none."""
        new, dtype = match["source"], match["dtype"]
        if dtype is not None:
            new = rewriter.call(aten.to.dtype, (new, dtype), like=match.root)
        self.memory.replace(match.root, new, rewriter)


class MergeExpands(Rule):
    """``expand(expand(x, s), t) -> expand(x, t)``."""

    name = "MergeExpands"
    roots = frozenset({aten.expand.default})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: a chain, its first part read by nobody else."""
        inner = node.args[0]
        if not isinstance(inner, Node) or not is_op(inner, aten.expand.default):
            return None
        if len(inner.users) > 1:
            return self.refuse(node, f"{inner.name} has other users and would have to stay")
        first: Any = inner.args[1]
        second: Any = node.args[1]
        # -1 keeps a size of the inner result, which the inner expand may have made.
        kept = [None] * (len(second) - len(first)) + list(first)
        sizes = [
            k if isinstance(s, int) and s == -1 else s for s, k in zip(second, kept, strict=True)
        ]
        return Match(node, {"source": inner.args[0], "sizes": sizes})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One expand."""
        args = (match["source"], match["sizes"])
        rewriter.replace(match.root, rewriter.call(aten.expand.default, args, like=match.root))


class PermuteIsReshape(Rule):
    """``permute(x) -> reshape(x)`` where the axes longer than 1 keep their order."""

    name = "PermuteIsReshape"
    roots = PERMUTES

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Guards: only axes of size 1 move, and the sizes are at hand."""
        source = node.args[0]
        assert isinstance(source, Node)
        shape = shape_of(source)
        order = [axis for axis in permutation(node) if static(shape[axis]) != 1]
        if order != sorted(order) or same_sizes(shape, shape_of(node)):
            return None
        plan = plan_reshape(shape, shape_of(node))
        return None if plan is None else Match(node, {"source": source, "plan": plan})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One reshape."""
        target, args = match["plan"]
        new = rewriter.call(target, (match["source"], *args), like=match.root)
        rewriter.replace(match.root, new)


@dataclass(frozen=True, kw_only=True)
class SimplifyLayout(Pass):
    """Merge operators that only move elements; see the module's docstring."""

    name: ClassVar[str] = "simplify-layout"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply the rules until none fires."""
        memory = Memory(program)
        rules = (
            MergeReshapes(memory),
            NumberSizes(),
            MergePermutes(memory),
            PermuteIsReshape(),
            MergeExpands(),
            MergeSlices(),
            MergeCats(),
            DropSplitCat(memory),
            DropCatSplit(memory),
            MergeCasts(memory),
            IndexIsReshape(memory),
        )
        return self.apply_rules(program, context, rules)
