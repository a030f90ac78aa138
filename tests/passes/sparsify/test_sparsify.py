import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.text import text
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.quantize.where import Where
from planish.passes.sparsify.methods import LAYER_METHODS
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import find_sites
from planish.passes.sparsify.sparsify import Sparsify
from tests.passes.rounding.nets import calibrated, small_lm, tensor
from tests.support.check import refuses, run_checked


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """Two linears; the second has a reduction axis of ``hidden``."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(8, hidden)
        self.two = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x).relu())
        return y


class Grouped(nn.Module):
    """A convolution of two groups, then one of 3 x 3 taps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.apart = nn.Conv2d(8, 12, 1, groups=2)
        self.taps = nn.Conv2d(12, 4, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.taps(self.apart(x).relu())
        return y


class Masked(nn.Module):
    """A linear over tokens, of which some are padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * mask.unsqueeze(-1)
        return y


def context_of(program: Program, batches: list[Any]) -> PassContext:
    return PassContext(calibration=spool(batches, program))


def chain(hidden: int = 8) -> tuple[Program, PassContext]:
    program = capture(
        Chain(hidden).eval(), (drawn(3, 8),), dynamic_shapes=({0: Dim("batch", max=512)},)
    )
    return program, context_of(program, [drawn(32, 8, seed=s) for s in range(3)])


AFTER = """
    program(%x: f32[3, 8])
      const @one.bias: f32[6]
      const @one.weight: f32[6, 8] sparse<2:4, axis=1>
      const @two.bias: f32[4]
      const @two.weight: f32[4, 6]
      %0: f32[3, 6] = aten.linear(%x, @one.weight, @one.bias)
      %1: f32[3, 6] = aten.relu(%0)
      %2: f32[3, 4] = aten.linear(%1, @two.weight, @two.bias)
      return %2
"""


# Fires -------------------------------------------------------------------------------------------


def test_a_weight_becomes_sparse_and_typed_and_its_neighbor_stays() -> None:
    program = capture(Chain(6).eval(), (drawn(3, 8),))
    result = refuses(
        program,
        (),
        Sparsify(score="magnitude"),
        "its reduction axis has 6 entries, no multiple of 4",
        changes=1,
    )
    assert text(result.program).strip() == textwrap.dedent(AFTER).strip()
    for name in ("one.bias", "two.bias", "two.weight"):
        assert torch.equal(tensor(result.program, name), tensor(program, name))
    weight = tensor(result.program, "one.weight")
    assert int((weight == 0).sum()) == 24
    assert torch.equal(weight[weight != 0], tensor(program, "one.weight")[weight != 0])


@pytest.mark.parametrize("score", sorted(LAYER_METHODS))
@pytest.mark.parametrize("pattern", ["2:4", "4x4", "unstructured"])
def test_every_score_and_pattern(score: Any, pattern: str) -> None:
    program, context = chain()
    result = run_checked(program, Sparsify(score=score, pattern=pattern), context)
    assert len(result.changes) == 2
    for name in ("one.weight", "two.weight"):
        assert int((tensor(result.program, name) == 0).sum()) == (
            tensor(program, name).numel() // 2
        )
    assert set(result.program.layouts) == {"one.weight", "two.weight"}


def test_the_default_is_sparsegpt_and_wants_calibration() -> None:
    program, _ = chain()
    assert Sparsify().score == "sparsegpt"
    with pytest.raises(RequirementError):
        Sparsify().run(program, PassContext())


def error(program: Program, changed: Program, x: Tensor) -> float:
    (before,), (after,) = run(program, (x,)), run(changed, (x,))
    return float((before - after).square().sum())


def test_second_order_methods_lose_less_on_other_inputs() -> None:
    torch.manual_seed(3)
    mix = torch.randn(8, 8) + torch.eye(8)
    program, _ = chain(32)
    batches = [drawn(64, 8, seed=s) @ mix for s in range(4)]
    found = {
        score: error(
            program,
            run_checked(program, Sparsify(score=score), context_of(program, batches)).program,
            drawn(256, 8, seed=99) @ mix,
        )
        for score in ("magnitude", "sparsegpt", "obc")
    }
    assert found["obc"] < found["magnitude"]
    assert found["sparsegpt"] < found["magnitude"]


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "obc"])
def test_convolutions_of_groups_and_taps(score: Any) -> None:
    program = capture(Grouped().eval(), (drawn(2, 8, 6, 6),))
    context = context_of(program, [drawn(2, 8, 6, 6, seed=s) for s in range(4)])
    result = run_checked(program, Sparsify(score=score), context)
    assert len(result.changes) == 2
    apart, taps = tensor(result.program, "apart.weight"), tensor(result.program, "taps.weight")
    # Of 4 consecutive channels two stay, under every tap.
    assert bool(((apart.reshape(12, 1, 4) != 0).sum(-1) <= 2).all())
    by_tap = taps.permute(0, 2, 3, 1).reshape(4, 9, 3, 4)
    assert bool(((by_tap != 0).sum(-1) <= 2).all())


@pytest.mark.parametrize("score", ["obc", "sparsegpt"])
def test_groups_of_a_convolution_are_pruned_by_their_own_inputs(score: Any) -> None:
    net = nn.Conv2d(8, 12, 1, groups=2, bias=False)
    halves = [nn.Conv2d(4, 6, 1, bias=False) for _ in range(2)]
    for half, part in zip(halves, net.weight.detach().chunk(2), strict=True):
        half.weight.data = part.clone()
    images = [drawn(2, 8, 5, 5, seed=s) for s in range(3)]
    program = capture(net.eval(), (images[0],))
    whole = run_checked(program, Sparsify(score=score), context_of(program, images)).program
    for number, half in enumerate(halves):
        own = [x[:, 4 * number : 4 * number + 4] for x in images]
        alone = capture(half.eval(), (own[0],))
        expected = run_checked(alone, Sparsify(score=score), context_of(alone, own)).program
        found = tensor(whole, "weight").chunk(2)[number]
        torch.testing.assert_close(found, tensor(expected, "weight"))


# In sequence -------------------------------------------------------------------------------------


def test_a_layer_reads_what_the_pruned_one_before_it_gives() -> None:
    program, context = chain(16)
    result = run_checked(program, Sparsify(score="obc"), context)
    head = run_checked(
        program, Sparsify(score="obc", where=Where(include=("one",))), context
    ).program
    tail = run_checked(head, Sparsify(score="obc", where=Where(include=("two",))), context).program
    stale = run_checked(
        program, Sparsify(score="obc", where=Where(include=("two",))), context
    ).program
    found = tensor(result.program, "two.weight")
    assert torch.equal(found, tensor(tail, "two.weight"))
    assert not torch.equal(found, tensor(stale, "two.weight"))


def test_padding_is_left_out_of_the_inputs() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    clean = [drawn(2, 4, 8, seed=s) * mask.unsqueeze(-1) for s in range(6)]
    noisy = [x + 50 * (1 - mask).unsqueeze(-1) * drawn(2, 4, 8, seed=77) for x in clean]
    program = capture(
        Masked().eval(),
        (clean[0], mask),
        dynamic_shapes=({0: Dim("batch", max=64)}, {0: Dim("batch", max=64)}),
    )

    def pruned(batches: list[Tensor], padding_mask: str) -> Tensor:
        context = context_of(program, [(x, mask) for x in batches])
        pass_ = Sparsify(score="sparsegpt", padding_mask=padding_mask)
        return tensor(run_checked(program, pass_, context).program, "layer.weight")

    torch.testing.assert_close(pruned(clean, "mask"), pruned(noisy, "mask"))
    assert not torch.allclose(pruned(clean, ""), pruned(noisy, ""))


def test_a_transposed_weight_is_sparse_along_its_first_axis() -> None:
    program = small_lm(tied=False)
    result = run_checked(program, Sparsify(), calibrated(program))
    assert {str(v) for k, v in result.program.layouts.items() if k == "conv1d"} == {
        "sparse<2:4, axis=0>"
    }


# Refuses, or fails, each with its reason ---------------------------------------------------------


def test_a_tied_table_is_taken_only_where_asked_for() -> None:
    program = small_lm()
    sites, refusals = find_sites(program, Pattern.parse("2:4"), Where())
    assert any("its rows are looked up as well" in r.reason for r in refusals)
    taken, _ = find_sites(program, Pattern.parse("2:4"), Where(), tied=True)
    assert {s.name for s in taken} - {s.name for s in sites} == {"head.weight"}
    result = run_checked(program, Sparsify(tied=True), calibrated(program))
    assert int((tensor(result.program, "head.weight") == 0).sum()) == 80 * 72 // 2


def test_what_is_sparse_already_is_left_alone() -> None:
    program, context = chain()
    once = run_checked(program, Sparsify(where=Where(include=("one",))), context).program
    twice = run_checked(once, Sparsify(), context)
    assert [r.reason for r in twice.refusals] == ["it is sparse<2:4, axis=1> already"]
    assert torch.equal(tensor(once, "one.weight"), tensor(twice.program, "one.weight"))
    with pytest.raises(PassError, match=r"no weight for 2:4: linear: it is sparse"):
        run_checked(twice.program, Sparsify(), context)


def test_nothing_to_prune_is_an_error() -> None:
    program = capture(nn.ReLU().eval(), (drawn(2, 4),))
    with pytest.raises(PassError, match="found no weight for 2:4"):
        Sparsify(score="magnitude").run(program, PassContext())


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (lambda: Sparsify(ratio=0.0), "ratio is 0.0, not between 0 and 1"),
        (lambda: Sparsify(ratio=1.0), "ratio is 1.0, not between 0 and 1"),
        (lambda: Sparsify(pattern="half"), "'half' is no pattern"),
    ],
)
def test_options_out_of_range(make: Callable[[], Sparsify], because: str) -> None:
    with pytest.raises(ValueError, match=because):
        make()


@pytest.mark.parametrize("score", ["magnitude", "sparsegpt"])
def test_a_weight_that_is_not_finite_is_refused(score: Any) -> None:
    net = Chain()
    net.two.weight.data[0, 0] = torch.inf  # NaN is refused by capture
    program = capture(net.eval(), (drawn(3, 8),))
    context = context_of(program, [drawn(3, 8, seed=1)])
    refuses(program, (), Sparsify(score=score), "finite", changes=1, context=context)


def test_inputs_that_are_not_finite_are_an_error() -> None:
    program = capture(Chain().eval(), (drawn(3, 8),))
    bad = drawn(3, 8)
    bad[0, 0] = torch.inf
    with pytest.raises(PassError, match="not all finite"):
        Sparsify().run(program, context_of(program, [bad]))


def test_few_samples_and_no_damping_are_noted_on_the_change() -> None:
    program = capture(Chain(16).eval(), (drawn(3, 8),))
    context = context_of(program, [drawn(3, 8, seed=5)])
    result = run_checked(program, Sparsify(damping=0.0), context)
    assert all("damping raised from 0" in change.detail for change in result.changes)
    plain = run_checked(program, Sparsify(), context)
    assert not any("damping" in change.detail for change in plain.changes)


def test_dead_inputs_are_noted_on_the_change() -> None:
    program = capture(Chain().eval(), (drawn(3, 8),))
    x = drawn(64, 8, seed=6)
    x[:, 3] = 0
    result = run_checked(
        capture(Chain().eval(), (x,)), Sparsify(), context_of(capture(Chain().eval(), (x,)), [x])
    )
    assert "1 of 8 inputs are always zero" in result.changes[0].detail
    assert not tensor(result.program, "one.weight")[:, 3].any()
    assert tensor(program, "one.weight")[:, 3].any()
    fresh = capture(Chain().eval(), (x,))
    result = run_checked(fresh, Sparsify(score="wanda"), context_of(fresh, [x]))
    assert "1 of 8 inputs are always zero" in result.changes[0].detail
