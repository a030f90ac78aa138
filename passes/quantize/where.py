"""``Where``: which operators a pass works on, by name, by operator or by module path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.fx import Node

from planish.ir.errors import MisusedPassError
from planish.ir.ops import aten, op_name
from planish.ir.program import Program
from planish.passes.spec import suggestion

ATTENTION = aten.scaled_dot_product_attention.default
DECOMPOSE = "decompose-attention"  # the rule that writes attention as products


class NoSuchOperatorError(MisusedPassError):
    """A pattern matches nothing: the caller's to mend, whichever recipes might do without."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """A choice of operators.

    A pattern is a glob (``*``, ``?``, ``[..]``), and holds for an operator if it matches its name
    in the printed program (``linear_3``), what it computes (``aten.linear``), the path of the
    module it comes from (``encoder.layer.0.attention``), or that of a module around that one.

    Attributes:
        include: only what one of these matches; empty for everything.
        exclude: but not what one of these matches.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, node: Node) -> bool:
        """Whether an operator is chosen."""
        names = names_of(node)
        return self.included(names) and not self.excluded(names)

    def included(self, names: Iterable[str]) -> bool:
        """Whether one of the names is in ``include``, or that is empty."""
        return not self.include or _any(self.include, names)

    def excluded(self, names: Iterable[str]) -> bool:
        """Whether one of the names is in ``exclude``."""
        return _any(self.exclude, names)

    def check(self, program: Program) -> None:
        """Hold the patterns against a program.

        Raises:
            NoSuchOperatorError: a pattern matches no operator of it, a slip of the pen.
        """
        if not (self.include or self.exclude):
            return
        known = {name for node in program.operators for name in names_of(node)}
        for option in ("include", "exclude"):
            for pattern in getattr(self, option):
                if not _any((pattern,), known):
                    raise NoSuchOperatorError(
                        f"where.{option} holds {pattern!r}, which no operator answers to",
                        hint=suggestion(pattern, known, "names"),
                    )


EVERYWHERE = Where()


def names_of(node: Node) -> tuple[str, ...]:
    """All names of an operator: its own, its operator's, and the paths of its modules.

    A product that stands for an attention also has the names of that.
    """
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    names = (node.name, op_name(node.target), *dict.fromkeys(p for p in paths if p))
    _, rule, sources = node.meta.get("from", ("", "", ()))
    return (*names, op_name(ATTENTION), *sources) if rule == DECOMPOSE else names


def _any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
