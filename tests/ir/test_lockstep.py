"""Side by side: the same answers as alone, values that meet, and few of them alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from planish.ir import Program, capture
from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.lockstep import Meeting, is_random, lockstep
from planish.tools.bench.live_bytes import LiveBytes

aten = torch.ops.aten
DEPTH, WIDTH, BATCH = 200, 8, 16


def deep(depth: int = DEPTH) -> nn.Module:
    """A chain of layers, each of which only the next one reads."""
    torch.manual_seed(0)
    layers = [m for _ in range(depth // 2) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers).eval()


def captured(module: nn.Module, *inputs: Tensor) -> Program:
    shapes = tuple({0: Dim("batch", max=1024)} for _ in inputs)
    return capture(module, inputs, dynamic_shapes=(shapes,) if len(inputs) > 1 else shapes)


def noting(values: dict[str, Tensor]) -> Callable[[Node, Any], None]:
    return lambda node, value: values.update({node.name: value})


def append(found: list[Any], item: object) -> Callable[[tuple[Any, ...]], None]:
    return lambda values: found.append(item)


def pairs(one: Program, two: Program) -> list[tuple[Node, Node]]:
    return list(zip(one.operators, two.operators, strict=True))


def test_every_program_gives_what_it_gives_alone_and_values_meet_their_partners() -> None:
    first = captured(deep(6), torch.randn(BATCH, WIDTH))
    second = first.clone()
    second.constants = {n: c + 1 for n, c in first.constants.items() if isinstance(c, Tensor)}
    inputs = (torch.randn(5, WIDTH),)
    alone: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for program, values in zip((first, second), alone, strict=True):
        run(program, inputs, observe=noting(values))
    met: dict[str, tuple[Any, ...]] = {}

    def meeting(a: Node, b: Node) -> Meeting:
        return Meeting(((0, a), (1, b)), lambda values: met.update({a.name: values}))

    meetings = [meeting(a, b) for a, b in pairs(first, second)]
    outputs = lockstep([first, second], inputs, meetings)
    assert torch.equal(outputs[0][0], run(first, inputs)[0])
    assert torch.equal(outputs[1][0], run(second, inputs)[0])
    assert list(met) == [n.name for n in first.operators]
    for name, (a, b) in met.items():
        assert torch.equal(a, alone[0][name])
        assert torch.equal(b, alone[1][name])


@pytest.mark.parametrize("count", [2, 3])
def test_a_deep_chain_holds_a_constant_number_of_values(count: int) -> None:
    first = captured(deep(), torch.randn(BATCH, WIDTH))
    programs = [first, *(first.clone() for _ in range(count - 1))]
    seen: list[str] = []
    meetings = [
        Meeting(
            tuple((k, p.operators[i]) for k, p in enumerate(programs)),
            append(seen, node.name),
        )
        for i, node in enumerate(first.operators)
    ]
    inputs = (torch.randn(BATCH, WIDTH),)
    with LiveBytes() as live:
        lockstep(programs, inputs, meetings)
    assert len(seen) == DEPTH
    one = BATCH * WIDTH * 4
    # Of each program the value just computed and the one it was computed from.
    assert live.peak <= 2 * count * one
    assert live.made >= count * DEPTH * one


def test_values_that_meet_in_another_order_wait_and_go() -> None:
    first = captured(deep(20), torch.randn(BATCH, WIDTH))
    second = first.clone()
    met: list[int] = []
    crossed = list(zip(first.operators, reversed(second.operators), strict=True))
    meetings = [Meeting(((0, a), (1, b)), append(met, i)) for i, (a, b) in enumerate(crossed)]
    with LiveBytes() as live:
        lockstep([first, second], (torch.randn(BATCH, WIDTH),), meetings)
    assert sorted(met) == list(range(20))
    assert live.peak <= (20 + 4) * BATCH * WIDTH * 4
    assert live.now <= 2 * BATCH * WIDTH * 4  # what the caller was given, which is gone


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + torch.rand_like(x)) + torch.rand_like(x)


def test_programs_that_draw_draw_the_same_and_nobody_notices() -> None:
    program = capture(Draws().eval(), (torch.zeros(3, 4),))
    other = program.clone()
    meetings = [Meeting(((0, a), (1, b)), lambda v: None) for a, b in pairs(program, other)]
    state = torch.get_rng_state()
    one, two = lockstep([program, other], (torch.zeros(3, 4),), meetings, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0], two[0])
    torch.manual_seed(3)
    assert torch.equal(one[0], run(program, (torch.zeros(3, 4),))[0])
    assert not torch.equal(one[0], lockstep([program], (torch.zeros(3, 4),), [], seed=4)[0][0])
    torch.set_rng_state(state)


def test_a_value_that_nobody_reads_can_still_meet() -> None:
    class Splits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, _ = x.split([1, 1], 1)
            return first * 2

    program = capture(Splits().eval(), (torch.randn(3, 2),))
    met: list[Any] = []
    meetings = [Meeting(((0, node),), met.extend) for node in program.operators]
    meetings.append(Meeting(((0, program.placeholders[0]),), met.extend))
    lockstep([program], (torch.ones(3, 2),), meetings)
    assert len(met) == len(program.operators) + 1


def test_the_wrong_number_of_inputs_and_a_failing_operator_are_named() -> None:
    program = captured(deep(2), torch.randn(BATCH, WIDTH))
    with pytest.raises(PassError, match="takes 1 inputs, got 2"):
        lockstep([program], (torch.ones(1), torch.ones(1)), [])
    with pytest.raises(PassError, match="operator failed"):
        lockstep([program], (torch.ones(2, WIDTH + 1),), [])


class Drops(nn.Module):
    def __init__(self, rate: float, training: bool):
        super().__init__()
        self.rate = rate
        self.draws = training

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.5, training=self.draws)
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.rate)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_that_is_off_draws_nothing(rate: float, training: bool) -> None:
    program = capture(Drops(rate, training).eval(), (torch.randn(2, 3, 4),))
    draws = {node.target for node in program.operators if is_random(node)}
    expected = {aten.dropout.default: training, aten.scaled_dot_product_attention.default: rate > 0}
    assert draws == {target for target, drawn in expected.items() if drawn}


def test_what_draws_nothing_is_not_random() -> None:
    program = capture(Draws().eval(), (torch.zeros(3, 4),))
    drawn = [node.name for node in program.graph.nodes if is_random(node)]
    assert drawn == ["rand_like", "rand_like_1"]


def test_values_that_waited_are_freed_while_others_are_computed() -> None:
    first = captured(deep(60), torch.randn(BATCH, WIDTH))
    second = first.clone()
    met: list[int] = []
    one, two = first.operators, second.operators
    crossed = [(one[i], two[10 * (i // 10) + 9 - i % 10]) for i in range(60)]
    meetings = [Meeting(((0, a), (1, b)), append(met, i)) for i, (a, b) in enumerate(crossed)]
    with LiveBytes() as live:
        lockstep([first, second], (torch.randn(BATCH, WIDTH),), meetings)
    assert met == list(range(60))
    assert live.peak <= (10 + 4) * BATCH * WIDTH * 4


def test_a_value_waits_for_all_its_meetings() -> None:
    program = captured(deep(12), torch.randn(BATCH, WIDTH))
    early, *others = program.operators
    met: list[Any] = []
    meetings = [Meeting(((0, early), (0, late)), met.append) for late in others]
    inputs = (torch.randn(BATCH, WIDTH),)
    assert lockstep([program], inputs, meetings, to_end=False) == ((),)
    alone: dict[str, Tensor] = {}
    run(program, inputs, observe=noting(alone))
    assert [torch.equal(a, alone[early.name]) for a, _ in met] == [True] * 11
    for (_, value), late in zip(met, others, strict=True):
        assert torch.equal(value, alone[late.name])


def test_observers_see_every_operator_of_their_program() -> None:
    program = captured(deep(4), torch.randn(BATCH, WIDTH))
    other = program.clone()
    inputs = (torch.randn(BATCH, WIDTH),)
    alone: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    run(program, inputs, observe=noting(alone))
    lockstep([other, program], inputs, [], observe={1: noting(seen)})
    assert list(seen) == [node.name for node in program.operators]
    assert all(torch.equal(seen[name], value) for name, value in alone.items())
