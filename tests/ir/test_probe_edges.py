"""The second probe at the ends of ranges, and of values at the edge."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.errors import UsageError
from planish.ir.execute import run
from planish.ir.probe import sample_inputs_at, second_probe, second_reference
from planish.ir.program import Program


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@cache
def _traced() -> Program:
    return capture(Scaled().eval(), (torch.randn(6, 3),), dynamic_shapes=({0: Dim("rows")},))


def ranged(size: int, low: int = 0, high: int | None = None) -> Program:
    """A program whose rows may be ``low`` to ``high``, with a sample of ``size``."""
    program = _traced().clone()
    (symbol,) = program.signature.symbols
    signature = dataclasses.replace(program.signature, ranges={symbol: (low, high)})
    program.signature = signature
    program.samples = ((torch.randn(size, 3),),)
    return program


def rows(program: Program) -> int:
    found = second_probe(program)
    assert found is not None
    return int(found[0].shape[0])


def drawn(sample: Tensor, seed: int = 0) -> Tensor:
    found = second_probe(capture(Scaled().eval(), (sample,)), seed)
    assert found is not None
    value: Tensor = found[0]
    return value


@pytest.mark.parametrize(
    ("size", "low", "high", "expected"),
    [
        (6, 0, None, 7),
        (6, 0, 7, 7),  # the end of the range is legal
        (6, 0, 6, 5),
        (6, 6, 7, 7),
        (6, 5, 6, 5),
        (7, 7, 7, 7),
        (2, 1, 2, 1),  # one rather than none
        (2, 0, 2, 1),
        (1, 0, 1, 1),  # and none is no probe
        (0, 0, 9, 2),  # a sample without a row
        (15, 0, None, 16),
        (16, 0, None, 8),
        (127, 0, None, 63),
        (128, 0, None, 32),
        (40, 30, None, 41),  # half is too small
        (40, 39, 40, 39),
        (200, 2, 2, 2),  # far from its range, which the sample does not keep
        (200, 0, 100, 50),
        (200, 60, 100, 60),
    ],
)
def test_the_size_of_a_probe(size: int, low: int, high: int | None, expected: int) -> None:
    program = ranged(size, low, high)
    assert rows(program) == expected


def test_both_ends_of_a_range_can_be_asked_for() -> None:
    program = ranged(6, 2, 9)
    for size in (2, 9):
        assert sample_inputs_at(program, {"rows": size})[0].shape == (size, 3)
    for size in (1, 10):
        with pytest.raises(UsageError, match=rf"rows cannot be {size}(.|\n)*2 to 9"):
            sample_inputs_at(program, {"rows": size})
    with pytest.raises(UsageError, match=r"cannot be -1(.|\n)*0 to any"):
        sample_inputs_at(ranged(6), {"rows": -1})


def test_a_size_without_a_name_has_that_of_its_symbol() -> None:
    shapes = ({0: Dim.AUTO},)
    program = capture(Scaled().eval(), (torch.randn(6, 3),), dynamic_shapes=shapes)
    found = second_reference(program)
    assert found.sizes is not None
    ((name, size),) = found.sizes.items()
    assert size == 7
    assert sample_inputs_at(program, {name: 5})[0].shape == (5, 3)


def test_floats_hang_on_the_seed_alone() -> None:
    sample = torch.randn(32)
    state = torch.get_rng_state()
    first = drawn(sample, 1)
    torch.rand(1)
    assert torch.equal(drawn(sample, 1), first)
    assert not torch.equal(drawn(sample, 2), first)
    torch.set_rng_state(state)
    drawn(sample, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_part_of_complex_values_is_like_its_own() -> None:
    value = drawn(torch.complex(torch.randn(256) - 10, torch.randn(256) + 10))
    assert float(value.real.mean()) == pytest.approx(-10, abs=1)
    assert float(value.imag.mean()) == pytest.approx(10, abs=1)


def test_no_value_of_many_loses_the_sign_of_a_constant() -> None:
    value = drawn(torch.full((1 << 20,), -2.0))
    assert float(value.max()) <= -2.0 / 4 + 1e-6
    assert float(value.min()) >= -2.0 * 7 / 4 - 1e-6


def test_empty_outputs_and_integers_leave_something_to_compare() -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:0] * 2, (x > 0).sum(0)

    program = capture(Empty().eval(), (torch.randn(4, 3),))
    found = second_reference(program)
    assert found.rejected == ()
    assert found.inputs is not None
    assert found.outputs[0].shape == (0, 3)


class Repeats(nn.Module):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return x.expand(n, 3) * 2


def test_a_number_that_may_vary_varies() -> None:
    shapes: Any = (None, Dim.DYNAMIC)
    program = capture(Repeats().eval(), (torch.randn(1, 3), 5), dynamic_shapes=shapes)
    found = second_reference(program)
    assert found.resized
    assert found.inputs is not None
    assert found.inputs[1] == 6
    assert found.outputs[0].shape == (6, 3)
    assert torch.equal(found.outputs[0], run(program, found.inputs)[0])


def test_counts_beside_what_is_no_number_are_no_check() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (-x.abs() - 1).log(), (x > 0).sum()

    found = second_reference(capture(Odd().eval(), (torch.randn(4),)))
    assert found.inputs is None
    assert len(found.rejected) == 1


def test_outputs_that_are_no_tensors_are_no_hindrance() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return x * 2, 7, None, "word"

    found = second_reference(capture(Plain().eval(), (torch.randn(4),)))
    assert found.rejected == ()
    assert found.outputs[1:] == (7, None, "word")
