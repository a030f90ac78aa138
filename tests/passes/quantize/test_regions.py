"""Which operators between products stay in integers, and whose scales agree."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.passes.quantize.quantize import Quantize
from planish.passes.quantize.ranges import groups_of
from tests.passes.quantize.nets import calibrated, captured, conv, linear, normal
from tests.support.check import check

X = normal(1, 2, 6, 6)


def between(f: Any, *, x: Tensor = X, **options: Any) -> tuple[list[str], Program]:
    """The operators between that were written in integers, and the program."""
    program = captured(f, x, a=conv(2, 4), b=conv(4, 3), c=linear(4, 3), w=conv(8, 3))
    result = check(program, (), Quantize(**options), context=calibrated(program))
    by_name = {n.name: n for n in result.program.operators}
    found = [
        op_name(by_name[change.node].target)
        for change in result.changes
        if change.rule == "quantize-between"
    ]
    return found, result.program


def scales(program: Program) -> dict[str, float]:
    """The scale of every value that is quantized, by the operator that made it."""
    found = {}
    for node in program.operators:
        if op_name(node.target) == "planish.quantize":
            scale: Any = program.constant(node.args[1])
            value: Any = node.args[0]
            found[str(value.name)] = float(scale)
    return found


def test_a_sum_between_two_convolutions() -> None:
    found, program = between(lambda m, x: m.b(m.a(x) + m.a(x * 2)))
    assert found == ["aten.add.Tensor"]
    assert len(set(scales(program).values())) == len(scales(program)) == 5


def test_nothing_between_linears_unless_asked_for() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        return m.c(F.pad(y.sigmoid(), (0, 1)))

    assert between(f, x=normal(5, 4))[0] == []
    found, _ = between(f, x=normal(5, 4), between="all")
    assert found == ["aten.sigmoid", "aten.pad"]


def test_nothing_between_where_it_is_switched_off() -> None:
    assert between(lambda m, x: m.b(m.a(x) + m.a(x * 2)), between="none")[0] == []


def test_an_operator_that_no_integer_operator_reads_stays_in_float() -> None:
    assert between(lambda m, x: F.max_pool2d(m.a(x).sigmoid(), 2))[0] == []


def test_a_value_from_outside_keeps_what_reads_it_in_float() -> None:
    assert between(lambda m, x: m.b(m.a(x) * x.mean()))[0] == []


@pytest.mark.parametrize(
    "move",
    [
        lambda y: F.max_pool2d(y, 2),
        lambda y: y.transpose(2, 3),
        lambda y: y[:, :, 1:],
        lambda y: y.reshape(1, 4, 4, 9),
        lambda y: F.pad(y, (1, 1, 1, 1)),
        lambda y: F.interpolate(y, scale_factor=2, mode="nearest"),
        lambda y: y.unsqueeze(0).squeeze(0),
        lambda y: F.pixel_shuffle(y.reshape(1, 16, 3, 3), 2),
    ],
)
def test_movers_pass_the_scale_through(move: Any) -> None:
    found, program = between(lambda m, x: m.b(move(m.a(x))))
    assert found
    assert len({s for name, s in scales(program).items() if not name.startswith("inputs")}) == 1


def test_what_is_concatenated_shares_one_scale_with_the_result() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.w(torch.cat([y, m.a(x * 3).relu()], 1))

    found, program = between(f)
    assert found == ["aten.cat"]
    by_name = scales(program)
    assert len({by_name[name] for name in ("conv2d", "relu", "cat")}) == 1


def test_pieces_of_a_split_share_the_scale_of_the_whole() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        one, other = m.a(x).chunk(2, 1)
        return m.a(one) + m.a(other)

    found, program = between(f)
    assert found == ["aten.chunk"]
    by_name = scales(program)
    assert len({by_name[name] for name in ("conv2d", "getitem", "getitem_1")}) == 1


def test_a_clamp_behind_a_pooling_shares_its_scale() -> None:
    """The pooling and the clamp both compute on the integers of what they read."""
    found, program = between(lambda m, x: m.b(F.max_pool2d(m.a(x), 2).relu()))
    assert found == ["aten.max_pool2d", "aten.relu"]
    by_name = scales(program)
    assert len({by_name[name] for name in ("conv2d", "max_pool2d", "relu")}) == 1


def test_a_clamp_whose_operand_others_read_has_integers_on_both_sides() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + m.b(y.relu())

    found, program = between(f)
    assert found == ["aten.relu"]
    assert {"conv2d", "relu"} <= scales(program).keys()


def test_squeeze_and_excitation_is_integer_throughout() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

        def forward(self, y: Tensor) -> Tensor:
            gate = self.up(F.silu(self.down(y.mean((2, 3), keepdim=True))))
            return y * gate.sigmoid()

    gate = Gate()
    program = captured(lambda m, x: m.b(m.gate(m.a(x))), X, a=conv(2, 4), b=conv(4, 3), gate=gate)
    result = check(program, (), Quantize(), context=calibrated(program))
    assert [c.rule for c in result.changes].count("quantize-between") == 4
    assert not result.refusals


def test_groups_are_the_closure_of_what_must_agree() -> None:
    program = captured(lambda m, x: x + 1 + 2 + 3 + 4, X)
    a, b, c, d = program.operators
    groups = groups_of([a, b, c, d], [(a, c), (c, d)])
    assert groups == [[a, c, d], [b]]
    # Values that only stand between may be named too.
    assert groups_of([a, d], [(a, b), (b, c), (c, d)]) == [[a, d]]
    assert groups_of([a, b], []) == [[a], [b]]
