import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.verify_schemes import layout_problem
from planish.passes.sparsify.patterns import Pattern
from tests.passes.sparsify.problems import SEEDS


@pytest.mark.parametrize("text", ["2:4", "1:16", "4x4", "1x8", "unstructured"])
def test_a_pattern_is_read_as_it_is_written(text: str) -> None:
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "because"),
    [
        ("2/4", "is no pattern: a pattern is N:M"),
        ("", "is no pattern"),
        ("2:4 ", "is no pattern"),
        ("4:4", "leaves no weight out, or none in"),
        ("0:4", "leaves no weight out, or none in"),
        ("5:4", "leaves no weight out, or none in"),
        ("0x4", "has empty blocks"),
    ],
)
def test_what_is_no_pattern_is_refused(text: str, because: str) -> None:
    with pytest.raises(ValueError, match=because):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "sizes", "because"),
    [
        ("2:4", (3, 6, 1), "its reduction axis has 6 entries, no multiple of 4"),
        ("2:4", (3, 27, 9), "its reduction axis has 3 entries, no multiple of 4"),
        ("4x4", (6, 8, 1), "6 x 8 is no multiple of blocks of 4x4"),
        ("4x4", (8, 54, 9), "8 x 6 is no multiple of blocks of 4x4"),
    ],
)
def test_sizes_that_do_not_divide(text: str, sizes: tuple[int, int, int], because: str) -> None:
    assert Pattern.parse(text).problem(*sizes) == because


@pytest.mark.parametrize(("text", "sizes"), [("2:4", (3, 36, 9)), ("unstructured", (3, 5, 1))])
def test_sizes_that_do(text: str, sizes: tuple[int, int, int]) -> None:
    assert Pattern.parse(text).problem(*sizes) is None


def test_counts_are_whole_and_not_off_by_a_rounding() -> None:
    assert Pattern.parse("unstructured").zeros(1000, 0.9) == 900
    assert Pattern.parse("unstructured").zeros(10, 0.7) == 7
    assert Pattern.parse("4x4").zeros(160, 0.55) == 80
    assert Pattern.parse("1:4").zeros(64, 0.1) == 48


@given(SEEDS, st.sampled_from(["2:4", "1:8", "2x4", "unstructured"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_lowest_go_exactly_ties_or_not(seed: int, text: str, ties: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, 16, generator=made)
    if ties:
        scores = (scores * 3).round()
    pattern = Pattern.parse(text)
    zeros = pattern.zeros(scores.numel(), 0.4)
    kept = pattern.keep(scores, zeros)
    assert int((~kept).sum()) == zeros
    layout = pattern.layout(kept, 1)
    assert layout_problem(kept.float(), layout) is None
    assert layout.sparsity == pytest.approx(zeros / scores.numel())
    if text == "unstructured":
        assert scores[~kept].max() <= scores[kept].min()


def test_of_equal_scores_the_first_stay() -> None:
    assert Pattern.parse("2:4").keep(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]


def test_layouts_name_the_axis_of_the_weight() -> None:
    kept = Pattern.parse("2x4").keep(torch.rand(4, 8), 16)
    assert str(Pattern.parse("2:4").layout(kept, 0)) == "sparse<2:4, axis=0>"
    assert str(Pattern.parse("2x4").layout(kept, 1)) == "sparse<2 of 4 blocks 2x4>"
    assert str(Pattern.parse("2x4").layout(kept, 0)) == "sparse<2 of 4 blocks 4x2>"
    assert str(Pattern.parse("unstructured").layout(kept, 0)) == "sparse<16 of 32>"
