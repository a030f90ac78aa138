"""The rewriter keeps types, provenance, names and counts right, whatever is edited."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir import Program, Rewriter, SiteCounter, capture, text
from planish.ir.errors import PassError, UsageError
from planish.ir.tensortype import SparseLayout
from planish.ir.verify import verify
from tests.support.lambdas import Lambda
from tests.support.nets import assert_same, branch_program

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x).relu()
        return self.second(y), y.exp()


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch")},)
    return capture(Net().eval(), (torch.randn(2, 4),), dynamic_shapes=shapes)


def the(program: Program, target: Any, position: int = 0) -> Node:
    return [n for n in program.operators if n.target is target][position]


def value(node: Node) -> Tensor:
    found = node.meta["val"]
    assert isinstance(found, Tensor)
    return found


# -- sites ----------------------------------------------------------------------------------------


def test_a_site_records_what_was_done_and_where(program: Program) -> None:
    rewriter = Rewriter(program, "my-pass")
    relu = the(program, aten.relu.default)
    with rewriter.site("to-gelu", relu) as allowed:
        assert allowed
        new = rewriter.call(aten.gelu.default, (relu.args[0],), like=relu)
        rewriter.replace(relu, new)
        rewriter.note("smoother")
    (change,) = rewriter.changes
    assert (change.number, change.rule, change.node) == (1, "to-gelu", "relu")
    assert (change.removed, change.added, change.detail) == (("relu",), (new.name,), "smoother")
    assert change.source is not None
    assert "y = self.first(x).relu()" in change.source
    assert new.meta["from"] == ("my-pass", "to-gelu", ("relu",))
    assert "y = self.first(x).relu()" in new.meta["stack_trace"]


def test_a_site_without_an_edit_is_no_change(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("look", relu):
        rewriter.note("nothing")
        rewriter.replace(relu, relu)
    assert rewriter.changes == []


def test_edits_outside_of_a_site_are_refused(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    before = text(program)
    for edit in (
        lambda: rewriter.call(aten.gelu.default, (relu,), like=relu),
        lambda: rewriter.constant(torch.ones(1), "c"),
        lambda: rewriter.replace(relu, relu.args[0]),
        lambda: rewriter.set_args(relu, relu.args),
        lambda: rewriter.note("x"),
    ):
        with pytest.raises(PassError, match="outside of a rewrite site"):
            edit()
    assert text(program) == before


def test_sites_do_not_nest(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)

    def nested() -> None:
        with rewriter.site("outer", relu), rewriter.site("inner", relu):
            pass

    with pytest.raises(PassError, match="opened a site inside the site of outer"):
        nested()


def test_numbers_are_stable_and_the_limit_denies(program: Program) -> None:
    def run(limit: int | None) -> list[tuple[str, bool]]:
        rewriter = Rewriter(program.clone(), "p", SiteCounter(limit))
        outcome = []
        for node in list(rewriter.program.operators):
            with rewriter.site("touch", node) as allowed:
                if allowed:
                    rewriter.set_args(node, node.args)
                outcome.append((node.name, allowed))
        assert [c.number for c in rewriter.changes] == list(range(1, len(rewriter.changes) + 1))
        return outcome

    everything = run(None)
    assert all(allowed for _, allowed in everything)
    assert run(2) == [(name, i < 2) for i, (name, _) in enumerate(everything)]
    assert not any(allowed for _, allowed in run(0))


def test_one_counter_counts_over_several_passes(program: Program) -> None:
    sites = SiteCounter()
    for name in ("a", "b"):
        rewriter = Rewriter(program, name, sites)
        relu = the(program, aten.relu.default)
        with rewriter.site("touch", relu):
            rewriter.set_args(relu, relu.args)
    assert rewriter.changes[0].number == sites.count == 2


def test_an_error_inside_a_site_names_the_rule_and_the_line(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with pytest.raises(PassError, match="rule break failed: KeyError") as caught:
        with rewriter.site("break", relu):
            raise KeyError("k")
    assert "self.first(x).relu()" in str(caught.value)
    with pytest.raises(UsageError, match="mine"):
        with rewriter.site("break", relu):
            raise UsageError("mine")
    with rewriter.site("works again", relu):
        rewriter.set_args(relu, relu.args)


# -- edits ----------------------------------------------------------------------------------------


def test_a_new_call_has_a_type_with_the_programs_symbols(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("widen", relu):
        wide = rewriter.call(aten.cat.default, ([relu, relu], 1), like=relu)
    assert str(value(wide).shape[0]) == str(value(relu).shape[0])
    assert value(wide).shape[1] == 8


def test_a_call_that_the_operator_rejects_is_refused_and_leaves_nothing(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    before = text(program)
    with pytest.raises(PassError, match="rejects these operands"):
        with rewriter.site("bad", relu):
            rewriter.call(aten.mm.default, (relu, relu), like=relu)
    assert text(program) == before
    assert rewriter.changes == []


def test_replacing_erases_what_only_the_old_one_kept_alive(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    exp = the(program, aten.exp.default)
    with rewriter.site("drop", exp):
        rewriter.replace(exp, program.placeholders[0])
    assert the(program, aten.relu.default).users  # still read by the second linear
    linear = the(program, aten.linear.default, 1)
    with rewriter.site("drop", linear):
        rewriter.replace(linear, program.placeholders[0])
    rewriter.finish()
    assert program.operators == []
    assert program.constants == {}
    assert len(program.placeholders) == 1
    assert {"linear_1", "relu", "linear"} <= set(rewriter.changes[1].removed)


def test_a_replacement_may_be_made_from_what_it_replaces(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    following = relu.next
    with rewriter.site("wrap", relu):
        rewriter.insert_before(following)
        twice = rewriter.call(aten.mul.Tensor, (relu, 2), like=relu)
        shifted = rewriter.call(aten.add.Tensor, (twice, relu), like=relu)
        rewriter.replace(relu, shifted)
    program = rewriter.finish()
    program.graph.lint()
    verify(program)
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    hidden = Net().first(x)
    torch.testing.assert_close(program(x)[1], (hidden.relu() * 3).exp())


def test_replacing_by_a_plain_value(program: Program) -> None:
    shapes = (({0: Dim("n")},),)
    model = Lambda(lambda x: x.new_zeros(x.shape[0], 2))
    program = capture(model, (torch.ones(3),), dynamic_shapes=shapes)
    rewriter = Rewriter(program, "p")
    size = the(program, aten.sym_size.int)
    with rewriter.site("fix", size):
        rewriter.replace(size, 7)
    program = rewriter.finish()
    assert "f32[7, 2] = aten.new_zeros(%args_0, size=[7, 2]" in text(program)
    assert program(torch.ones(3)).shape == (7, 2)


def test_types_downstream_follow_a_changed_type(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("half", relu):
        half = rewriter.call(aten.to.dtype, (relu.args[0], torch.float64), like=relu)
        back = rewriter.call(aten.relu.default, (half,), like=relu)
        exp = the(program, aten.exp.default)
        rewriter.set_args(exp, (back,))
    program = rewriter.finish()
    assert value(the(program, aten.exp.default)).dtype is torch.float64
    verify(program)


def test_types_follow_through_a_branch() -> None:
    program = branch_program()
    rewriter = Rewriter(program, "p")
    total = the(program, aten.sum.default)
    with rewriter.site("pad", total):
        x = program.placeholders[0]
        twice = rewriter.call(aten.cat.default, ([x, x],), like=total)
        branch = next(n for n in program.operators if "cond" in str(n.target))
        rewriter.set_args(branch, (*branch.args[:3], [twice, branch.args[3][1]]))  # type: ignore[index]
    program = rewriter.finish()
    assert "f32[2*n, 3] = sym.getitem" in text(program)
    assert program(torch.ones(4, 3)).shape == (8, 3)


def test_set_args_erases_what_is_no_longer_read(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    second = the(program, aten.linear.default, 1)
    with rewriter.site("no bias", second):
        rewriter.set_args(second, second.args[:2])
    program = rewriter.finish()
    assert "second.bias" not in program.constants
    assert "aten.linear(%1, @second.weight)" in text(program)
    assert second.meta["from"] == ("p", "no bias", (second.name,))


def test_impure_calls_stay_unless_they_are_erased(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("noise", relu):
        noise = rewriter.call(aten.rand_like.default, (relu.args[0],), like=relu)
        rewriter.erase_if_dead(noise)
        assert not noise._erased
        rewriter.erase(noise)
        assert noise._erased


def test_the_root_may_go_before_the_last_insertion(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    relu = the(program, aten.relu.default)
    with rewriter.site("two steps", relu):
        rewriter.replace(relu, rewriter.call(aten.gelu.default, (relu.args[0],), like=relu))
        gelu = the(program, aten.gelu.default)
        late = rewriter.call(aten.neg.default, (gelu,), like=gelu)
        rewriter.replace(gelu, late)
    program = rewriter.finish()
    program.graph.lint()
    verify(program)


# -- constants ------------------------------------------------------------------------------------


def test_a_constant_takes_the_name_that_becomes_free(program: Program) -> None:
    rewriter = Rewriter(program, "p")
    for factor in (2.0, 3.0):  # replaced twice: the first name is still wished
        linear = the(program, aten.linear.default)
        weight = program.constant(linear.args[1])
        assert weight is not None
        name = str(linear.args[1].target)  # type: ignore[union-attr]
        with rewriter.site("scale", linear):
            new = rewriter.constant(weight * factor, name, like=linear)
            rewriter.set_args(linear, (linear.args[0], new, linear.args[2]))
    program = rewriter.finish()
    assert sorted(program.constants) == [
        "first.bias",
        "first.weight",
        "second.bias",
        "second.weight",
    ]
    verify(program)


def test_a_constant_read_elsewhere_keeps_its_name_and_value(program: Program) -> None:
    linear = the(program, aten.linear.default)
    shared = program.constants["first.weight"]
    rewriter = Rewriter(program, "p")
    with rewriter.site("copy", linear):
        other = rewriter.constant(torch.zeros(4, 4), "first.weight", like=linear)
        zero = rewriter.call(aten.linear.default, (linear.args[0], other), like=linear)
        exp = the(program, aten.exp.default)
        rewriter.set_args(exp, (zero,))
    program = rewriter.finish()
    assert program.constants["first.weight"] is shared
    assert torch.equal(program.constants["first.weight_1"], torch.zeros(4, 4))  # type: ignore[arg-type]


def test_layouts_move_with_the_name_and_clones_are_not_touched(program: Program) -> None:
    original = program.clone()
    before = text(original, values=True)
    rewriter = Rewriter(program, "p")
    linear = the(program, aten.linear.default)
    with rewriter.site("prune", linear):
        layout = SparseLayout(2, 4, 1)
        weight = torch.tensor([[1.0, 1, 0, 0]] * 4, requires_grad=True)
        new = rewriter.constant(weight, "first.weight", like=linear, layout=layout)
        rewriter.set_args(linear, (linear.args[0], new, linear.args[2]))
    program = rewriter.finish()
    assert program.layouts == {"first.weight": layout}
    assert not program.constants["first.weight"].requires_grad
    assert text(original, values=True) == before
    assert original.layouts == {}


def test_listeners_hear_every_edit_in_order(program: Program) -> None:
    heard: list[str] = []

    class Ear:
        def inserted(self, node: Node) -> None:
            heard.append(f"+{node.name}")

        def replaced(self, old: Node, new: Argument) -> None:
            heard.append(f"{old.name}->{new}")

        def modified(self, node: Node) -> None:
            heard.append(f"~{node.name}")

        def erased(self, node: Node) -> None:
            assert node.all_input_nodes  # its inputs still hang on it
            heard.append(f"-{node.name}")

    rewriter = Rewriter(program, "p")
    rewriter.listeners.append(Ear())
    relu = the(program, aten.relu.default)
    with rewriter.site("swap", relu):
        rewriter.replace(relu, rewriter.call(aten.gelu.default, (relu.args[0],), like=relu))
    assert heard == ["+gelu_default", "relu->gelu_default", "~linear_1", "~exp", "-relu"]


def test_the_cached_module_goes_stale_with_an_edit(program: Program) -> None:
    x = torch.randn(2, 4)
    before = program.graph_module(x)
    rewriter = Rewriter(program, "p")
    exp = the(program, aten.exp.default)
    with rewriter.site("swap", exp):
        rewriter.replace(exp, rewriter.call(aten.neg.default, (exp.args[0],), like=exp))
    after = rewriter.finish().graph_module(x)
    assert_same(before[0], after[0])
    torch.testing.assert_close(after[1], -before[1].log())
