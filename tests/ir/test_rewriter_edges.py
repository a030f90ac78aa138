"""The rewriter and its driver at their edges: in place, without a source, after an erasure."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir import Match, Program, Refusal, Rewriter, Rule, SiteCounter, capture
from planish.ir import rewrite_greedily as rewrite
from planish.ir.errors import UsageError
from planish.ir.verify import verify
from tests.support.lambdas import Lambda

aten = torch.ops.aten


def captured(function: Callable[..., Any]) -> Program:
    return capture(Lambda(function), (torch.ones(2, 3),))


def the(program: Program, target: Any, position: int = 0) -> Node:
    return [n for n in program.operators if n.target is target][position]


@pytest.fixture
def program() -> Program:
    return captured(lambda x: (x.relu().exp(), x.relu()))


# -- what a new node carries ----------------------------------------------------------------------


def test_keyword_arguments_reach_the_node_and_its_type(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("rows", relu):
        rewriter.insert_before(relu.next)
        kept = rewriter.call(aten.sum.dim_IntList, (relu, [1]), {"keepdim": True}, like=relu)
        flat = rewriter.call(aten.sum.dim_IntList, (relu, [1]), like=relu)
    assert (kept.kwargs, flat.kwargs) == ({"keepdim": True}, {})
    assert [tuple(n.meta["val"].shape) for n in (kept, flat)] == [(2, 1), (2,)]


def test_a_node_may_stand_for_several(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu, exp = the(program, aten.relu.default), the(program, aten.exp.default)
    with rewriter.site("both", exp):
        made = rewriter.call(aten.neg.default, (relu,), like=[relu, exp])
    assert made.meta["from"] == ("p", "both", (relu.name, exp.name))
    assert made.meta["stack_trace"] == relu.meta["stack_trace"]


def test_a_node_may_stand_for_none_or_for_one_without_a_source(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu, x = the(program, aten.relu.default), program.placeholders[0]
    bare = {key: value for key, value in x.meta.items() if key == "val"}
    x.meta = bare
    with rewriter.site("new", relu):
        one = rewriter.constant(torch.ones(2, 3), "one")
        sum_ = rewriter.call(aten.add.Tensor, (x, one), like=x)
    assert one.meta["from"] == ("p", "new", ())
    assert sum_.meta["from"] == ("p", "new", (x.name,))
    assert "stack_trace" not in one.meta
    assert "stack_trace" not in sum_.meta


# -- what a change records ------------------------------------------------------------------------


def test_a_change_pairs_what_stands_for_each_other(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu, exp = the(program, aten.relu.default), the(program, aten.exp.default)
    with rewriter.site("swap", relu):
        new = rewriter.call(aten.silu.default, relu.args, like=relu)
        rewriter.replace(relu, new)
    with rewriter.site("in place", exp):
        rewriter.set_args(exp, exp.args)
    swap, in_place = rewriter.changes
    assert swap.replaced == (("relu", new.name),)
    assert in_place.replaced == (("exp", "exp"),)


def test_an_error_of_planish_inside_a_site_names_the_rule_and_the_line(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with pytest.raises(UsageError) as caught, rewriter.site("break", relu):
        raise UsageError("mine")
    assert "rule break" in str(caught.value)
    assert "return self.function(*args)" in str(caught.value)


def test_sites_left_out_by_name_are_counted_denied_and_told() -> None:
    sites = SiteCounter(excluded=frozenset({"swap@exp", "swap@other"}))
    assert [sites.take("swap", name) for name in ("relu", "exp", "relu")] == [1, None, 3]
    assert sites.take("other", "exp") == 4
    assert sites.denied == {"swap@exp"}


# -- after each edit ------------------------------------------------------------------------------

EDITS: dict[str, Callable[[Rewriter, Node, Node], object]] = {
    "constant": lambda w, relu, noise: w.constant(torch.ones(1), "c"),
    "call": lambda w, relu, noise: w.call(aten.neg.default, (relu.args[0],), like=relu),
    "replace": lambda w, relu, noise: w.replace(noise, relu),  # noise has an effect, and stays
    "set_args": lambda w, relu, noise: w.set_args(relu, relu.args),
    "erase": lambda w, relu, noise: w.erase(noise),
    "erase_if_dead": lambda w, relu, noise: w.erase_if_dead(relu),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_every_edit_makes_the_module_stale_and_is_a_change(edit: str) -> None:
    program = captured(lambda x: (x.relu() + torch.rand_like(x), torch.rand_like(x)))
    relu, noise = the(program, aten.relu.default), the(program, aten.rand_like.default, 1)
    if edit == "erase":
        program.output.args = ((program.results[0], relu),)
    if edit == "erase_if_dead":
        the(program, aten.add.Tensor).args = (noise, noise)
    program.touch()
    before = program.graph_module
    rewriter = Rewriter(program, "p")
    with rewriter.site("edit", program.operators[0]):
        EDITS[edit](rewriter, relu, noise)
    assert program.graph_module is not before
    assert len(rewriter.changes) == 1


def test_listeners_hear_of_an_erasure_while_the_inputs_still_hang_on_it() -> None:
    program = captured(lambda x: (x.exp(), torch.rand_like(x)))
    noise = program.results[1]
    assert isinstance(noise, Node)
    heard: list[tuple[str, int]] = []

    class Ear:
        def inserted(self, node: Node) -> None: ...
        def replaced(self, old: Node, new: Argument) -> None: ...
        def modified(self, node: Node) -> None: ...
        def erased(self, node: Node) -> None:
            heard.append((node.name, len(node.all_input_nodes)))

    program.output.args = ((program.results[0], program.results[0]),)
    rewriter = Rewriter(program, "p")
    rewriter.listeners.append(Ear())
    with rewriter.site("drop", noise):
        rewriter.erase(noise)
    assert heard == [(noise.name, 1)]


def test_nodes_put_where_an_erased_one_was_are_found_from_both_ends(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("twice", relu):
        rewriter.replace(relu, rewriter.call(aten.gelu.default, relu.args, like=relu))
        gelu = the(program, aten.gelu.default)
        late = rewriter.call(aten.neg.default, (gelu,), like=gelu)
        exp = the(program, aten.exp.default)
        rewriter.set_args(exp, (late,))
    program = rewriter.finish()
    assert list(reversed(program.graph.nodes)) == list(program.graph.nodes)[::-1]
    verify(program)


# -- the driver -----------------------------------------------------------------------------------


class Halve(Rule):
    """mul(x, 8) -> mul(x, 4) -> mul(x, 2) -> mul(x, 1), in place."""

    name = "halve"
    roots = frozenset({aten.mul.Tensor})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        assert node.graph is program.graph
        factor = node.args[1]
        if not isinstance(factor, int) or factor % 2:
            return self.refuse(node, f"{factor} is odd")
        return Match(node, {"half": factor // 2})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        rewriter.set_args(match.root, (match.root.args[0], match["half"]))


def test_a_node_edited_in_place_is_looked_at_again_and_so_are_the_others() -> None:
    program = captured(lambda x: ((x * 8).exp(), x * 4))
    rewriter = Rewriter(program, "p")
    refusals = rewrite(program, [Halve()], rewriter)
    assert [n.args[1] for n in program.operators if n.target is aten.mul.Tensor] == [1, 1]
    assert len(rewriter.changes) == 5
    assert sorted(r.node for r in refusals) == ["mul", "mul_1"]
    assert {r.reason for r in refusals} == {"1 is odd"}


class Feed(Rule):
    """exp(x) -> x * 1, and whoever multiplies beside it by an odd number does so by 2."""

    name = "feed"
    roots = frozenset({aten.exp.default})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        beside = the(program, aten.mul.Tensor)
        return Match(node, {"beside": beside}) if beside.args[1] == 3 else None

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        beside = match["beside"]
        rewriter.set_args(beside, (beside.args[0], 2))


def test_a_node_that_another_rewrite_edited_is_looked_at_again() -> None:
    program = captured(lambda x: (x * 3, x.exp()))
    rewriter = Rewriter(program, "p")
    assert [r.reason for r in rewrite(program, [Halve(), Feed()], rewriter)] == ["1 is odd"]
    assert [c.rule for c in rewriter.changes] == ["feed", "halve"]


def test_what_follows_a_dead_value_is_looked_at() -> None:
    def model(x: Tensor) -> Tensor:
        x * 4
        return x * 2

    program = captured(model)
    assert len(program.operators) == 2
    rewriter = Rewriter(program, "p")
    rewrite(program, [Halve()], rewriter)
    assert [n.args[1] for n in program.operators] == [4, 1]


def test_an_input_that_nobody_reads_any_more_stays(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    first, second = (the(program, aten.relu.default, i) for i in (0, 1))
    with rewriter.site("ones", first):
        ones = rewriter.constant(torch.ones(2, 3), "ones", like=first)
        rewriter.replace(first, ones)
        rewriter.replace(second, ones)
    done = rewriter.finish()
    assert [len(node.users) for node in done.placeholders] == [0]
    assert len(done.signature.tensor_names) == 1
    verify(done)


def test_what_was_erased_is_recorded_by_name() -> None:
    program = captured(lambda x: (torch.rand_like(x), x.relu())[1])
    rewriter = Rewriter(program, "p")
    noise = the(program, aten.rand_like.default)
    with rewriter.site("drop", noise):
        rewriter.erase(noise)
    assert [change.removed for change in rewriter.changes] == [("rand_like",)]


def test_a_rule_that_raises_its_own_error_is_named(program: Program) -> None:
    class Fails(Rule):
        name = "fails"
        roots = frozenset({aten.relu.default})

        def match(self, node: Node, program: Program) -> Match | Refusal | None:
            raise UsageError("no such thing")

        def rewrite(self, match: Match, rewriter: Rewriter) -> None:
            raise AssertionError

    with pytest.raises(UsageError, match="rule fails: no such thing"):
        rewrite(program, [Fails()], Rewriter(program, "p"))
