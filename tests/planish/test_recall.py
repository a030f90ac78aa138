"""Recall balance: known answers, invariances, and what is refused."""

import json

import pytest
import torch
from torch import Tensor

from planish.ir.errors import UsageError
from planish.recall import recall_report


def answers(*recalls: float, each: int = 20) -> tuple[Tensor, Tensor]:
    """Labels, and answers of a model with these recalls; wrong ones are all class 99."""
    labels = torch.arange(len(recalls)).repeat_interleave(each)
    right = torch.cat([torch.arange(each) < round(r * each) for r in recalls])
    return labels, torch.where(right, labels, 99)


def test_balances_that_are_stretched_have_the_ratio_of_the_paper() -> None:
    labels, before = answers(0.9, 0.8, 0.7)
    _, after = answers(0.85, 0.70, 0.55)
    report = recall_report(labels, before, after)
    assert report.ratio_unnormalized == pytest.approx(1.5)
    assert report.ratio == pytest.approx(1.7143, abs=1e-4)
    assert (report.accuracy_before, report.accuracy_after) == pytest.approx((0.8, 0.7))
    assert [c.label for c in report.classes] == [2, 1, 0]  # the greatest loss first
    assert report.classes[0].balance_after == pytest.approx(0.55 / 0.7 - 1)


def test_a_model_against_itself_has_ratio_one_in_every_draw() -> None:
    labels, before = answers(0.9, 0.8, 0.7)
    report = recall_report(labels, before, before, bootstrap=50)
    assert report.ratio == pytest.approx(1)
    assert report.interval == pytest.approx((1, 1))


def test_equal_recalls_after_have_ratio_zero() -> None:
    labels, before = answers(0.9, 0.8, 0.7)
    _, after = answers(0.6, 0.6, 0.6)
    assert recall_report(labels, before, after).ratio == pytest.approx(0, abs=1e-12)


def test_the_interval_holds_the_ratio_widens_with_fewer_samples_and_follows_the_seed() -> None:
    def report(each: int, seed: int = 0) -> tuple[float, float]:
        labels, before = answers(0.9, 0.8, 0.5, each=each)
        _, after = answers(0.8, 0.7, 0.3, each=each)
        found = recall_report(labels, before, after, bootstrap=200, seed=seed)
        assert found.interval is not None
        assert found.ratio is not None
        assert found.interval[0] < found.ratio < found.interval[1]
        return found.interval

    few, many = report(20), report(600)
    assert few[1] - few[0] > 2 * (many[1] - many[0])
    assert report(20) == few != report(20, seed=1)


def test_scores_count_as_the_class_of_the_highest_and_unused_labels_do_not_matter() -> None:
    labels = torch.tensor([3, 3, 7, 7])
    scores = torch.eye(8)[torch.tensor([3, 3, 7, 0])]
    report = recall_report(labels.tolist(), scores, scores)
    assert [(c.label, c.samples, c.before) for c in report.classes] == [(3, 2, 1.0), (7, 2, 0.5)]


def test_nothing_to_compare_with_is_said_not_divided_by() -> None:
    labels, flat = answers(0.5, 0.5)
    report = recall_report(labels, flat, flat)
    assert report.ratio is None
    assert report.interval is None
    assert "no intensification ratio" in str(report)
    never = torch.full_like(labels, 99)
    assert recall_report(labels, never, flat).ratio is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_few_samples_are_remarked() -> None:
    labels, before = answers(0.9, 0.6)
    assert "only 20 samples" in recall_report(labels, before, before, bootstrap=5).remarks[0]


@pytest.mark.parametrize(
    ("labels", "before", "message"),
    [
        ([0, 1], [0], "2 labels, but 1 answers in before"),
        ([], [], "no sample"),
        ([0.5], [0], "labels is torch.float32"),
        (["cat"], [0], "labels cannot be read as numbers"),
        ([0], torch.full((1, 3), torch.nan), "before holds scores that are NaN"),
        ([0], torch.zeros(1, 2, 3), r"before is torch.float32 of shape \[1, 2, 3\]"),
    ],
)
def test_what_is_no_evaluation_is_refused(labels: list[int], before: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recall_report(labels, before, before)
