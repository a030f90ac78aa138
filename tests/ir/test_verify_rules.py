"""The verifier's rules at their edges: what each must still see, and what it must let pass."""

import pytest
import torch
from torch import Tensor

from planish.ir.errors import VerificationError
from planish.ir.program import Program
from planish.ir.verify import faults, verify
from planish.ir.verify_rules import Subject, constants_not_nan
from tests.support.broken import (
    Breaker,
    broken_rules,
    constant,
    net,
    new_call,
    no_type,
    node,
    unread_constant,
)
from tests.support.nets import branch_program

aten = torch.ops.aten


def no_output(program: Program) -> None:
    program.graph.erase_node(program.output)


def output_of_a_single_value(program: Program) -> None:
    program.output.args = (program.results[0],)


def output_of_two_tuples(program: Program) -> None:
    program.output.args = ((program.results[0],), (program.results[1],))


def type_with_data_inside(program: Program) -> None:
    node(program, aten.relu.default).meta = {"val": (torch.zeros(2, 3, 8),)}


def constant_inside_a_short_name(program: Program) -> None:
    program.constants["one"] = program.constants.pop("two.weight")
    constant(program, "two.weight").target = "one"


def constant_that_is_fake(program: Program) -> None:
    program.constants["two.weight"] = program.fake_mode.from_tensor(torch.ones(8, 8))


def input_with_a_keyword(program: Program) -> None:
    program.placeholders[1].kwargs = {"default": 1.0}


@pytest.mark.parametrize(
    ("rule", "breaker", "what"),
    [
        ("one-output", no_output, "there are 0 output nodes; one must end the graph"),
        ("one-output", output_of_a_single_value, "the output node does not take one tuple"),
        ("one-output", output_of_two_tuples, "the output node does not take one tuple"),
        ("typed", type_with_data_inside, "its type holds a real tensor, not a fake one"),
        (
            "constant-names",
            constant_inside_a_short_name,
            "the constant 'one.weight' lies inside the constant 'one'",
        ),
        ("constants-plain", constant_that_is_fake, "the constant 'two.weight' holds no data"),
        ("inputs-match", input_with_a_keyword, "a placeholder has no default value"),
    ],
)
def test_what_else_breaks_a_rule(rule: str, breaker: Breaker, what: str) -> None:
    program = net()
    breaker(program)
    name, fault = next(faults(program))
    assert (name, fault.what) == (rule, what)
    with pytest.raises(VerificationError, match=f"rule {rule}: "):
        verify(program)


def test_all_rules_of_a_level_speak() -> None:
    program = net()
    no_type(program)
    unread_constant(program)
    assert broken_rules(program) == {"typed", "constants-present"}


def test_every_sample_is_looked_at() -> None:
    program = net()
    x, mask = torch.ones(2, 3, 4), torch.ones(2, 3, 1)
    program.samples = ((x,), (x.double(), mask), (x, mask))
    found = [fault.what for _, fault in faults(program)]
    assert found == ["sample 0 has 1 of 2 inputs", "sample 1 is f64, not f32"]


# -- what a pass may leave behind -----------------------------------------------------------------


def test_an_input_may_be_left_unread() -> None:
    before, after = net(), net()
    mul = node(after, aten.mul.Tensor)
    ones = new_call(after, mul, aten.ones_like.default, after.placeholders[1])
    mul.args = (mul.args[0], ones)
    verify(after, since=before)
    ones_of = new_call(after, ones, aten.new_ones.default, mul.args[0], [1, 3, 1])
    mul.args = (mul.args[0], ones_of)
    after.graph.erase_node(ones)
    assert not after.placeholders[1].users
    verify(after, since=before)


def test_a_call_with_an_effect_may_go_unread() -> None:
    before, after = net(), net()
    relu = node(after, aten.relu.default)
    noise = new_call(after, after.output, aten.rand_like.default, relu)
    assert not noise.users
    verify(after, since=before)


# -- bodies of branches are constants too ---------------------------------------------------------


def test_rules_look_past_the_body_of_a_branch() -> None:
    program = branch_program()
    verify(program)
    last = program.operators[-1]
    last.meta = {k: v for k, v in last.meta.items() if k != "val"}
    assert broken_rules(program) == {"typed"}
    last.meta = {**last.meta, "val": last.args[0].meta["val"][0].double()}  # type: ignore[union-attr]
    assert broken_rules(program) == {"operator-types"}
    program.constants["left.over"] = torch.ones(1, requires_grad=True)
    assert "constants-plain" in broken_rules(program)


# -- constants without NaN ------------------------------------------------------------------------


def new_nan(value: Tensor) -> list[str]:
    program = net()
    program.constants["two.weight"] = value
    return [fault.what for fault in constants_not_nan(Subject(program, since=net()))]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_nan_is_found_in_floats_of_every_width(dtype: torch.dtype) -> None:
    assert new_nan(torch.tensor([1.0, 2.0]).to(dtype)) == []
    assert len(new_nan(torch.tensor([1.0, torch.nan]).to(dtype))) == 1


@pytest.mark.parametrize(
    "value",
    [torch.arange(3), torch.tensor([True]), torch.empty(0, 8), torch.tensor([1, 2]).to(torch.int8)],
)
def test_what_cannot_hold_nan_holds_none(value: Tensor) -> None:
    assert new_nan(value) == []
