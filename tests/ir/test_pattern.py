"""Rules are applied to a fixed point, each refusal is told once, and endless ones are caught."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from planish.ir import (
    Match,
    Program,
    Refusal,
    Rewriter,
    Rule,
    SiteCounter,
    capture,
    rewrite_greedily,
    text,
)
from planish.ir.errors import PassError, UsageError
from tests.support.lambdas import Lambda

aten = torch.ops.aten


class DropDoubleNegation(Rule):
    """neg(neg(x)) -> x."""

    name = "double-neg"
    roots = frozenset({aten.neg.default})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        inner = node.args[0]
        if not isinstance(inner, Node) or inner.target is not aten.neg.default:
            return None
        if len(inner.users) > 1:
            return self.refuse(node, "the inner negation has a second user")
        return Match(node, {"x": inner.args[0]})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, match["x"])


class Swap(Rule):
    """Replace one operator by another."""

    roots: ClassVar[frozenset[Any]]

    def __init__(self, old: Any, new: Any, name: str = "swap") -> None:
        self.name, self.roots, self.new = name, frozenset({old}), new  # type: ignore[misc]

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        return Match(node, {})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        new = rewriter.call(self.new, match.root.args, like=match.root)
        rewriter.replace(match.root, new)


def captured(function: Any) -> Program:
    return capture(Lambda(function), (torch.ones(2),))


def apply(
    program: Program, *rules: Rule, limit: int | None = None
) -> tuple[Program, Rewriter, tuple[Refusal, ...]]:
    rewriter = Rewriter(program.clone(), "test", SiteCounter(limit))
    refusals = rewrite_greedily(rewriter.program, rules, rewriter)
    return rewriter.finish(), rewriter, refusals


def operators(program: Program) -> list[str]:
    return [str(n.target).removeprefix("aten.").removesuffix(".default") for n in program.operators]


def negations(count: int) -> Any:
    def model(x: Tensor) -> Tensor:
        for _ in range(count):
            x = -x
        return x.exp()

    return model


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_rules_run_to_a_fixed_point(count: int) -> None:
    program, rewriter, _ = apply(captured(negations(count)), DropDoubleNegation())
    assert operators(program) == ["neg"] * (count % 2) + ["exp"]
    assert len(rewriter.changes) == count // 2
    again, second, _ = apply(program, DropDoubleNegation())
    assert second.changes == []
    assert text(again) == text(program)


def test_new_nodes_are_looked_at_too() -> None:
    program, rewriter, _ = apply(
        captured(lambda x: x.sin().exp()),
        Swap(aten.sin.default, aten.cos.default, "first"),
        Swap(aten.cos.default, aten.tan.default, "second"),
    )
    assert operators(program) == ["tan", "exp"]
    assert [c.rule for c in rewriter.changes] == ["first", "second"]


def test_the_first_rule_that_matches_wins() -> None:
    rules = Swap(aten.sin.default, aten.cos.default), Swap(aten.sin.default, aten.tan.default)
    assert operators(apply(captured(lambda x: x.sin()), *rules)[0]) == ["cos"]
    assert operators(apply(captured(lambda x: x.sin()), *reversed(rules))[0]) == ["tan"]


def test_a_refusal_says_why_and_where() -> None:
    def model(x: Tensor) -> Any:
        inner = -x
        return -inner, inner.exp()

    _, rewriter, refusals = apply(captured(model), DropDoubleNegation())
    (refusal,) = refusals
    assert (refusal.rule, refusal.node) == ("double-neg", "neg_1")
    assert refusal.reason == "the inner negation has a second user"
    assert refusal.source is not None
    assert "return self.function(*args)" in refusal.source  # torch records frames of `forward`
    assert rewriter.changes == []


def test_a_refusal_that_no_longer_holds_is_not_told() -> None:
    class DropExp(Swap):
        def rewrite(self, match: Match, rewriter: Rewriter) -> None:
            rewriter.replace(match.root, rewriter.program.placeholders[0])

    def model(x: Tensor) -> Any:
        inner = -x
        return -inner, inner.exp()

    program, _, refusals = apply(
        captured(model), DropDoubleNegation(), DropExp(aten.exp.default, None)
    )
    assert refusals == ()
    assert program.operators == []  # losing its second user unlocked the double negation


def test_rules_that_undo_each_other_are_caught() -> None:
    rules = Swap(aten.sin.default, aten.cos.default), Swap(aten.cos.default, aten.sin.default)
    with pytest.raises(PassError, match="rules of pass test do not converge"):
        apply(captured(lambda x: x.sin()), *rules)


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_denied_sites_are_left_alone(limit: int) -> None:
    def model(x: Tensor) -> Tensor:
        return x.sin() + x.abs().sin() + x.exp().sin()

    program, rewriter, _ = apply(
        captured(model), Swap(aten.sin.default, aten.cos.default), limit=limit
    )
    assert operators(program).count("cos") == limit
    assert operators(program).count("sin") == 3 - limit
    assert [c.number for c in rewriter.changes] == list(range(1, limit + 1))


def test_a_denied_match_gives_the_next_rule_its_chance() -> None:
    rules = (
        Swap(aten.sin.default, aten.cos.default, "denied"),
        Swap(aten.sin.default, aten.tan.default, "denied, too"),
    )
    program, rewriter, _ = apply(captured(lambda x: x.sin()), *rules, limit=0)
    assert operators(program) == ["sin"]
    assert rewriter.sites.count == 2


def test_dead_values_are_left_alone() -> None:
    def model(x: Tensor) -> Tensor:
        x.sin()
        return x.exp()

    program, rewriter, _ = apply(captured(model), Swap(aten.sin.default, aten.cos.default))
    assert operators(program) == ["sin", "exp"]
    assert rewriter.changes == []


def test_errors_of_a_rule_name_the_rule_and_the_line() -> None:
    class Breaks(Swap):
        def match(self, node: Node, program: Program) -> Match | Refusal | None:
            raise ZeroDivisionError("oops")

    class Refuses(Swap):
        def rewrite(self, match: Match, rewriter: Rewriter) -> None:
            raise UsageError("the caller's fault")

    program = captured(lambda x: x.sin())
    with pytest.raises(PassError, match="rule breaks failed: ZeroDivisionError: oops") as caught:
        apply(program, Breaks(aten.sin.default, None, "breaks"))
    assert "return self.function(*args)" in str(caught.value)
    with pytest.raises(UsageError, match="the caller's fault"):
        apply(program, Refuses(aten.sin.default, None, "refuses"))


def test_the_rewriter_is_free_of_the_driver_afterwards() -> None:
    rewriter = Rewriter(captured(negations(2)), "test")
    rewrite_greedily(rewriter.program, [DropDoubleNegation()], rewriter)
    assert rewriter.listeners == []
    rules = [Swap(aten.exp.default, aten.mm.default)]
    with pytest.raises(PassError):
        rewrite_greedily(rewriter.program, rules, rewriter)
    assert rewriter.listeners == []


def test_long_chains_take_linear_time() -> None:
    program = captured(negations(400))
    looked = 0

    class Counting(DropDoubleNegation):
        def match(self, node: Node, program: Program) -> Match | Refusal | None:
            nonlocal looked
            looked += 1
            return super().match(node, program)

    result, rewriter, _ = apply(program, Counting())
    assert operators(result) == ["exp"]
    assert len(rewriter.changes) == 200
    assert looked < 400 * 4
