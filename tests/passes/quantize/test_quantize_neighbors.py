"""What ``quantize`` leaves as it was, and what it shares."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.execute import run
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout
from planish.ir.text import text
from planish.ir.verify import verify
from planish.passes.base import PassContext
from planish.passes.pipeline import run_pipeline
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.where import Where
from planish.passes.recipe import Recipe
from tests.passes.quantize.nets import calibrated, captured, conv, linear, normal, residual_net
from tests.support import real_models
from tests.support.check import run_checked


def names(program: Program, operator: str) -> list[Node]:
    return [n for n in program.operators if op_name(n.target) == operator]


def three_readers() -> Program:
    """Two linears and a sum read one value."""
    return captured(
        lambda m, x: (m.a(x), m.b(x), x + 1), normal(5, 4), a=linear(4, 3), b=linear(4, 2)
    )


def test_one_pair_for_all_that_read_a_value_and_none_for_floats() -> None:
    program = three_readers()
    result = run_checked(program, Quantize(), calibrated(program)).program
    (codes,) = names(result, "planish.quantize")
    (pair,) = [n for n in codes.users if n.op == "call_function"]
    assert [op_name(n.target) for n in pair.users] == ["aten.linear", "aten.linear"]
    (plain,) = names(result, "aten.add.Tensor")
    assert plain.args[0] is result.placeholders[0]


def test_a_second_run_with_another_choice_shares_the_pairs_of_the_first() -> None:
    program = three_readers()
    first = run_checked(program, Quantize(where=Where(include=("a",))), calibrated(program))
    second = run_checked(first.program, Quantize(range="mse"), calibrated(program))
    assert len(second.changes) == 1
    assert len(names(second.program, "planish.quantize")) == 1
    once = run_checked(program, Quantize(), calibrated(program)).program
    assert text(second.program) == text(once)


def test_weights_in_integers_are_kept_and_only_values_are_added() -> None:
    program = residual_net()
    weights = run_checked(program, Quantize(mode="weight", weights="int4")).program
    result = run_checked(weights, Quantize(), calibrated(program))
    constants = result.program.constants
    assert all(f"{name}.weight_int4" in constants for name in "abc")
    assert not any(name.endswith("weight_int8") for name in constants)
    for name in "abc":
        assert constants[f"{name}.weight_int4"] is weights.constants[f"{name}.weight_int4"]
        assert f"{name}.bias_int32" in constants


def test_a_weight_that_something_else_reads_stays_beside_its_integers() -> None:
    program = captured(lambda m, x: m.fc(x) + m.fc.weight.sum(), normal(5, 4), fc=linear())
    context: Any = calibrated(program)
    result = run_checked(program, Quantize(), context)
    assert result.program.constants["fc.weight"] is program.constants["fc.weight"]
    assert "fc.weight stays in float beside its integers: sum_1 reads it" in context.remarks


def test_tied_weights_are_written_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    from planish.ir.capture import capture

    program = capture(Tied().eval(), (torch.tensor([[1, 2]]),))
    program = run_pipeline(program, Recipe.parse("merge-duplicate-constants")).program
    for options in (
        {"weights": "int8"},
        {"weights": "uint4", "granularity": "block", "block_size": 2},
    ):
        pass_ = Quantize(mode="weight", **options)
        result = run_checked(program, pass_).program
        (weight,) = names(result, "planish.dequantize")
        assert {op_name(n.target) for n in weight.users} == {"aten.embedding", "aten.linear"}
        assert sum(name.endswith(options["weights"]) for name in result.constants) == 1  # type: ignore[arg-type]  # a tensor, no module


def test_a_sparse_weight_is_sparse_in_integers() -> None:
    layer = linear(8, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 0, 1, 0] * 2))
    program = captured(lambda m, x: m.fc(x), normal(5, 8), fc=layer)
    program.layouts["fc.weight"] = SparseLayout(2, 4, 1)
    result = run_checked(program, Quantize(), calibrated(program)).program
    assert result.layouts == {"fc.weight_int8": SparseLayout(2, 4, 1)}
    shifted = run_checked(
        program, Quantize(weights="uint8", symmetric=False), calibrated(program)
    ).program
    assert shifted.layouts == {"fc.weight_uint8": SparseLayout(2, 4, 1)}  # zero points are zeros


def test_nodes_say_where_they_are_from() -> None:
    program = residual_net()
    result = run_checked(program, Quantize(), calibrated(program)).program
    made = [n for n in result.operators if op_name(n.target).startswith("planish.")]
    assert made
    for node in made:
        assert node.meta["from"][0] == "quantize"
        assert node.meta["from"][1].startswith("quantize-")
    (product,) = names(result, "aten.linear")
    assert product.meta["from"][1] == "quantize-linear"
    assert product.meta["stack_trace"] == names(program, "aten.linear")[0].meta["stack_trace"]


def test_any_number_of_sites_makes_a_valid_program() -> None:
    """Bisection stops anywhere; what is written so far must run and be near."""
    program = residual_net()
    reference = run(program, program.samples[0])[0]
    for limit in range(1, 8):
        context = calibrated(program)
        context.sites.limit = limit
        result = Quantize().run(program.clone(), context)
        verify(result.program)
        assert len(result.changes) == limit
        found = run(result.program, program.samples[0])[0]
        assert float((found - reference).abs().max()) < 0.1 * float(reference.abs().max())


def test_dynamic_sizes_stay_dynamic() -> None:
    from torch.export import Dim

    from planish.ir.capture import capture

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(2, 4), conv(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    sizes = {"x": {0: Dim("batch", max=8), 3: Dim("width", min=3, max=64)}}
    program = capture(Two().eval(), (normal(2, 2, 6, 5),), dynamic_shapes=sizes)
    result = run_checked(program, Quantize(), calibrated(program)).program
    assert run(result, (normal(3, 2, 6, 9),))[0].shape == (3, 3, 6, 9)
    assert "B" in text(result) or "batch" in text(result)


@pytest.mark.parametrize(
    "spec",
    [
        "quantize",
        "quantize{mode=dynamic,per_token=true}",
        "quantize{mode=weight,weights=uint4,granularity=block,block_size=32,symmetric=false}",
        'quantize{range=percentile,attention=true,where={include=["encoder*"],exclude=[aten.bmm]}}',
        "quantize{embedding=true,between=all,saturation=reduced,padding_mask=attention_mask}",
    ],
)
def test_options_survive_being_written_down(spec: str) -> None:
    recipe = Recipe.parse(spec)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert str(recipe) == spec


def test_the_pipeline_measures_the_error_and_the_remark_names_processors() -> None:
    program = residual_net()
    record = run_pipeline(program, Recipe((Quantize(),)), calibrated(program)).records[0]
    assert record.changed
    assert any("can saturate in 3 operators on x86" in remark for remark in record.remarks)


@pytest.mark.slow
def test_real_networks_stay_near() -> None:
    """MiniLM and EfficientNet-Lite0, without any repair."""
    for model, least_db, recipe in (
        ("minilm", 12.0, "exact,quantize{padding_mask=attention_mask}"),
        ("minilm", 20.0, "exact,quantize{mode=dynamic,per_token=true}"),
        ("efficientnet-lite0", 13.0, "exact,quantize"),
    ):
        description, module = real_models.loaded(model)
        args, kwargs = real_models.inputs(model)
        from planish.ir.capture import capture
        from planish.passes.calibrate import spool
        from planish.passes.quantize.weights import decibels

        program = capture(module, args, kwargs, dynamic_shapes=description.dynamic_shapes)
        other = description.inputs(8, description.sizes[0][1])
        context = PassContext(calibration=spool([other[1] or other[0]], program))
        result = run_pipeline(program, Recipe.parse(recipe), context).program
        sample = program.samples[0]
        assert decibels(run(program, sample)[0], run(result, sample)[0]) > least_db
