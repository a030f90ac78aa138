"""``optimize`` and what it returns: inputs it accepts, promises it keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import planish
from planish.ir.text import text
from planish.passes import Contract, Pass, PassContext, PassResult
from planish.passes.steps import Instrument, Step
from tests.support.tiny import ConvBn, conv_bn

IMAGE = torch.randn(1, 3, 8, 8)


@pytest.fixture(scope="module")
def result() -> planish.Optimized:
    model, inputs, shapes = conv_bn()
    return planish.optimize(model, inputs, dynamic_shapes=shapes)


def test_the_optimized_model_answers_alike_at_any_size(result: planish.Optimized) -> None:
    model, _, _ = conv_bn()
    for batch in (1, 2, 7):
        image = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(result.model(image), model(image), atol=1e-5)
        assert torch.allclose(result.model(image=image), model(image), atol=1e-5)


def test_state_dict_is_the_live_constants(result: planish.Optimized) -> None:
    state = result.program.graph_module.state_dict()
    assert set(state) == {"conv.weight", "conv.bias"}


def test_result_model_cannot_edit_the_result(result: planish.Optimized) -> None:
    before = text(result.program)
    graph = result.model.body.graph
    graph.erase_node(next(iter(reversed(graph.find_nodes(op="output")))))
    assert text(result.program) == before


def test_takes_an_exported_program_and_a_program() -> None:
    model, inputs, _ = conv_bn()
    exported = torch.export.export(model, inputs)
    first = planish.optimize(exported)
    second = planish.optimize(first.program)
    assert "batch_norm" not in str(first.program)
    assert second.report.changes == 0
    assert torch.allclose(second.model(*inputs), model(*inputs), atol=1e-5)


def test_output_structure_is_the_callers_own() -> None:
    @dataclass
    class Answer:
        logits: Tensor
        extra: dict[str, tuple[Tensor, None]]

    class Nested(nn.Module):
        def forward(self, x: Tensor, *, flag: bool = True) -> Answer:
            return Answer(x * 2, {"pair": (torch.relu(x) + 1, None)})

    result = planish.optimize(Nested().eval(), ((torch.ones(2),), {"flag": True}))
    answer = result.model(torch.ones(2))
    assert type(answer) is Answer
    assert answer.extra["pair"][1] is None
    assert torch.equal(answer.extra["pair"][0], torch.full((2,), 2.0))


def test_recipe_is_resolved_and_replays(result: planish.Optimized) -> None:
    model, inputs, shapes = conv_bn()
    assert planish.Recipe.parse(str(result.recipe)) == result.recipe
    again = planish.optimize(model, inputs, dynamic_shapes=shapes, recipe=result.recipe)
    assert text(again.program, values=True) == text(result.program, values=True)


def test_calibration_that_nobody_needs_is_a_remark() -> None:
    model, inputs, _ = conv_bn()

    def never() -> Any:
        raise AssertionError("nobody needs it, so it must not be read")
        yield

    result = planish.optimize(model, inputs, calibration=never())
    assert any("no pass of the recipe has a use for it" in r for r in result.report.remarks)


def test_dump_dir_holds_every_step(tmp_path: Path) -> None:
    model, inputs, shapes = conv_bn()
    planish.optimize(
        model,
        inputs,
        dynamic_shapes=shapes,
        recipe="fold-batch-norm,remove-identities",
        dump_dir=tmp_path / "dump",
    )
    names = sorted(p.name for p in (tmp_path / "dump").glob("*.txt"))
    assert names[0] == "000_capture.txt"
    assert names[1].startswith("001_fold-batch-norm")


def test_verification_finds_a_pass_that_lies() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Halve(Pass):
        """Claims to be exact and is not."""

        name = "halve"
        contract = Contract.EXACT

        def run(self, program: planish.Program, context: PassContext) -> PassResult:
            from planish.ir.rewriter import Rewriter

            rewriter = Rewriter(program, self.name, context.sites)
            root = program.operators[-1]
            with rewriter.site("halve", root) as allowed:
                if allowed:
                    args = (root, 0.5)
                    rewriter.insert_before(program.output)
                    half = rewriter.call(torch.ops.aten.mul.Tensor, args, like=root)
                    root.replace_all_uses_with(half, delete_user_cb=lambda u: u is not half)
            return PassResult(rewriter.finish(), tuple(rewriter.changes))

    model, inputs, _ = conv_bn()
    with pytest.raises(planish.VerificationError, match="halve"):
        planish.optimize(model, inputs, recipe=[Halve()])
    silent = planish.optimize(model, inputs, recipe=[Halve()], verify="off")
    assert silent.report.fidelity is not None
    assert silent.report.fidelity.sqnr_db == pytest.approx(6.02, abs=0.1)


def test_instruments_of_the_caller_are_told() -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def before_pass(self, step: Step) -> None:
            seen.append(step.name)

    model, inputs, _ = conv_bn()
    planish.optimize(
        model, inputs, recipe="fold-batch-norm,eliminate-dead-code", instruments=[Watch()]
    )
    assert seen == ["fold-batch-norm", "eliminate-dead-code"]


def test_the_caller_model_still_trains() -> None:
    torch.manual_seed(0)
    model = ConvBn().eval()
    planish.optimize(model, IMAGE)
    model.train()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert model.conv.weight.grad is not None


def test_report_as_json_and_text(result: planish.Optimized) -> None:
    facts = json.loads(result.report.to_json())
    assert facts == json.loads(json.dumps(result.report.to_dict()))
    assert facts["totals"]["before"]["parameters"] > facts["totals"]["after"]["parameters"]
    assert facts["seed"] == 0
    shown = result.report.to_text()
    assert "fold-batch-norm" in shown
    assert "\x1b" not in shown
    assert len(result.report.to_text(all_passes=True)) > len(shown)


def test_identical_outputs_are_null_decibels_and_equal() -> None:
    model, inputs, _ = conv_bn()
    facts = planish.optimize(model, inputs, recipe="remove-identities").report.to_dict()
    assert facts["fidelity"]["sqnr_db"] is None
    assert facts["fidelity"]["equal"] is True
    assert facts["passes"][0]["sqnr_db"] is None


def test_export_reads_the_runtime_back(result: planish.Optimized, tmp_path: Path) -> None:
    result.export(tmp_path / "net.onnx")
    runtime = result.report.to_dict()["runtime"]
    assert runtime["runtime"].startswith("onnxruntime")
    assert sum(runtime["operators"].values()) >= 1


def test_export_for_another_target_is_a_remark(result: planish.Optimized, tmp_path: Path) -> None:
    artifact = result.export(tmp_path / "net.onnx", target="onnx")
    assert artifact.target == "onnx"
    assert any("not for onnx" in remark for remark in result.report.remarks)


def test_dynamic_dimension_with_a_sample_of_one() -> None:
    model, _, _ = conv_bn()
    result = planish.optimize(model, IMAGE, dynamic_shapes=({0: Dim("rows", max=9)},))
    assert "f32[rows, 3, 8, 8]" in str(result.program)
    assert result.model(torch.randn(9, 3, 8, 8)).shape[0] == 9


def test_replaying_a_recipe_makes_the_same_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    inputs = torch.randn(3, 4)
    result = planish.optimize(model, inputs)
    files = [tmp_path / f"{name}.onnx" for name in ("first", "again", "replayed")]
    result.export(files[0])
    result.export(files[1])
    assert result.recipe.choices  # measured by the first export, replayed by the others
    replay = planish.Recipe.from_yaml(result.recipe.to_yaml())
    again = planish.optimize(model, inputs, recipe=replay)
    again.export(files[2])
    assert len({file.read_bytes() for file in files}) == 1


def test_the_seed_of_a_recipe_is_the_one_reported() -> None:
    model, inputs, _ = conv_bn()
    recipe = planish.Recipe(seed=7)
    assert planish.optimize(model, inputs, recipe=recipe).report.seed == 7


class Flagged(nn.Module):
    """A switch with a default, and one without an opinion."""

    def forward(self, x: Tensor, *, double: bool = False, cache: bool | None = None) -> Tensor:
        return torch.relu(x) * (2.0 if double else 1.0)


def test_a_constant_may_be_left_out_only_where_forward_would_take_it() -> None:
    x = torch.ones(2)
    as_default = planish.optimize(Flagged().eval(), ((x,), {"double": False, "cache": True}))
    assert torch.equal(as_default.model(x), x)
    other = planish.optimize(Flagged().eval(), ((x,), {"double": True}))
    assert torch.equal(other.model(x, double=True), 2 * x)
    with pytest.raises(planish.UsageError, match="missing input 'double'"):
        other.model(x)


def test_file_carries_the_legal_sizes(tmp_path: Path) -> None:
    import onnx

    model, inputs, shapes = conv_bn()
    result = planish.optimize(model, inputs, dynamic_shapes=shapes)
    result.export(tmp_path / "net.onnx")
    facts = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert json.loads(facts["planish.ranges"])["batch"][1] == 64
    assert any("batch up to 64" in remark for remark in result.report.remarks)


def test_a_recipe_that_names_its_own_target_says_so() -> None:
    model, inputs, _ = conv_bn()
    recipe = "target=onnx,seed=5,fold-batch-norm"
    result = planish.optimize(model, inputs, recipe=recipe, target="onnxruntime-cpu")
    assert (result.report.target, result.report.seed) == ("onnx", 5)
    assert sum("names its own" in remark for remark in result.report.remarks) == 2
