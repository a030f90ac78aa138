"""Both programs as plain data: which node is which, what made it, and what it became."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

import planish
from planish.graphdata import Graphs
from planish.ir.capture import capture
from planish.ir.changes import Change
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.text import text
from planish.passes import Pass, PassContext, PassResult
from tests.support.example_passes import RoundWeights, SwapActivation, calling
from tests.support.tiny import conv_bn

aten = torch.ops.aten
Graph = dict[str, dict[str, Any]]


def graphs_of(model: nn.Module, inputs: Any, recipe: str | list[Pass]) -> tuple[Graph, Graph, Any]:
    """Nodes by name, before and after, and the report."""
    report = planish.optimize(model.eval(), inputs, recipe=recipe, target="onnx").report
    graphs = json.loads(report.to_json(graphs=True))["graphs"]
    before, after = ({n["name"]: n for n in graphs[side]["nodes"]} for side in ("before", "after"))
    return before, after, report


class Relus(nn.Module):
    """Two activations, one of them in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.relu(x) + 1)


X = torch.tensor([[-1.0, 2.0]])


def test_says_what_is_known_of_a_node() -> None:
    model, (image,), _ = conv_bn()
    before, _, report = graphs_of(model, (image,), "fold-batch-norm")
    node = before["batch_norm"]
    source = node.pop("source")
    assert source.startswith(__file__.rpartition("/tests/")[0])
    assert source.endswith(": return self.drop(torch.relu(self.bn(self.conv(image))))")
    assert node == {
        "name": "batch_norm",
        "id": "%1",
        "kind": "operator",
        "operator": "aten.batch_norm",
        "type": "f32[1, 8, 6, 6]",
        "call": (
            "aten.batch_norm(conv2d, p_bn_weight, p_bn_bias, b_bn_running_mean, "
            "b_bn_running_var, training=False, momentum=0.1, eps=1e-05, cudnn_enabled=False)"
        ),
        "inputs": [
            "conv2d",
            "p_bn_weight",
            "p_bn_bias",
            "b_bn_running_mean",
            "b_bn_running_var",
        ],
        "modules": ["bn"],
        "status": "removed",
        "change": report.passes[0].changes[0].number,
        "edits": [],
        "partners": ["conv2d_default"],
    }
    weight = before["p_conv_weight"]
    assert (weight["id"], weight["type"]) == ("@conv.weight", "f32[8, 3, 3, 3]")
    assert weight["bytes"] == 8 * 3 * 3 * 3 * 4
    assert before["image"]["kind"] == "input"
    modules = report.to_dict(graphs=True)["graphs"]["before"]["modules"]
    assert modules == {"": "ConvBn", "conv": "Conv2d", "bn": "BatchNorm2d", "drop": "Dropout"}


def test_nodes_are_joined_across_the_run() -> None:
    model, (image,), _ = conv_bn()
    before, after, report = graphs_of(model, (image,), "fold-batch-norm,remove-identities")
    assert {name: n["status"] for name, n in before.items() if n["kind"] != "constant"} == {
        "image": "kept",
        "conv2d": "removed",
        "batch_norm": "removed",
        "relu": "kept",
        "dropout": "removed",
        "output:0": "kept",
    }
    made = after["conv2d_default"]
    assert (made["status"], made["change"]) == ("added", report.passes[0].changes[0].number)
    assert "batch_norm" in made["partners"]
    assert before["dropout"]["partners"] == ["relu"]
    assert before["dropout"]["change"] == report.passes[1].changes[0].number
    assert after["relu"]["partners"] == ["relu", "dropout"]
    assert after["output:0"]["call"] == "relu"


def test_a_chain_of_rewrites_is_followed_to_its_end() -> None:
    swaps: list[Pass] = [SwapActivation(to="clamp"), SwapActivation(to="clamp")]
    before, after, report = graphs_of(Relus(), X, [*swaps, undo()])
    # relu -> clamp_min -> relu again, under whatever name.
    assert before["relu"]["status"] == "removed"
    (partner,) = before["relu"]["partners"]
    assert after[partner]["operator"] == "aten.relu"
    assert after[partner]["status"] == "added"
    last = {change.number for change in report.passes[2].changes}
    assert after[partner]["change"] in last
    assert after[partner]["partners"] == ["relu"]


def undo() -> Pass:
    """A pass that writes ``relu`` for ``clamp_min``."""

    def behavior(program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, "undo", context.sites)
        for node in program.operators:
            if node.target is aten.clamp_min.default:
                with rewriter.site("back", node) as allowed:
                    assert allowed
                    rewriter.replace(
                        node, rewriter.call(aten.relu.default, node.args[:1], like=node)
                    )
        return PassResult(rewriter.finish(), tuple(rewriter.changes))

    return calling(behavior, name="undo")


def test_a_name_that_is_given_again_is_another_node() -> None:
    model = capture(Relus().eval(), (X,))
    changes = (
        Change(1, "a", "relu", ("relu",), ("clamp",), replaced=(("relu", "clamp"),)),
        Change(2, "b", "clamp", ("clamp",), ("relu",), replaced=(("clamp", "relu"),)),
    )
    found = Graphs(model, model).to_dict([changes[:1], changes[1:]])
    before, after = ({n["name"]: n for n in found[side]["nodes"]} for side in ("before", "after"))
    assert (before["relu"]["status"], before["relu"]["change"]) == ("removed", 1)
    assert (after["relu"]["status"], after["relu"]["change"]) == ("added", 2)
    assert before["relu"]["partners"] == ["relu"]
    assert after["relu"]["partners"] == ["relu"]
    assert (before["add"]["status"], after["add"]["status"]) == ("kept", "kept")


def test_a_node_that_comes_and_goes_in_one_rewrite_leaves_no_trace() -> None:
    model = capture(Relus().eval(), (X,))
    change = Change(1, "a", "relu", ("helper",), ("helper",), replaced=(("helper", "relu"),))
    found = Graphs(model, model).to_dict([[change]])
    assert {n["status"] for n in found["before"]["nodes"]} == {"kept"}
    assert {n["change"] for n in found["after"]["nodes"]} == {None}


def edit_scalar(told: bool) -> Pass:
    """A pass that writes 2 for 1 in ``add(x, 1)``, through the rewriter or behind its back."""

    def behavior(program: Program, context: PassContext) -> PassResult:
        rewriter = Rewriter(program, "edit", context.sites)
        (node,) = (n for n in program.operators if n.target is aten.add.Tensor)
        if told:
            with rewriter.site("edit", node) as allowed:
                assert allowed
                rewriter.set_args(node, (node.args[0], 2))
            return PassResult(rewriter.finish(), tuple(rewriter.changes))
        node.args = (node.args[0], 2)
        return PassResult(program)

    return calling(behavior, name="edit", contract=RoundWeights.contract)


def test_an_edit_in_place_is_told() -> None:
    before, after, report = graphs_of(Relus(), X, [edit_scalar(told=True)])
    number = report.passes[0].changes[0].number
    for side, call in ((before, "aten.add.Tensor(relu, 1)"), (after, "aten.add.Tensor(relu, 2)")):
        assert side["add"]["status"] == "edited"
        assert side["add"]["edits"] == [number]
        assert side["add"]["partners"] == ["add"]
        assert side["add"]["call"].replace("other=", "") == call
        assert side["relu"]["status"] == "kept"


def test_an_edit_that_nobody_told_is_seen() -> None:
    before, after, _ = graphs_of(Relus(), X, [edit_scalar(told=False)])
    assert before["add"]["status"] == after["add"]["status"] == "edited"
    assert after["add"]["edits"] == []


def test_rewritten_constants_are_other_nodes() -> None:
    model, (image,), _ = conv_bn()
    before, after, _ = graphs_of(model, (image,), [RoundWeights(step=1 / 8)])
    (partner,) = before["p_conv_weight"]["partners"]
    assert before["p_conv_weight"]["status"] == "removed"
    assert after[partner]["status"] == "added"
    assert after[partner]["id"] == "@conv.weight"


def test_branches_are_bodies() -> None:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            chosen: Tensor = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))
            return chosen

    before, _, _ = graphs_of(Choice(), X, "none")
    bodies = [n for n in before.values() if n["operator"] == "body"]
    assert [n["kind"] for n in bodies] == ["constant", "constant"]
    assert all("bytes" not in n for n in bodies)


def test_outputs_that_are_no_values_are_shown() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
            return x + 1, 7, x

    before, _, _ = graphs_of(Pair(), X, "none")
    outputs = [n for n in before.values() if n["kind"] == "output"]
    assert [(n["id"], n["inputs"], n["call"]) for n in outputs] == [
        ("output_0", ["add"], "add"),
        ("output_1", [], "7"),
        ("output_2", ["x"], "x"),
    ]


def test_values_are_not_kept_and_later_edits_do_not_show() -> None:
    model, inputs, _ = conv_bn()
    result = planish.optimize(model, inputs, recipe="none")
    graphs = result.report.graphs
    assert graphs is not None
    for kept in (graphs._before, graphs._after):
        assert {c.device.type for c in kept.constants.values() if isinstance(c, Tensor)} == {"meta"}
    shown = result.report.to_dict(graphs=True)
    rewriter = Rewriter(result.program, "later")
    (relu,) = (n for n in result.program.operators if n.target is aten.relu.default)
    with rewriter.site("later", relu):
        rewriter.replace(relu, rewriter.call(aten.sigmoid.default, relu.args, like=relu))
    rewriter.finish()
    assert "sigmoid" in text(result.program)
    assert result.report.to_dict(graphs=True) == shown


def test_graphs_are_in_the_json_on_wish_only() -> None:
    model, inputs, _ = conv_bn()
    report = planish.optimize(model, inputs, recipe="none").report
    assert "graphs" not in report.to_dict()
    assert "graphs" not in json.loads(report.to_json())
    written = report.to_dict(graphs=True)
    assert set(written.pop("graphs")) == {"before", "after"}
    assert written == report.to_dict()
    assert "Graphs" not in repr(report)
