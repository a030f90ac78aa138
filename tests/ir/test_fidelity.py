"""Sums over batches: as if all batches were one tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.compare import Accumulator, measure, worst
from planish.ir.errors import UsageError
from tests.support.strategies import normal

INF, NAN = math.inf, math.nan


def accumulated(*pairs: tuple[object, object]) -> Accumulator:
    found = Accumulator()
    for reference, value in pairs:
        found.add(reference, value)
    return found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_batches_of_any_size_count_as_one_tensor(sizes: list[int], seed: int) -> None:
    whole = normal((sum(sizes), 3), seed)
    noisy = whole + 0.1 * normal((sum(sizes), 3), seed + 1)
    pairs = zip(whole.split(sizes), noisy.split(sizes), strict=True)
    found, expected = accumulated(*pairs).fidelity(), measure((whole,), (noisy,))
    assert found.sqnr_db == pytest.approx(expected.sqnr_db)
    assert found.cosine == pytest.approx(expected.cosine)
    assert found.rel_l2 == pytest.approx(expected.rel_l2)
    assert found.max_abs == expected.max_abs


def test_sums_are_added_and_the_worst_batch_is_not_taken() -> None:
    # signal 9 + 16, noise 1 + 0: 20 log10(5 / 1), where the worse batch alone has 20 log10(3 / 1).
    one, two = torch.tensor([3.0]), torch.tensor([4.0])
    found = accumulated((one, one + 1), (two, two)).fidelity()
    assert found.sqnr_db == pytest.approx(20 * math.log10(5))
    assert measure((one,), (one + 1,)).sqnr_db == pytest.approx(20 * math.log10(3))


def test_batches_of_very_different_scale_are_brought_to_one() -> None:
    large = torch.tensor([1e200, 2e200], dtype=torch.float64)
    small = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = accumulated((small, small), (large, 1.5 * large), (small, 2 * small)).fidelity()
    assert found.rel_l2 == pytest.approx(0.5)
    assert found.sqnr_db == pytest.approx(20 * math.log10(2))


@pytest.mark.parametrize("order", [1, -1])
def test_scaled_sums_weigh_as_much_as_the_others(order: int) -> None:
    # Squares of the first are summed at another scale than those of the second.
    scaled = torch.tensor([3e100, 1e100], dtype=torch.float64)
    plain = torch.tensor([5e99, 9e99], dtype=torch.float64)
    wrong = torch.tensor([1.5, -2.0], dtype=torch.float64)
    pairs = [(scaled, scaled * wrong), (plain, plain * wrong)][::order]
    found = accumulated(*pairs).fidelity()
    b, a = (torch.cat(side) / 1e99 for side in zip(*pairs, strict=True))
    assert found.rel_l2 == pytest.approx(float((a - b).norm() / b.norm()))
    assert found.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()))
    assert found.max_abs == pytest.approx(3e100)


def test_each_part_is_measured_by_itself_and_the_worst_counts() -> None:
    big, small = 1000 * normal((4,), 0), normal((4,), 1)
    found = accumulated(((big, small), (big, 2 * small))).fidelity()
    assert found == worst([measure((big,), (big,)), measure((small,), (2 * small,))])
    assert found.rel_l2 == pytest.approx(1.0)


def test_one_broken_batch_breaks_all() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, NAN])
    found = accumulated((good, good), (good, bad), (good, good)).fidelity()
    assert (found.sqnr_db, found.max_abs, found.equal) == (-INF, INF, False)
    assert accumulated((bad, bad), (good, good)).fidelity().equal


def test_numbers_and_equal_values() -> None:
    assert accumulated((3, 3), (4, 4)).fidelity().equal
    assert accumulated((3, 4)).fidelity().max_abs == 1.0
    assert accumulated((None, None)).fidelity().equal


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ([], "there was no batch"),
        ([(torch.ones(2), torch.ones(3))], r"a value has shape \[3\]"),
        ([((torch.ones(2),), (torch.ones(2), 1))], "a value has 2 parts, and its reference 1"),
        ([(torch.ones(2), torch.ones(2)), ((1, 2), (1, 2))], "has 2 parts, and its reference 1"),
        ([((1, torch.ones(2)), (1, 2))], "part 1 of a value is a int where"),
    ],
)
def test_what_cannot_be_measured_is_an_error(pairs: list[tuple[object, object]], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        accumulated(*pairs).fidelity()


def test_integers_differ_by_what_they_differ() -> None:
    found = measure((torch.tensor([1, 2, 10]),), (torch.tensor([6, 2, 3]),))
    assert found.max_abs == 7.0
    assert found.rel_l2 == pytest.approx(math.sqrt((25 + 49) / 105))
    assert found.equal is False
    large = 2**53  # and one more are one number in float64
    found = measure((torch.tensor([large]),), (torch.tensor([large + 1]),))
    assert (found.max_abs, found.rel_l2) == (1.0, 1.0 / large)


def test_numbers_of_another_type_are_the_same_numbers() -> None:
    whole, real = torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])
    assert measure((real,), (whole,)).equal
    assert measure((whole,), (real,)).equal
    assert measure((whole,), (real + 0.5,)).max_abs == 0.5


def test_a_double_without_a_finite_number_is_equal_to_itself() -> None:
    odd = torch.tensor([INF, -INF, NAN], dtype=torch.float64)
    assert measure((odd,), (odd,)).equal
    assert measure((odd,), (-odd,)).equal is False


def test_a_value_without_parts_is_equal() -> None:
    found = accumulated(((), ()), ((), ())).fidelity()
    assert found.to_dict() == measure((), ()).to_dict()
    assert found.to_dict() == {
        "sqnr_db": None,
        "cosine": 1.0,
        "max_abs": 0.0,
        "rel_l2": 0.0,
        "equal": True,
    }


def test_a_sentence_has_all_metrics() -> None:
    one = torch.tensor([3.0, 4.0])
    assert str(measure((one,), (one,))) == "equal"
    assert str(measure((one,), (2 * one,))) == (
        "SQNR 0.0 dB, cosine 1.000000, max abs 4, relative L2 1"
    )
