"""The histogram: no value is lost, and neither order nor pieces matter."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.passes.observe.histogram import BINS, Histogram, Workspace

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
STREAMS = st.lists(FLOATS, min_size=1, max_size=60)


def counted(*pieces: Tensor, bins: int = BINS) -> Histogram:
    histogram = Histogram(bins)
    workspace = Workspace()
    for piece in pieces:
        histogram.add(piece, workspace, (piece.min().item(), piece.max().item()))
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    return (
        one.exponent == other.exponent
        and torch.equal(one.counts, other.counts)
        and (one.low, one.high) == (other.low, other.high)
    )


@given(STREAMS, st.sampled_from([2, 4, 16, BINS]), st.integers(0, 60))
def test_any_split_and_order_gives_the_same_histogram(
    values: list[float], bins: int, cut: int
) -> None:
    whole = torch.tensor(values)
    pieces = [p for p in (whole[cut:].flip(0), whole[:cut]) if len(p)]
    assert same(counted(whole, bins=bins), counted(*pieces, bins=bins))


@given(STREAMS, STREAMS, st.sampled_from([2, 16, BINS]))
def test_merging_is_counting_both(one: list[float], other: list[float], bins: int) -> None:
    first, second = torch.tensor(one), torch.tensor(other)
    merged = counted(first, bins=bins)
    merged.merge(counted(second, bins=bins))
    assert same(merged, counted(first, second, bins=bins))
    assert merged.total == len(one) + len(other)


@given(STREAMS, st.sampled_from([2, 16, 256]))
def test_every_value_lies_in_the_bin_that_counts_it(values: list[float], bins: int) -> None:
    histogram = counted(*torch.tensor(values).split(7), bins=bins)
    edges, counts = histogram.filled()
    expected = [sum(low <= v < high for v in values) for low, high in itertools.pairwise(edges)]
    assert counts.tolist() == expected
    assert sum(expected) == len(values)
    assert 0.0 in edges.tolist()


@given(STREAMS)
def test_at_least_half_of_the_bins_are_in_use(values: list[float]) -> None:
    histogram = counted(torch.tensor(values))
    span = max(*values, 0.0) - min(*values, 0.0)
    assert span <= BINS * histogram.width
    if span > BINS * 2.0**-100:
        assert span > (BINS // 2 - 1) * histogram.width


@given(STREAMS, st.floats(0, 1))
def test_a_quantile_is_within_a_bin_of_the_sorted_value(values: list[float], share: float) -> None:
    histogram = counted(torch.tensor(values))
    ordered = sorted(values)
    at = share * len(values)
    below = ordered[max(math.ceil(at) - 1, 0)]
    above = ordered[min(math.floor(at), len(values) - 1)]
    value = histogram.quantile(share)
    assert below - histogram.width <= value <= above + histogram.width
    assert ordered[0] <= value <= ordered[-1]


@given(STREAMS)
def test_absolute_counts_each_value_once(values: list[float]) -> None:
    histogram = counted(torch.tensor(values))
    folded = histogram.absolute()
    assert folded.total == histogram.total
    assert folded.high == max(abs(v) for v in values)
    assert not folded.counts[:BINS].any()


def test_known_bins() -> None:
    # Eight bins for 0 to 7: each one wide; 8 needs bins of 2.
    histogram = counted(torch.tensor([0.0, 1.0, 1.5, 7.0]), bins=8)
    assert histogram.width == 1.0
    assert histogram.filled()[1].tolist() == [1, 2, 0, 0, 0, 0, 0, 1]
    histogram.add(torch.tensor([8.0]), Workspace(), (8.0, 8.0))
    assert histogram.width == 2.0
    assert histogram.filled()[1].tolist() == [3, 0, 0, 1, 1]


def test_negative_values_round_down_when_pairs_merge() -> None:
    histogram = counted(torch.tensor([-0.5, -1.5, 0.0]), bins=8)
    assert histogram.width == 0.25
    histogram.add(torch.tensor([-3.0]), Workspace(), (-3.0, -3.0))
    assert histogram.width == 0.5
    edges, counts = histogram.filled()
    assert edges.tolist() == [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5]
    assert counts.tolist() == [1, 0, 0, 1, 0, 1, 1]


def test_zeros_alone_and_tiny_values() -> None:
    assert counted(torch.zeros(5)).total == 5
    tiny = counted(torch.tensor([0.0, 1e-38]))
    assert tiny.total == 2
    assert tiny.high == torch.tensor(1e-38).item()


def test_a_jump_over_many_powers_of_two_keeps_all() -> None:
    histogram = counted(torch.tensor([1e-30, -1e-30]), torch.tensor([3e38]))
    edges, counts = histogram.filled()
    assert int(counts.sum()) == 3
    # What is tiny and negative stays below zero.
    assert counts[: int((edges == 0).nonzero())].tolist() == [1]


def test_wrong_numbers_of_bins_are_refused() -> None:
    for bins in (0, 3, 8194):
        with pytest.raises(ValueError, match=f"{bins} bins"):
            Histogram(bins)
    with pytest.raises(ValueError, match="do not merge"):
        Histogram(4).merge(Histogram(8))
    with pytest.raises(ValueError, match="no quantile"):
        Histogram(4).quantile(0.5)
