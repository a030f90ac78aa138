"""Remove what nobody reads.

Rewrite:
    y = f(x), y not read  ->  nothing; then whatever only f read
    const @c, not read    ->  nothing
Shapes:    any.
Requires:  f is pure. Inputs stay, whether read or not: they are the caller's contract.
Contract:  exact; what is removed had no way to reach an output.
Cost:      one walk from the outputs to the inputs: linear in nodes.
Refuses:   a dead operator that draws random numbers (those that follow it would draw others) or
           has an effect.
Source:    Aho, Lam, Sethi and Ullman, "Compilers", 2nd ed. 2006, section 9.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import is_pure_call
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult

_RULE = "DropUnread"


def is_removable(node: Node) -> bool:
    """Whether a node without readers may go."""
    return node.op == "get_attr" or (node.op == "call_function" and is_pure_call(node))


@dataclass(frozen=True, kw_only=True)
class EliminateDeadCode(Pass):
    """Remove what nobody reads; see the module's docstring."""

    name: ClassVar[str] = "eliminate-dead-code"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Aho, Lam, Sethi and Ullman, Compilers, 2nd ed. 2006, section 9.1",
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Remove each unread value, last first, together with what only it kept alive."""
        rewriter = Rewriter(program, self.name, context.sites)
        refusals: list[Refusal] = []
        for node in reversed(list(program.nodes)):
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            if not is_removable(node):
                reason = "nobody reads it, but it draws random numbers or has an effect"
                refusals.append(Refusal(_RULE, node.name, reason, source_line(node)))
                continue
            with rewriter.site(_RULE, node) as allowed:
                if allowed:
                    rewriter.erase(node)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))
