import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.quantscheme import QuantScheme
from planish.ir.verify_schemes import layout_problem
from planish.passes.rounding.columns import inverse_factor, sweep
from planish.passes.rounding.round_weights import round_to_nearest
from planish.passes.sparsify.methods import LAYER_METHODS, Task
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sparsegpt import prune_and_round, sparsegpt
from tests.passes.sparsify.problems import SEEDS, damped, layer, loss

PATTERNS = ("2:4", "1:4", "4:8", "4x4", "2x4", "unstructured")
BLOCKS = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=16, symmetric=False)
CHANNELS = QuantScheme(dtype="int8", granularity="channel", axis=0, narrow=True)
NIBBLES = QuantScheme(dtype="int4", granularity="channel", axis=0, narrow=True)
PAIR = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def test_scores_are_conditional_on_the_columns_that_have_passed() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    scores = w**2 / inverse_factor(PAIR, 0.0).diagonal() ** 2
    assert scores.tolist() == pytest.approx([1.5, 8.0])
    done, kept, _ = sparsegpt(w[None].float(), PAIR, Pattern.parse("1:2"), 1, damping=0.0)
    assert kept.tolist() == [[False, True]]
    assert done[0].tolist() == pytest.approx([0.0, 2.5])


def test_of_a_correlated_group_the_best_pair_goes() -> None:
    h = torch.eye(4, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 0.9
    w = torch.tensor([[1.0, 1.0, 0.8, 0.9]])
    done, kept, _ = sparsegpt(w, h, Pattern.parse("2:4"), 2, damping=0.0)
    assert loss(done - w, h) == pytest.approx(0.415)
    assert bool((done[~kept] == 0).all())
    # Singly, the first two are cheapest, and the first can no longer make up for the second.
    alone, _, _ = sparsegpt(w, h, Pattern.parse("2:4"), 2, damping=0.0, together=False)
    assert loss(alone - w, h) > 0.415


@given(SEEDS, st.sampled_from(PATTERNS), st.sampled_from([0.25, 0.5, 0.75]))
@settings(max_examples=30, deadline=None)
def test_masks_are_exact(seed: int, text: str, ratio: float) -> None:
    rows, h = layer(8, 16, seed=seed)
    pattern = Pattern.parse(text)
    zeros = pattern.zeros(rows.numel(), ratio)
    done, kept, note = sparsegpt(rows, h, pattern, zeros)
    assert not note
    assert int((~kept).sum()) == zeros
    assert bool((done[~kept] == 0).all())
    assert layout_problem(done, pattern.layout(kept, 1)) is None


@pytest.mark.parametrize("text", [*PATTERNS, "3:6", "2:3"])
def test_many_batches_of_columns(text: str) -> None:
    rows, h = layer(8, 312, seed=1)
    h[:, 40:70], h[40:70] = 0, 0
    pattern = Pattern.parse(text)
    zeros = pattern.zeros(rows.numel(), 0.5)
    done, kept, _ = sparsegpt(rows, h, pattern, zeros)
    assert int((~kept).sum()) == zeros
    assert layout_problem(done, pattern.layout(kept, 1)) is None
    if text == "unstructured":
        assert not kept[:, 40:70].any()
    plain = torch.where(pattern.keep(rows.abs(), zeros), rows, 0)
    assert loss(done - rows, h) < 0.8 * loss(plain - rows, h)


def test_a_given_mask_is_written_as_downdates_from_left_to_right_write_it() -> None:
    rows, h = layer(4, 12, seed=2)
    pattern = Pattern.parse("unstructured")
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    done, kept, _ = sparsegpt(rows, h, pattern, 0, kept=mask)
    assert torch.equal(kept, mask)
    for row, keep, found in zip(rows.double(), mask, done, strict=True):
        w, inverse = row.clone(), damped(h).inverse()
        for i in range(12):
            if not keep[i]:
                w = w - inverse[:, i] * (w[i] / inverse[i, i])
            inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        torch.testing.assert_close(found, w.float() * keep, rtol=1e-4, atol=1e-5)


def test_errors_of_several_columns_are_repaired_at_once() -> None:
    rows, h = layer(3, 8, seed=6)
    factor = inverse_factor(h, 0.01)
    ahead = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    w = rows.double()

    def unchanged(column: torch.Tensor, _: int) -> torch.Tensor:
        return column

    done, found = sweep(
        w, factor, unchanged, batch=4, before=lambda _, i: ahead if i == 2 else None
    )
    torch.testing.assert_close(done, w - (factor[2:4].T @ ahead).T)
    assert found == pytest.approx(float(ahead.square().sum()) / 2)
    assert found == pytest.approx(loss(done - w, damped(h)))


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_sets_are_better_than_singles_on_the_whole(seed: int) -> None:
    losses = {True: 0.0, False: 0.0}
    for number in range(4):
        rows, h = layer(32, 32, seed=seed + number)
        for together in losses:
            done, _, _ = sparsegpt(rows, h, Pattern.parse("2:4"), 0, together=together)
            losses[together] += loss(done - rows, h)
    assert losses[True] < losses[False]


# Where H is nearly singular ----------------------------------------------------------------------


@pytest.mark.parametrize("refit", [0, 30])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("samples", [32, 48])
def test_without_damping_the_error_is_no_more_than_that_of_magnitude(
    samples: int, text: str, refit: int
) -> None:
    rows, h = layer(32, 64, samples)
    pattern = Pattern.parse(text)
    zeros = pattern.zeros(rows.numel(), 0.5)
    task = Task(rows, h, pattern, zeros, damping=0.0, refit=refit)
    found, plain = (LAYER_METHODS[s](task) for s in ("sparsegpt", "magnitude"))
    assert found.loss(task) <= plain.loss(task)
    assert "damping raised from 0 to 1e-06: H is singular" in found.note
    assert int((~found.kept).sum()) == zeros
    assert layout_problem(found.rows, pattern.layout(found.kept, 1)) is None
    assert torch.equal(found.kept, plain.kept) == ("magnitude's mask" in found.note)


def test_a_mask_worse_than_that_of_magnitude_is_named_and_not_taken() -> None:
    rows, h = layer(32, 64, 48)
    pattern = Pattern.parse("unstructured")
    task = Task(rows, h, pattern, 1024, damping=0.0)
    plain = LAYER_METHODS["magnitude"](task)
    swept, kept, _ = sparsegpt(rows, h, pattern, 1024, damping=0.0)
    assert loss(swept - rows, h) > 1.5 * plain.loss(task)
    found = LAYER_METHODS["sparsegpt"](task)
    assert found.note.endswith(
        f"magnitude's mask: that of the sweep left an error of {loss(swept - rows, h):.4g}, "
        f"magnitude {plain.loss(task):.4g}"
    )
    assert torch.equal(found.kept, plain.kept)
    assert not torch.equal(found.kept, kept)
    # With the default damping there is nothing to fall back from.
    assert not LAYER_METHODS["sparsegpt"](Task(rows, h, Pattern.parse("2:4"), 0)).note


# Rounding in the same sweep ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [BLOCKS, CHANNELS, NIBBLES])
@pytest.mark.parametrize("text", PATTERNS)
def test_pruned_and_rounded_zeros_are_exact(scheme: QuantScheme, text: str) -> None:
    rows, h = layer(8, 64, seed=1)
    pattern = Pattern.parse(text)
    zeros = pattern.zeros(rows.numel(), 0.5)
    codes, kept, note = prune_and_round(rows, h, pattern, zeros, scheme)
    assert not note
    assert int((~kept).sum()) == zeros
    real = codes.real()
    assert bool((real[~kept] == 0).all())
    low, high = scheme.range
    assert low <= int(codes.codes.min()) <= int(codes.codes.max()) <= high
    assert layout_problem(real, pattern.layout(kept, 1)) is None


@pytest.mark.parametrize("scheme", [BLOCKS, NIBBLES])
def test_one_sweep_is_better_than_rounding_what_was_pruned(scheme: QuantScheme) -> None:
    pattern, jointly, after = Pattern.parse("2:4"), 0.0, 0.0
    for seed in range(3):
        rows, h = layer(64, 256, seed=seed)
        codes, kept, _ = prune_and_round(rows, h, pattern, 0, scheme)
        jointly += loss(codes.real() - rows, h)
        pruned, _, _ = sparsegpt(rows, h, pattern, 0, kept=kept)
        real = round_to_nearest(pruned, scheme, search=True).real()
        after += loss(torch.where(kept, real, 0) - rows, h)
    assert jointly < after


def test_a_mask_may_be_given_for_rounding() -> None:
    rows, h = layer(8, 32, seed=3)
    pattern = Pattern.parse("2:4")
    mask = pattern.keep(rows.abs(), 0)
    codes, kept, _ = prune_and_round(rows, h, pattern, 0, BLOCKS, kept=mask)
    assert torch.equal(kept, mask)
    assert bool((codes.real()[~mask] == 0).all())
