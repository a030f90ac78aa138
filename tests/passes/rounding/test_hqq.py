from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish.ir.quantscheme import QuantScheme
from planish.passes.base import PassContext
from planish.passes.recipe import resolve
from planish.passes.rounding.hqq import Hqq, hqq, hqq_integer, shrink
from planish.passes.rounding.round_weights import round_to_nearest
from planish.passes.rounding.targets import QUANTIZED
from tests.passes.rounding.nets import small_lm
from tests.support.check import run_checked


def laplace(groups: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(groups, 64, generator=generator) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log() * 0.02


def test_the_proximal_step() -> None:
    assert float(shrink(torch.tensor(0.3), 10, 1.0)) == pytest.approx(0.2)
    assert float(shrink(torch.tensor(0.3), 10, 0.7)) == pytest.approx(0.15650, abs=1e-5)
    assert shrink(torch.tensor([0.0, -0.3, 0.05]), 10, 1.0).tolist() == pytest.approx([0, -0.2, 0])
    assert shrink(torch.zeros(3), 10, 0.7).tolist() == [0, 0, 0]  # where |x|^(p-1) is infinite


@pytest.mark.parametrize(
    ("bits", "plain", "better"), [(2, 0.01327, 0.01173), (4, 0.00262, 0.00253)]
)
def test_laplace_groups(bits: int, plain: float, better: float) -> None:
    groups = laplace()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounded = ((groups - low) / step).round() * step + low
    assert float((rounded - groups).abs().mean()) == pytest.approx(plain, rel=0.02)
    codes, scale, zero = hqq(groups, bits)
    error = float(((codes - zero) * scale - groups).abs().mean())
    assert error == pytest.approx(better, rel=0.02)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["int4", "uint4", "int8"]),
    st.sampled_from([0, 16]),
    st.booleans(),
    st.sampled_from([0.5, 0.7, 1.0]),
    st.integers(0, 1000),
)
def test_no_group_is_worse_than_rounded_to_the_nearest(
    dtype: Any, block: int, symmetric: bool, p: float, seed: int
) -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) ** 3
    scheme = QuantScheme(
        dtype=dtype,
        granularity="block" if block else "channel",
        axis=1 if block else 0,
        block_size=block,
        symmetric=symmetric,
    )
    found, plain = hqq_integer(weight, scheme, p=p), round_to_nearest(weight, scheme)
    assert torch.equal(found.zero_point, plain.zero_point)
    errors = [(c.real() - weight).abs().pow(p).sum(1) for c in (found, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def test_integer_zero_points_gain_too() -> None:
    groups = laplace(500)
    scheme = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=64, symmetric=False)
    errors = [
        float((c.real() - groups).abs().mean())
        for c in (hqq_integer(groups, scheme), round_to_nearest(groups, scheme))
    ]
    assert errors[0] < 0.97 * errors[1]


def test_the_pass_rounds_every_weight_once() -> None:
    result = run_checked(small_lm(), Hqq())
    assert len(result.changes) == 5
    again = Hqq().run(result.program, PassContext())
    assert not again.changes
    assert {r.reason for r in again.refusals} == {QUANTIZED}
    (parsed,) = resolve("hqq{dtype=int4,p=0.5,iterations=5}").passes
    assert parsed == Hqq(dtype="int4", p=0.5, iterations=5)


def test_a_group_of_one_outlier_may_not_improve_and_never_worsens() -> None:
    """The outlier sets the range, and the others lie on the grid already."""
    group = torch.tensor([[15.0, *[0.0] * 63]])
    scheme = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=64, symmetric=False)
    assert torch.equal(hqq_integer(group, scheme).real(), group)
    codes, scale, zero = hqq(group, 4)
    assert torch.equal((codes - zero) * scale, group)
