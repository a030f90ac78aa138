"""Store equal constants once.

Rewrite:
    @a, @b with equal element type, shape and bytes  ->  @a for both
Shapes:    any, unchanged.
Requires:  equal bits, so 0.0 and -0.0 are different and NaNs are equal to themselves; equal device
           and equal sparse layout.
Contract:  exact; the same bits under another name. The name that stays is that of the constant the
           graph reads first.
Cost:      constants that share type and shape are told apart by a few of their elements; only
           those that agree in them are hashed in full. Linear in bytes at worst.
Refuses:   to merge two outputs of the program, which would then share their memory.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.cleanup._memory import escapes

_RULE = "MergeConstant"
_SAMPLED_ELEMENTS = 16


def digest(tensor: Tensor) -> bytes:
    """A hash of all the bits of a tensor."""
    return hashlib.sha256(_raw(tensor).cpu().numpy().data).digest()


def fingerprint(tensor: Tensor) -> Hashable:
    """Type, shape and the bits of some elements: equal for equal tensors."""
    step = max(1, tensor.numel() // _SAMPLED_ELEMENTS)
    some = tensor.detach().flatten()[::step]
    return (tensor.dtype, tuple(tensor.shape), tensor.device, bytes(_raw(some.cpu()).numpy()))


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class MergeDuplicateConstants(Pass):
    """Store equal constants once; see the module's docstring."""

    name: ClassVar[str] = "merge-duplicate-constants"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Let every reader of a duplicate read the constant that was read first."""
        rewriter = Rewriter(program, self.name, context.sites)
        refusals: list[Refusal] = []
        winners = _winners(program)
        readers: dict[str, Node] = {}
        for node in program.graph.find_nodes(op="get_attr"):
            winner = winners.get(str(node.target), str(node.target))
            kept = readers.setdefault(winner, node)
            if winner == node.target:
                continue
            if escapes(node) and escapes(kept):
                reason = f"@{winner} is the same, but two outputs would share their memory"
                refusals.append(Refusal(_RULE, node.name, reason, source_line(node)))
                continue
            with rewriter.site(_RULE, node) as allowed:
                if allowed:
                    rewriter.note(f"@{node.target} is @{winner}")
                    rewriter.replace(node, kept)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _winners(program: Program) -> dict[str, str]:
    """For each constant that equals one read before it, the name of that one."""
    order = dict.fromkeys(str(n.target) for n in program.graph.find_nodes(op="get_attr"))
    types = _shared_types(program)
    alike: dict[Hashable, list[str]] = defaultdict(list)
    for name in order:
        tensor = program.constants[name]
        if isinstance(tensor, Tensor) and (tensor.dtype, tensor.shape) in types:
            alike[fingerprint(tensor), program.layouts.get(name)].append(name)
    winners: dict[str, str] = {}
    for group in alike.values():
        first: dict[bytes, str] = {}
        for name in group if len(group) > 1 else ():
            tensor = program.constants[name]
            assert isinstance(tensor, Tensor)
            winner = first.setdefault(digest(tensor), name)
            if winner != name:
                winners[name] = winner
    return winners


def _shared_types(program: Program) -> set[tuple[torch.dtype, torch.Size]]:
    """Types that more than one constant has."""
    seen: set[tuple[torch.dtype, torch.Size]] = set()
    shared: set[tuple[torch.dtype, torch.Size]] = set()
    for value in program.constants.values():
        if isinstance(value, Tensor) and value.layout is torch.strided:
            kind = (value.dtype, value.shape)
            (shared if kind in seen else seen).add(kind)
    return shared
