"""What a seeded fault is: one wrong rewrite, to be planted in a copy of a real pass.

A fault changes what happens at one rewrite site of a pass. It listens in where the rules of the
pass talk to their rewriter: it may alter a call, a constant, a replacement or new arguments on
their way into the graph, or act when the site closes or when the whole pass is done. Or it brings a
rewrite of its own, ``extra``, which the pass should have refused; that one is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # target, args, kwargs


# What sorts of mistakes there are; the catalogue holds some of each.
KINDS = frozenset(
    {
        "aliased weight edited",
        "batch-norm formula",
        "changed signature",
        "dead node",
        "dropped bias",
        "dropped mask",
        "dropped operand",
        "dropped output",
        "float64 constant",
        "gelu approximation",
        "in-place operator",
        "inverted mask",
        "lost dtype",
        "merged unequal calls",
        "merged unequal constants",
        "nondeterminism",
        "not finite",
        "off-by-one",
        "removed operator",
        "shape-specialized constant",
        "stale metadata",
        "swapped operands",
        "transposed weight",
        "value-specialized constant",
        "write into the caller's tensor",
        "wrong axis",
        "wrong broadcast",
        "wrong comparison",
        "wrong constant",
        "wrong dilation",
        "wrong dim order",
        "wrong epsilon",
        "wrong groups",
        "wrong mask",
        "wrong operand",
        "wrong operator",
        "wrong order",
        "wrong output order",
        "wrong padding",
        "wrong scale",
        "wrong sign",
        "wrong stride",
    }
)


class NotPlantedError(PlanishError):
    """A fault met a site that it cannot spoil: the catalogue is wrong, not the pass."""


@dataclass
class Plant:
    """One site that is being spoiled, as the hooks of a fault see it.

    Attributes:
        rewriter: of the pass; what is done through it here is not altered again.
        root: the node the rule matched at; it may be erased in the course of the site.
        given: the root's arguments by schema name, as they were when the site opened.
        users: the root's users, as they were.
        last: the node that was inserted, edited or put in place last.
        done: whether the fault has altered anything.
    """

    rewriter: Rewriter
    root: Node
    given: Mapping[str, Any]
    users: tuple[Node, ...]
    last: Node | None = None
    done: bool = False

    @property
    def program(self) -> Program:
        """The program that is being rewritten."""
        return self.rewriter.program

    def tensor(self, name: str) -> Tensor:
        """The constant that an argument of the root reads.

        Raises:
            NotPlantedError: it reads none.
        """
        held = self.program.constant(self.given.get(name))
        if held is None:
            raise NotPlantedError(f"{self.root.name} reads no constant as {name!r}")
        return held

    def node(self) -> Node:
        """The last node.

        Raises:
            NotPlantedError: nothing was inserted.
        """
        if self.last is None or self.last._erased:
            raise NotPlantedError(f"nothing was inserted at {self.root.name}")
        return self.last


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One wrong rewrite. Exactly one of the hooks is given, or ``extra`` with ``candidates``.

    Attributes:
        name: unique, kebab-case.
        kind: what sort of mistake, one of ``KINDS``.
        model: a pretrained model (``tools/bench/real_models.py``) or an entry of the zoo.
        inner: the pass it is planted in, as a recipe writes it.
        rule: the rule at whose site it happens.
        nth: which of the rule's sites, or of the candidates, from 1.
        at: only of those whose node's name begins so.
        recipe: what runs.
        silent: why verification cannot see it; empty where it must.
        writes: whether it writes into the caller's tensors, which then need protection.
        on_call: alters an operator call; None leaves it.
        on_constant: alters a new constant's values.
        on_replace: alters what the users of a node read instead.
        on_set_args: alters a node's new arguments.
        at_close: acts when the rule is done with the site.
        at_finish: acts behind the rewriter's back when the pass is done.
        candidates: where ``extra`` could be done.
        extra: a rewrite that no rule should do.
    """

    name: str
    kind: str
    model: str
    inner: str
    rule: str
    nth: int = 1
    at: str = ""
    recipe: str = "exact"
    silent: str = ""
    writes: bool = False
    on_call: Callable[[Plant, Any, tuple[Any, ...], dict[str, Any]], Call | None] | None = None
    on_constant: Callable[[Plant, Tensor, str], Tensor | None] | None = None
    on_replace: Callable[[Plant, Node, Any], Any] | None = None
    on_set_args: Callable[[Plant, Node, Call], Call | None] | None = None
    at_close: Callable[[Plant], None] | None = None
    at_finish: Callable[[Plant], None] | None = None
    candidates: Callable[[Program], list[Node]] | None = field(default=None, repr=False)
    extra: Callable[[Plant], None] | None = None

    def __post_init__(self) -> None:
        hooks = (
            self.on_call,
            self.on_constant,
            self.on_replace,
            self.on_set_args,
            self.at_close,
            self.at_finish,
            self.extra,
        )
        if self.kind not in KINDS:
            raise ValueError(f"fault {self.name} is of no known kind: {self.kind}")
        given = sum(hook is not None for hook in hooks)
        if given != 1 or (self.extra is None) != (self.candidates is None):
            raise ValueError(f"fault {self.name} has {given} hooks")


def named_arguments(
    target: Any,  # noqa: ANN401 - overloads and Python functions have no common type
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments by their names in the schema; by position where the target has none."""
    if not isinstance(target, OpOverload):
        return {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    names = [a.name for a in target._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def written_arguments(target: OpOverload, named: Mapping[str, Any]) -> Call:
    """A call with arguments given by name, positional as far as there is no gap."""
    args: list[Any] = []
    rest = dict(named)
    for declared in target._schema.arguments:
        if declared.kwarg_only or declared.name not in rest:
            break
        args.append(rest.pop(declared.name))
    return target, tuple(args), rest
