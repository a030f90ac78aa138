"""Comparison at its edges: nothing to compare, plain values, exact types, tuples on the way."""

import math

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.compare import BOUNDS, Fidelity, bound_of, bounds_of, difference, measure
from planish.ir.errors import UsageError


def test_no_outputs_are_equal() -> None:
    assert measure((), ()) == Fidelity(math.inf, 1.0, 0.0, 0.0, equal=True)
    assert difference((), ()) is None


def test_what_cannot_be_measured_names_the_output() -> None:
    x = torch.ones(2, 3)
    for other in (torch.ones(3, 2), torch.ones(2, 3, 1), 1.0, None):
        with pytest.raises(UsageError, match="output 1 "):
            measure((x, x), (x, other))
    with pytest.raises(UsageError, match="1 outputs, and a reference with 2"):
        measure((x, x), (x,))


@pytest.mark.parametrize("value", [3, True, None, "text", torch.arange(3), torch.tensor([True])])
def test_what_is_compared_exactly_has_no_bound(value: object) -> None:
    assert bound_of(value) == 0.0


def test_a_number_is_as_good_as_a_float32_tensor() -> None:
    assert bound_of(1.5) == BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_compared_exactly(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0, 0.5])
    assert difference((x.to(dtype),), (x.to(dtype),)) is None
    problem = difference((x.to(dtype),), ((x * 1.25).to(dtype),))
    assert problem is not None
    assert "the bound for" in problem


class Parts(nn.Module):
    """Values pass through a tuple of a coarse type, beside outputs that are no tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int, float, None]:
        coarse, _ = x.to(torch.bfloat16).split(2)
        fine, _ = x.split(2)
        return coarse.float(), fine, 3, 0.5, None


def test_bounds_look_into_tuples_and_past_plain_outputs() -> None:
    program = capture(Parts().eval(), (torch.randn(4),))
    coarse, fine = BOUNDS[torch.bfloat16], BOUNDS[torch.float32]
    assert bounds_of(program) == (coarse, fine, 0.0, fine, 0.0)
