"""``QuantScheme``: ranges, scales, shapes, and errors that stay within half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.quantscheme import INTEGERS, QuantScheme, dequantize_linear, spread, to_blocks
from tests.support.strategies import normal, seeds, shapes

DTYPES = st.sampled_from(["int8", "uint8", "int4", "uint4", "int16", "uint16"])


@st.composite
def schemes(draw: st.DrawFn, rank: int) -> QuantScheme:
    granularity = draw(st.sampled_from(["tensor", "channel", "token", "block"]))
    dtype = draw(DTYPES)
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return QuantScheme(
        dtype=dtype,  # type: ignore[arg-type]  # one of a Literal
        granularity=granularity,  # type: ignore[arg-type]  # one of a Literal
        symmetric=draw(st.booleans()),
        axis=draw(st.integers(0, rank - 1)) if granularity in ("channel", "block") else None,
        block_size=draw(st.integers(1, 5)) if granularity == "block" else 0,
        narrow=draw(st.booleans()),
        bits=draw(st.none() | st.integers(2, bits)),
    )


@given(st.data(), shapes(min_dims=2, max_dims=3), seeds(), st.floats(0.01, 100))
def test_what_is_within_the_range_is_off_by_half_a_step(
    data: st.DataObject, shape: tuple[int, ...], seed: int, size: float
) -> None:
    x = normal(shape, seed) * size
    scheme = data.draw(schemes(len(shape)))
    scale, zero = scheme.qparams_of(x)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    codes = scheme.quantize(x, scale, zero)
    low, high = scheme.range
    assert codes.dtype == zero.dtype == scheme.storage
    assert low <= int(codes.to(torch.int32).min())
    assert int(codes.to(torch.int32).max()) <= high
    axis, block = scheme.layout(x)
    step = spread(scale, x, axis, block)
    error = (scheme.dequantize(codes, scale, zero) - x).abs()
    # Rounding the zero point may push an end of the range out by half a step more.
    bound = 0.5 if scheme.symmetric else 1.0
    assert bool((error <= bound * step * (1 + 1e-3) + 1e-6 * x.abs()).all())


@given(shapes(min_dims=1, max_dims=3), seeds(), st.booleans())
def test_errors_fall_as_bits_rise(shape: tuple[int, ...], seed: int, symmetric: bool) -> None:
    x = normal((*shape, 64), seed)
    errors = [
        float((QuantScheme(dtype="int16", symmetric=symmetric, bits=b).fake(x) - x).abs().mean())
        for b in (2, 4, 6, 8, 10, 12)
    ]
    assert errors == sorted(errors, reverse=True)


@given(seeds(), DTYPES)
def test_zero_is_always_written_exactly(seed: int, dtype: str) -> None:
    x = normal((7, 3), seed) + 5  # all positive
    x[0, 0] = 0
    scheme = QuantScheme(dtype=dtype, symmetric=False)  # type: ignore[arg-type]  # one of a Literal
    assert float(scheme.fake(x)[0, 0]) == 0


def test_known_scales_and_zero_points() -> None:
    low, high = torch.tensor([-1.0, 0.0, -2.0]), torch.tensor([3.0, 2.55, -1.0])
    scale, zero = QuantScheme(dtype="uint8", symmetric=False).qparams(low, high)
    torch.testing.assert_close(scale, torch.tensor([4 / 255, 0.01, 2 / 255]))
    assert zero.tolist() == [64, 0, 255]
    scale, zero = QuantScheme(dtype="int8", narrow=True).qparams(low, high)
    torch.testing.assert_close(scale, torch.tensor([3.0, 2.55, 2.0]) / 127)
    assert zero.tolist() == [0, 0, 0]
    # Not narrow: -8 is one step further away than 7, and may be used.
    scale, _ = QuantScheme(dtype="int4").qparams(torch.tensor(-8.0), torch.tensor(3.5))
    assert float(scale) == 1.0
    scale, zero = QuantScheme(dtype="uint4").qparams(torch.tensor(-8.0), torch.tensor(3.5))
    assert (float(scale), int(zero)) == (1.0, 8)


def test_ties_go_to_even_and_what_is_beyond_saturates() -> None:
    scheme = QuantScheme(dtype="int8")
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9])
    codes = scheme.quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int8))
    assert codes.tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_seven_bits_and_narrow_ranges() -> None:
    assert QuantScheme(dtype="int8", bits=7).range == (-64, 63)
    assert QuantScheme(dtype="int8", bits=7, narrow=True).range == (-63, 63)
    assert QuantScheme(dtype="uint8", bits=7).range == (0, 127)
    assert QuantScheme(dtype="uint4").range == (0, 15)
    assert QuantScheme(dtype="int32").quantize(
        torch.tensor([2.0**31, -(2.0**31)]), torch.tensor(1.0), torch.tensor(0)
    ).tolist() == [2**31 - 1, -(2**31)]


def test_all_zeros_and_constants_have_a_scale() -> None:
    scheme = QuantScheme(dtype="uint8", symmetric=False)
    assert float(scheme.fake(torch.zeros(3)).abs().max()) == 0
    torch.testing.assert_close(scheme.fake(torch.full((3,), 7.0)), torch.full((3,), 7.0))
    torch.testing.assert_close(scheme.fake(torch.full((3,), -7.0)), torch.full((3,), -7.0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-38, 1e-36, 1e-31, 1e-20, 3e38])
def test_scales_are_normal_numbers(largest: float, symmetric: bool) -> None:
    """A processor may take anything smaller for zero, and then divide by it."""
    scheme = QuantScheme(symmetric=symmetric)
    scale, zero = scheme.qparams(torch.tensor(-largest / 2), torch.tensor(largest))
    assert torch.finfo(torch.float32).tiny <= float(scale) < float("inf")
    assert float(1 / scale) < float("inf")
    x = torch.tensor([largest, -largest / 3])
    error = (scheme.dequantize(scheme.quantize(x, scale, zero), scale, zero) - x).abs().max()
    assert float(error) <= 0.51 * float(scale)


def test_tiny_numbers_are_not_zero() -> None:
    x = torch.tensor([1e-35, -4e-36, 0.0])
    torch.testing.assert_close(QuantScheme(narrow=True).fake(x), x, rtol=0.02, atol=0)


def test_shapes_of_scales() -> None:
    x = torch.zeros(4, 6, 3)
    shapes_of = {
        ("tensor", None, 0): [],
        ("channel", 1, 0): [6],
        ("channel", -1, 0): [3],
        ("token", None, 0): [4, 6, 1],
        ("block", 1, 4): [4, 2, 3],
        ("block", 2, 3): [4, 6, 1],
    }
    for (granularity, axis, block), shape in shapes_of.items():
        scheme = QuantScheme(
            granularity=granularity,  # type: ignore[arg-type]  # one of a Literal
            axis=axis,
            block_size=block,
        )
        scale, zero = scheme.qparams_of(x)
        assert list(scale.shape) == list(zero.shape) == shape
        assert scheme.fake(x).shape == x.shape


@given(st.integers(1, 9), st.integers(1, 6), seeds())
def test_a_short_last_block_has_a_range_of_its_own(size: int, block: int, seed: int) -> None:
    x = normal((2, size), seed)
    blocks = to_blocks(x, 1, block)
    for number, part in enumerate(x.split(block, 1)):
        assert torch.equal(blocks[:, number].amax(1), part.amax(1))
        assert torch.equal(blocks[:, number].amin(1), part.amin(1))


def test_wholly_wrong_schemes_are_refused() -> None:
    for options, says in (
        ({"dtype": "int7"}, "none of int8"),
        ({"granularity": "row"}, "none of tensor"),
        ({"granularity": "channel"}, "with axis None"),
        ({"axis": 0}, "with axis 0"),
        ({"granularity": "block", "axis": 0}, "block size 0"),
        ({"block_size": 4}, "block size 4"),
        ({"dtype": "int4", "bits": 5}, "cannot use 5 bits"),
    ):
        with pytest.raises(ValueError, match=says):
            QuantScheme(**options)


def test_schemes_say_what_they_are() -> None:
    assert str(QuantScheme()) == "int8 per tensor, symmetric"
    assert str(QuantScheme(granularity="channel", axis=0, bits=7)) == (
        "int8 per channel (axis 0), symmetric, 7 bits used"
    )
    blocks = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=32, symmetric=False)
    assert str(blocks) == "uint4 per blocks of 32, asymmetric"


def test_storage_of_every_dtype() -> None:
    for name, (low, high, storage) in INTEGERS.items():
        scheme = QuantScheme(dtype=name)  # type: ignore[arg-type]  # one of a Literal
        assert scheme.storage == storage
        assert scheme.range == (low, high)
        assert scheme.signed == (low < 0)
        assert high - low == 2**scheme.storage_bits - 1


def test_dequantizing_does_not_wrap_around() -> None:
    q, zero = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor(255, dtype=torch.uint8)
    assert dequantize_linear(q, torch.tensor(1.0), zero).tolist() == [-255, 0]
    q8, zero8 = torch.tensor([-128], dtype=torch.int8), torch.tensor(127, dtype=torch.int8)
    assert dequantize_linear(q8, torch.tensor(1.0), zero8).tolist() == [-255]
