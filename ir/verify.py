"""The verifier: tables of rules per level, run after every pass.

``verify(program)`` checks everything. ``verify(program, since=before)`` derives types only for
what changed since, and also checks that the contract with the caller did not change: inputs,
outputs, their types, and the constants that both programs share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.ir import verify_rules as rules
from planish.ir import verify_schemes as schemes
from planish.ir.errors import PassError, VerificationError, describe
from planish.ir.program import Program
from planish.ir.rederive import Derivation, changed_operators, same_type
from planish.ir.snapshot import Snapshot
from planish.ir.tensortype import type_text
from planish.ir.text import excerpt
from planish.ir.verify_rules import Fault, Subject


class Level(Enum):
    """Levels build on each other: a fault ends the verification at its level."""

    STRUCTURE = "structure"
    TYPES = "types"
    SCHEMES = "schemes"


@dataclass(frozen=True)
class VerifierRule:
    """One invariant: its name in messages, and the function that looks for faults."""

    name: str
    check: Callable[[Subject], Iterator[Fault]]


def constant_types(subject: Subject) -> Iterator[Fault]:
    """The type of a constant's node is the type of the tensor."""
    program = subject.program
    for node in program.graph.find_nodes(op="get_attr"):
        value = program.constant(node)
        if value is not None and not same_type(node.meta["val"], value):
            real = _type(program, value)
            yield Fault(f"it is typed {_type(program, node.meta['val'])}, and holds {real}", node)


def operator_types(subject: Subject) -> Iterator[Fault]:
    """The type of every changed operator follows from its operands' types."""
    program = subject.program
    derivation = Derivation(program)
    for node in changed_operators(program, subject.since):
        if not derivation.covers(node):
            continue
        try:
            derived = derivation.type_of(node)
        except PassError as error:
            yield Fault(error.what, node)
            continue
        claimed = node.meta["val"]
        if not same_type(claimed, derived):
            yield Fault(
                f"it is typed {_type(program, claimed)}, and its operands give "
                f"{_type(program, derived)}",
                node,
            )


def same_contract(subject: Subject) -> Iterator[Fault]:
    """Signature, input types and sample inputs are those of the program before."""
    program, since = subject.program, subject.since
    if since is None:
        return
    if program.signature is not since.signature and program.signature != since.signature:
        yield Fault("the signature is not the one the program had")
        return
    for node, before in zip(program.placeholders, since.placeholders, strict=True):
        yield from _type_changes(subject, node, before, f"input {before.name}")
    if not _same_samples(program.samples, since.samples):
        yield Fault("the sample inputs are not the ones the program had")


def _same_samples(now: tuple[tuple[Any, ...], ...], then: tuple[tuple[Any, ...], ...]) -> bool:
    """Whether the samples are the same objects: a pass has no business with their values."""
    return now is then or (
        len(now) == len(then)
        and all(
            len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
            for a, b in zip(now, then, strict=True)
        )
    )


def same_results(subject: Subject) -> Iterator[Fault]:
    """Every output has the type it had."""
    if subject.since is None:
        return
    names = subject.since.signature.output_names
    pairs = zip(names, subject.program.results, subject.since.results, strict=False)
    for name, value, before in pairs:
        yield from _type_changes(subject, value, before, f"output {name}")


def _type_changes(subject: Subject, value: object, before: object, what: str) -> Iterator[Fault]:
    now, then = _value(value), _value(before)
    if now is then or same_type(now, then):
        return
    was, became = _type(subject.program, then), _type(subject.program, now)
    node = value if isinstance(value, Node) else None
    yield Fault(f"{what} was {was} and became {became}", node)


def _value(value: object) -> object:
    return value.meta["val"] if isinstance(value, Node) else value


def _type(program: Program, value: object) -> str:
    printed = type_text(value, program.signature.symbols)
    return printed if isinstance(value, Tensor) else f"{printed} ({value})"


RULES: dict[Level, tuple[VerifierRule, ...]] = {
    Level.STRUCTURE: (
        VerifierRule("lint", rules.lint),
        VerifierRule("one-output", rules.one_output),
        VerifierRule("functional", rules.functional),
        VerifierRule("typed", rules.typed),
        VerifierRule("no-dead-nodes", rules.no_dead_nodes),
        VerifierRule("constants-present", rules.constants_present),
        VerifierRule("constant-names", rules.constant_names),
        VerifierRule("constants-plain", rules.constants_plain),
        VerifierRule("constants-unwritten", rules.constants_unwritten),
        VerifierRule("inputs-match", rules.inputs_match),
        VerifierRule("outputs-match", rules.outputs_match),
        VerifierRule("samples-match", rules.samples_match),
    ),
    Level.TYPES: (
        VerifierRule("constant-types", constant_types),
        VerifierRule("same-contract", same_contract),
        VerifierRule("operator-types", operator_types),
        VerifierRule("same-results", same_results),
    ),
    Level.SCHEMES: (
        VerifierRule("constants-not-nan", rules.constants_not_nan),
        VerifierRule("sparse-layouts", schemes.sparse_layouts),
        VerifierRule("operator-schemes", schemes.operator_schemes),
    ),
}

# After a fault of these, the rules that follow would report the same thing again, or fail.
_CONCLUSIVE = frozenset({"lint", "one-output", "same-contract", "operator-types"})


def verify(
    program: Program, *, since: Program | None = None, snapshot: Snapshot | None = None
) -> None:
    """Check every invariant of a program.

    Args:
        program: what to check; not changed.
        since: the program before the pass, where there was one.
        snapshot: ``Snapshot(since)``, taken before the pass ran; finds writes into its tensors.

    Raises:
        VerificationError: names the rule and the node, and shows the lines around it.
    """
    found = list(faults(program, since=since, snapshot=snapshot))
    if not found:
        return
    name, fault = found[0]
    more = f" (and {len(found) - 1} more faults)" if len(found) > 1 else ""
    raise VerificationError(
        f"rule {name}: {fault.what}{more}",
        where=_where(program, fault.node) if fault.node is not None else None,
        hint="the last pass that edited it is at fault; `planish bisect` names the rewrite",
    )


def faults(
    program: Program, *, since: Program | None = None, snapshot: Snapshot | None = None
) -> Iterator[tuple[str, Fault]]:
    """All faults of the first level that has any, as (rule name, fault).

    Within a level, a rule speaks alone where the later ones would trip over the same thing: a
    graph that is not well formed is looked at no further.
    """
    subject = Subject(program, since, snapshot)
    for level in Level:
        broken = False
        for rule in RULES[level]:
            for fault in rule.check(subject):
                broken = True
                yield rule.name, fault
            if broken and rule.name in _CONCLUSIVE:
                return
        if broken:
            return


def _where(program: Program, node: Node) -> str:
    """The node, and the lines of text around it."""
    try:
        lines = excerpt(program, node)
    except (KeyError, ValueError):  # the program is too broken to be printed in full
        lines = node.format_node() or node.name
    return f"{describe(node)}\n{lines}"
