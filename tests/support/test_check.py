"""The helper that holds passes to their promises notices when one is broken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from planish.ir.errors import VerificationError
from planish.ir.ops import is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from tests.support.check import check, refuses, unchanged

aten = torch.ops.aten
AFTER = """
    program(%x: f32[2, 3])
      %0: f32[2, 3] = aten.relu(%x)
      %1: f32[2, 3] = aten.mul.Tensor(%0, other=2)
      return %1
"""
X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().relu() * 2


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * 2


class ReluOfRelu(Rule):
    name = "relu-of-relu"
    roots = frozenset({aten.relu.default})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        if not is_op(node.args[0], aten.relu.default):
            return self.refuse(node, "the operand is not a relu")
        return Match(node, {"inner": node.args[0]})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        rewriter.replace(match.root, match["inner"])


@dataclass(frozen=True, kw_only=True)
class Good(Pass):
    name = "good"
    contract = Contract.EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        return self.apply_rules(program, context, [ReluOfRelu()])


@dataclass(frozen=True, kw_only=True)
class Bad(Pass):
    """Replaces each relu by whatever ``edit`` makes of it."""

    name = "bad"
    contract = Contract.EXACT
    target: ClassVar[Any] = aten.relu.default
    edit: Callable[[Program, Rewriter, Node], None]

    def run(self, program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, self.name, context.sites)
        for node in [n for n in program.operators if is_op(n, self.target)]:
            with rewriter.site("bad", node):
                self.edit(program, rewriter, node)
        return PassResult(rewriter.finish(), tuple(rewriter.changes))


def test_a_good_pass_passes() -> None:
    result = check(Twice(), (X,), Good(), AFTER, changes=1)
    assert len(result.changes) == 1
    refuses(Once(), (X,), Good(), "the operand is not a relu")
    unchanged(Once(), (X,), Good())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: check(Twice(), (X,), Good(), AFTER, changes=2), "1 changes, not 2"),
        (lambda: check(Twice(), (X,), Good(), AFTER.replace("relu", "silu")), "aten.silu"),
        (lambda: check(Once(), (X,), Good()), "changed nothing"),
        (lambda: refuses(Once(), (X,), Good(), "too warm"), "'too warm' is not among"),
        (lambda: refuses(Twice(), (X,), Good(), "the operand is not a relu"), "ReluOfRelu|relu-of"),
        (lambda: unchanged(Twice(), (X,), Good()), "relu-of-relu"),
    ],
)
def test_wrong_expectations_fail(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        call()


def other_function(program: Program, rewriter: Rewriter, node: Node) -> None:
    rewriter.replace(node, rewriter.call(aten.sigmoid.default, node.args, like=node))


def endless(program: Program, rewriter: Rewriter, node: Node) -> None:
    rewriter.replace(node, rewriter.call(aten.relu.default, node.args, like=node))


def without_provenance(program: Program, rewriter: Rewriter, node: Node) -> None:
    new = rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)
    del new.meta["from"]
    rewriter.replace(node, new)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (other_function, r"output 0 \(output_0\) differs by"),
        (endless, "a second run still changes"),
        (without_provenance, "does not say where it is from"),
    ],
)
def test_a_pass_that_breaks_a_promise_fails(edit: Any, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check(Once(), (X,), Bad(edit=edit))


def test_a_pass_that_holds_for_the_sample_only_fails() -> None:
    def frozen_batch(program: Program, rewriter: Rewriter, node: Node) -> None:
        ones = rewriter.constant(torch.ones(2, 3), "ones", like=node)
        scaled = rewriter.call(aten.mul.Tensor, (node.args[0], ones), like=node)
        scaled.meta["val"] = node.meta["val"]
        rewriter.replace(node, rewriter.call(aten.clamp_min.default, (scaled, 0), like=node))

    check(Once(), (X,), Bad(edit=frozen_batch))
    with pytest.raises(AssertionError, match=r"at inputs \[\[3, 3\]\]: operator failed"):
        check(Once(), (X,), Bad(edit=frozen_batch), dynamic_shapes={"x": {0: Dim("rows")}})


def clamped(rewriter: Rewriter, node: Node) -> Node:
    return rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)


def test_a_pass_that_lies_about_a_type_fails() -> None:
    def lie(program: Program, rewriter: Rewriter, node: Node) -> None:
        new = clamped(rewriter, node)
        with program.fake_mode:
            new.meta["val"] = node.meta["val"].double()
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)

    with pytest.raises(VerificationError, match="rule operator-types"):
        check(Once(), (X,), Bad(edit=lie))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * self.weight


def test_a_pass_that_writes_into_the_module_fails() -> None:
    def write(program: Program, rewriter: Rewriter, node: Node) -> None:
        weight = program.constants["weight"]
        assert isinstance(weight, Tensor)
        weight.data.mul_(2)
        rewriter.replace(node, clamped(rewriter, node))

    with pytest.raises(VerificationError, match="rule constants-unwritten"):
        check(Weighted(), (X,), Bad(edit=write))
