"""Fisher matrices: known answers, both ways of inverting, blocks, padding."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish.ir.errors import PassError
from planish.passes.sparsify.fisher import (
    DiagonalFisher,
    GradientMean,
    InverseFisher,
    at_once_is_cheaper,
    to_blocks,
)
from planish.passes.sparsify.obs import remove, single_scores

BOTH = pytest.mark.parametrize("at_once", [False, True])


def inverse(g: Tensor, block_size: int, damping: float, **options: Any) -> Tensor:
    """``F^-1`` of rows of gradients."""
    planned = options.pop("planned", len(g))
    fisher = InverseFisher(g.shape[1], block_size, planned, damping, **options)
    for row in g:
        fisher.add(row)
    return fisher.inverse()


def matrix(g: Tensor, damping: float, planned: int | None = None) -> Tensor:
    """F itself."""
    return damping * torch.eye(g.shape[1]).double() + g.t() @ g / (planned or len(g))


def gradients(count: int, numel: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, numel, generator=generator, dtype=torch.float64)


@BOTH
def test_one_gradient_of_two_entries(at_once: bool) -> None:
    found = inverse(torch.tensor([[1.0, 2.0]]).double(), 2, 1.0, at_once=at_once)
    known = torch.tensor([[[5.0, -2.0], [-2.0, 2.0]]]).double() / 6
    torch.testing.assert_close(found, known, rtol=0, atol=1e-15)


@BOTH
def test_two_gradients_across_each_other(at_once: bool) -> None:
    found = inverse(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), 2, 1.0, at_once=at_once)
    torch.testing.assert_close(found[0], torch.eye(2).double() / 2, rtol=0, atol=1e-15)


@BOTH
def test_it_is_the_inverse_to_the_last_digits(at_once: bool) -> None:
    g = gradients(7, 5)
    found = inverse(g, 5, 0.1, at_once=at_once)[0]
    torch.testing.assert_close(found, torch.linalg.inv(matrix(g, 0.1)), rtol=0, atol=1e-14)


@BOTH
def test_two_of_the_entries_as_in_the_textbook(at_once: bool) -> None:
    """H = [[2, 1], [1, 2]] is what these gradients give; pruning 0 leaves [0, 2.5]."""
    g = torch.tensor([[2.0**0.5, 2.0**0.5], [0.0, 0.0]]).double()
    found = inverse(g, 2, 1.0, at_once=at_once)[0]
    torch.testing.assert_close(
        torch.linalg.inv(found), torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    )
    w = torch.tensor([1.0, 2.0]).double()
    torch.testing.assert_close(single_scores(w, found), torch.tensor([0.75, 3.0]).double())
    after = remove(w, found, torch.tensor([True, False]))
    torch.testing.assert_close(after, torch.tensor([0.0, 2.5]).double())


@given(
    count=st.integers(1, 12),
    numel=st.integers(1, 17),
    size=st.integers(1, 9),
    damping=st.sampled_from([1e-3, 0.1, 2.0]),
    more=st.integers(0, 3),
    at_once=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_those_of_the_whole_matrix(
    count: int, numel: int, size: int, damping: float, more: int, at_once: bool
) -> None:
    g = gradients(count, numel, count * 100 + numel)
    found = inverse(g, size, damping, at_once=at_once, planned=count + more)
    width = min(size, numel)
    whole = matrix(g, damping, count + more)
    for number, block in enumerate(found):
        part = whole[number * width : (number + 1) * width, number * width : (number + 1) * width]
        short = len(part)
        known = torch.linalg.inv(part)
        torch.testing.assert_close(block[:short, :short], known, rtol=1e-9, atol=1e-9)
        # Behind the end nothing is known, and nothing touches what comes before it.
        assert not bool(block[:short, short:].any())
    assert len(found) == -(-numel // width)


@BOTH
def test_it_is_symmetric_bit_for_bit_and_the_same_again(at_once: bool) -> None:
    g = gradients(9, 20, 3).float()
    first, again = (inverse(g, 8, 1e-5, at_once=at_once) for _ in range(2))
    assert torch.equal(first, again)
    if not at_once:
        assert torch.equal(first, first.mT)
    torch.testing.assert_close(first, first.mT, rtol=1e-12, atol=1e-12)


def test_no_gradient_leaves_the_damping() -> None:
    for at_once in (False, True):
        fisher = InverseFisher(3, 2, 4, 0.5, at_once=at_once)
        assert torch.equal(fisher.inverse(), 2 * torch.eye(2).double().repeat(2, 1, 1))


def test_the_cheaper_form_is_taken() -> None:
    assert at_once_is_cheaper(8, 64)
    assert not at_once_is_cheaper(64, 64)
    assert InverseFisher(64, 64, 8, 1.0)._inverse is None
    assert InverseFisher(64, 64, 64, 1.0)._inverse is not None


def test_an_overflow_is_no_inverse() -> None:
    fisher = InverseFisher(2, 2, 1, 1e-5, at_once=False)
    fisher.add(torch.tensor([1e200, 1e200]).double())
    fisher.add(torch.tensor([1e200, -1e200]).double())
    with pytest.raises(PassError, match=r"not positive with a damping of 1e-05"):
        fisher.inverse()


def test_the_diagonal_and_the_mean_stream() -> None:
    g = gradients(6, 10).float()
    diagonal, mean = DiagonalFisher(10, 8, 0.25), GradientMean(10)
    for row in g:
        diagonal.add(row)
        mean.add(row)
    known = g.double().square().sum(0) / 8 + 0.25
    torch.testing.assert_close(diagonal.diagonal(), known)
    torch.testing.assert_close(mean.mean(), g.double().mean(0))


def test_blocks_are_filled_up_with_zeros() -> None:
    assert to_blocks(torch.arange(1, 6), 3).tolist() == [[1, 2, 3], [4, 5, 0]]
