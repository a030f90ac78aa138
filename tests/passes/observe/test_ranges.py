"""Ranges: known answers, and what each method promises on any histogram."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import calibrate
from torch import Tensor

from planish.ir.quantscheme import QuantScheme
from planish.passes.observe.histogram import Histogram, Workspace
from planish.passes.observe.range_average import average
from planish.passes.observe.range_entropy import divergence, entropy
from planish.passes.observe.range_minmax import minmax
from planish.passes.observe.range_mse import mse, squared_error
from planish.passes.observe.range_percentile import percentile
from planish.passes.observe.range_token import SHARES, candidates, token
from planish.passes.observe.sketch import Sketch
from tests.support.strategies import seeds

UINT8 = QuantScheme(dtype="uint8", symmetric=False)
INT8 = QuantScheme(dtype="int8")
INT4 = QuantScheme(dtype="int4")
UINT4 = QuantScheme(dtype="uint4", symmetric=False)
SCHEMES = st.sampled_from([UINT8, INT8, INT4, UINT4])


def sketched(*pieces: Tensor) -> Sketch:
    sketch, workspace = Sketch(), Workspace()
    for piece in pieces:
        assert sketch.add(piece, workspace)
    sketch.flush(workspace)
    return sketch


def histogram_of(x: Tensor) -> Histogram:
    return sketched(x.reshape(1, -1)).histogram


@st.composite
def values(draw: st.DrawFn) -> Tensor:
    """Samples of several shapes of distribution, with outliers or without."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    x = torch.randn(draw(st.integers(1, 3000)), generator=generator)
    x = draw(st.sampled_from([lambda x: x, torch.relu, lambda x: x**3, lambda x: x - 2]))(x)
    x[0] *= draw(st.sampled_from([1.0, 30.0, 1000.0]))
    return x * 10.0 ** draw(st.integers(-3, 3))


# -- minmax and average ---------------------------------------------------------------------------


def test_minmax_is_exact() -> None:
    assert minmax(histogram_of(torch.tensor([0.1, -0.3, 7.7]))) == (
        torch.tensor(-0.3).item(),
        torch.tensor(7.7).item(),
    )


def test_average_is_over_samples_whatever_the_batches() -> None:
    x = torch.tensor([[0.0, 4.0], [-2.0, 2.0], [-1.0, 0.0]])
    assert average(sketched(x)) == (-1.0, 2.0)
    assert average(sketched(x[:1], x[1:])) == (-1.0, 2.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_zeros_are_counted_in_samples_that_zero_bounds(sign: int) -> None:
    x = sign * torch.tensor([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, -1.0, 1.0], [3.0, 4.0, 5.0]])
    assert sketched(x).histogram.zeros == 4
    assert sketched(x[2:], x[:2]).histogram.zeros == 4
    assert sketched(torch.zeros(2, 4)).histogram.zeros == 8


# -- percentile -----------------------------------------------------------------------------------


def test_percentile_of_the_numbers_to_1000() -> None:
    x = torch.arange(0, 1000) / 1000
    low, high = percentile(histogram_of(x), UINT8, 0.98)
    assert low == pytest.approx(0.01, abs=0.002)
    assert high == pytest.approx(0.99, abs=0.002)
    assert percentile(histogram_of(-x), INT8, 0.9) == pytest.approx((-0.9, 0.9), abs=0.002)


@given(values(), SCHEMES)
def test_percentile_of_all_is_minmax(x: Tensor, scheme: QuantScheme) -> None:
    low, high = percentile(histogram_of(x), scheme, 1.0)
    if scheme.symmetric:
        assert high == -low == x.abs().max().item()
    else:
        assert (low, high) == (x.min().item(), x.max().item())


# -- mse ------------------------------------------------------------------------------------------


def brute_force(histogram: Histogram, scheme: QuantScheme, low: float, high: float) -> float:
    """The error by sampling every bin densely."""
    edges, counts = histogram.spread()
    inside = (torch.arange(500, dtype=torch.float64) + 0.5) / 500 * histogram.width
    points = edges[:-1, None] + inside
    scale, zero = scheme.qparams(torch.tensor(low), torch.tensor(high))
    s, z = scale.double(), zero.double()
    codes = (points / s).round().add(z).clamp(*scheme.range)
    errors = ((codes - z) * s - points).square().mean(1)
    return float((errors * counts).sum() / histogram.total)


@settings(max_examples=30)
@given(values(), SCHEMES, st.floats(0.05, 1.2), st.floats(0.05, 1.2))
def test_the_error_integral_is_that_of_sampling(
    x: Tensor, scheme: QuantScheme, down: float, up: float
) -> None:
    histogram = histogram_of(x)
    low, high = min(histogram.low, 0.0) * down, max(histogram.high, 0.0) * up
    found = squared_error(
        histogram,
        scheme,
        torch.tensor([low], dtype=torch.float64),
        torch.tensor([high], dtype=torch.float64),
    )
    assert found.item() == pytest.approx(brute_force(histogram, scheme, low, high), rel=1e-3)


@settings(max_examples=30)
@given(values(), SCHEMES)
def test_mse_is_never_worse_than_minmax(x: Tensor, scheme: QuantScheme) -> None:
    histogram = histogram_of(x)
    chosen, widest = mse(histogram, scheme), minmax(histogram)
    low, high = torch.tensor([chosen, widest], dtype=torch.float64).T
    best, other = squared_error(histogram, scheme, low, high).tolist()
    assert best <= other * (1 + 1e-9)
    assert min(histogram.low, 0) <= chosen[0] <= 0 <= chosen[1] <= max(histogram.high, 0)


def test_mse_keeps_the_range_of_integers_that_fit() -> None:
    x = torch.arange(0, 256).to(torch.float32).repeat(10)
    low, high = mse(histogram_of(x), UINT8)
    assert low == 0.0
    assert high == pytest.approx(255, rel=1e-2)
    scale, zero = UINT8.qparams(torch.tensor(low), torch.tensor(high))
    back = UINT8.dequantize(UINT8.quantize(x, scale, zero), scale, zero)
    assert (back - x).abs().max() < 1.5


def test_mse_clips_the_outlier_that_costs_more_than_it_is_worth() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 50.0
    low, high = mse(histogram_of(x), UINT4)
    assert high < 10
    kept = x.clamp(low, high)
    step = (high - low) / 15
    assert (x - kept).square().mean() + step**2 / 12 < (50 + 4) ** 2 / 15**2 / 12


def test_four_bits_of_a_gaussian_clip_near_the_known_optimum() -> None:
    # Uniform 16-level quantizer of N(0, 1): step 0.335 (Max, IRE Transactions 1960, table II).
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    low, high = mse(histogram_of(x), UINT4)
    assert (high - low) / 15 == pytest.approx(0.335, rel=0.05)


# -- entropy --------------------------------------------------------------------------------------


def naive_divergence(counts: list[float], end: int, levels: int) -> float:
    """As the slides write it, loop by loop."""
    kept = counts[:end]
    p = list(kept)
    p[-1] += sum(counts[end:])
    q = [0.0] * end
    for level in range(levels):
        first, last = level * end // levels, (level + 1) * end // levels
        holding = [i for i in range(first, last) if kept[i] > 0]
        for i in holding:
            q[i] = sum(kept[first:last]) / len(holding)
    total = 0.0
    for i in range(end):
        if p[i] > 0:
            share = p[i] / sum(p)
            total += share * np.log(share / max(q[i] / sum(q), 1e-4 / end))
    return total


@settings(max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=8, max_size=60), st.integers(2, 8), st.data())
def test_divergence_is_that_of_the_definition(
    counts: list[int], levels: int, data: st.DataObject
) -> None:
    end = data.draw(st.integers(levels, len(counts)))
    if not sum(counts[:end]):
        counts[0] = 1
    (found,) = divergence(np.array(counts, dtype=np.float64), np.array([end]), levels)
    assert found == pytest.approx(naive_divergence([float(c) for c in counts], end, levels))


def test_integers_that_fit_diverge_in_nothing() -> None:
    counts = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    assert divergence(counts, np.array([8]), 8)[0] == pytest.approx(0.0)
    assert divergence(counts, np.array([8]), 4)[0] > 0
    assert divergence(np.array([0.0, 0, 3]), np.array([2]), 2)[0] == np.inf


def test_entropy_keeps_a_uniform_and_clips_a_long_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=generator)
    assert entropy(histogram_of(uniform), UINT8) == pytest.approx((0.0, 1.0), abs=0.02)
    heavy = torch.randn(200_000, generator=generator)
    heavy[:3] = torch.tensor([100.0, -90.0, 80.0])
    low, high = entropy(histogram_of(heavy), INT8)
    assert 2 < high == -low < 20
    low, high = entropy(histogram_of(heavy), UINT8)
    assert -20 < low < -2
    assert 2 < high < 20


def test_entropy_does_not_see_the_zeros_behind_a_relu() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    positive = x[x > 0]
    with_zeros = torch.cat([positive, torch.zeros(900_000)])
    assert entropy(histogram_of(with_zeros), UINT8) == entropy(
        histogram_of(torch.cat([positive, torch.zeros(1)])), UINT8
    )


@pytest.mark.parametrize("tails", [1.0, 3.0])
def test_entropy_agrees_with_onnxruntime_on_a_gaussian(tails: float) -> None:
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    x = torch.where(x.abs() > 2.5, x * tails, x)
    limit = x.abs().max().item()
    hist, edges = np.histogram(x.numpy(), bins=1024, range=(-limit, limit))
    collector = calibrate.HistogramCollector("entropy", True, 1024, 128, 99.9, "same")
    theirs = collector.get_entropy_threshold((hist, edges, -limit, limit, limit), 128)
    _, ours = entropy(histogram_of(x), QuantScheme(dtype="int8", bits=7))
    # Their bins are wider, and they merge what does not divide evenly into the last integer.
    assert ours == pytest.approx(float(theirs[1]), rel=0.1)


@given(values(), SCHEMES)
@settings(max_examples=30)
def test_entropy_lies_within_what_was_seen(x: Tensor, scheme: QuantScheme) -> None:
    low, high = entropy(histogram_of(x), scheme)
    if scheme.symmetric:
        assert 0 <= high == -low <= x.abs().max().item()
    else:
        assert min(x.min().item(), 0) <= low <= 0 <= high <= max(x.max().item(), 0)


# -- token ----------------------------------------------------------------------------------------


def test_token_clips_between_tokens_not_between_elements() -> None:
    # 1000 tokens of 64 elements up to 1, and one separator token that is 100 all over.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1000, 64, generator=generator)
    x[0, 500] = 100.0
    sketch = sketched(x)
    clips = candidates(sketch.minima, sketch.maxima)
    assert clips[0][1] == 100.0
    assert clips[-1][1] == pytest.approx(1.0, abs=0.15)
    losses = {clip: abs(clip[1] - 1.0) for clip in clips}
    found = token(
        sketch.histogram, sketch.minima, sketch.maxima, UINT8, lambda low, high: losses[low, high]
    )
    assert losses[found] == min(losses.values())


@given(values(), SCHEMES)
@settings(max_examples=30)
def test_token_is_its_best_candidate_and_no_better_than_mse(x: Tensor, scheme: QuantScheme) -> None:
    sketch = sketched(x.unsqueeze(0))
    found = token(sketch.histogram, sketch.minima, sketch.maxima, scheme)
    clips = candidates(sketch.minima, sketch.maxima)
    low, high = torch.tensor(clips, dtype=torch.float64).T
    errors = squared_error(sketch.histogram, scheme, low, high)
    assert 1 <= len(clips) <= len(SHARES)
    assert errors[clips.index(found)] == errors.min()


# -- streams --------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(values(), st.integers(1, 5), st.integers(1, 5), SCHEMES)
def test_ranges_do_not_depend_on_how_samples_were_batched(
    x: Tensor, one: int, other: int, scheme: QuantScheme
) -> None:
    x = x[: len(x) // 6 * 6].reshape(6, -1) if len(x) >= 6 else x.new_ones(6, 3)
    a, b = sketched(*x.split(one)), sketched(*x.split(other))
    assert average(a) == pytest.approx(average(b), rel=1e-12)
    for method in (percentile, entropy, mse):
        assert method(a.histogram, scheme) == method(b.histogram, scheme)
    assert a.histogram.zeros == b.histogram.zeros
    assert token(a.histogram, a.minima, a.maxima, scheme) == token(
        b.histogram, b.minima, b.maxima, scheme
    )
