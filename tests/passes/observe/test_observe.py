"""One sweep over a program: what it sees, leaves out, says and refuses."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError, UsageError
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.passes.calibrate import spool
from planish.passes.observe import Statistics, observe
from planish.passes.observe.statistics import RangeMethod

UINT8 = QuantScheme(dtype="uint8", symmetric=False)
METHODS: tuple[RangeMethod, ...] = ("minmax", "average", "percentile", "entropy", "mse", "token")


class Masked(nn.Module):
    """A linear over tokens, and its pooled result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.relu(self.linear(x)).mean(1) + 0 * mask.sum()


def masked_program() -> tuple[Masked, Program]:
    dims = {0: Dim("batch", max=64), 1: Dim("tokens", min=2, max=64)}
    module = Masked().eval()
    example = (torch.randn(2, 3, 4), torch.ones(2, 3))
    return module, capture(module, example, dynamic_shapes=(dims, dims))


def plain_program(function: Callable[[Tensor], Tensor], *shape: int) -> Program:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return capture(
        Plain().eval(), (torch.rand(shape) + 1,), dynamic_shapes=({0: Dim("batch", max=64)},)
    )


def data(samples: int, tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(samples, tokens, generator=generator) > 0.4
    mask[:, 0] = True
    x = torch.randn(samples, tokens, 4, generator=generator)
    # Padding is loud, so that any of it would show.
    return torch.where(mask.unsqueeze(-1), x, 1e3), mask.float()


def all_ranges(statistics: Statistics) -> dict[tuple[str, str], tuple[float, float]]:
    schemes = (UINT8, QuantScheme())
    return {
        (name, f"{method} {scheme}"): statistics.range(name, method, scheme)
        for name in statistics
        for method in METHODS
        for scheme in schemes
    }


def test_padding_is_left_out() -> None:
    module, program = masked_program()
    x, mask = data(5)
    with spool([(x, mask)], program) as batches:
        statistics = observe(
            program, ["x", "linear", "relu"], batches, padding_mask="mask", per_channel=["linear"]
        )
    tokens = x[mask.bool()]
    out = module.linear(tokens).detach()
    assert statistics.remarks == ()
    assert statistics.samples == 5
    assert statistics.range("x", "minmax", UINT8) == (tokens.min().item(), tokens.max().item())
    assert statistics.sketch("linear").histogram.total == out.numel()
    channels = statistics.channel("linear")
    torch.testing.assert_close(channels.min, out.amin(0))
    torch.testing.assert_close(channels.max, out.amax(0))
    torch.testing.assert_close(channels.absmax, out.abs().amax(0))
    torch.testing.assert_close(channels.mean, out.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        channels.mean_square, out.double().square().mean(0), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(channels.mean_abs, out.double().abs().mean(0), rtol=1e-5, atol=1e-6)
    assert channels.count == len(tokens)


def test_without_the_mask_padding_is_seen() -> None:
    _, program = masked_program()
    with spool([data(5)], program) as batches:
        assert observe(program, ["x"], batches).range("x", "minmax", UINT8)[1] == 1e3


def test_what_cannot_be_masked_is_said() -> None:
    _, program = masked_program()
    with spool([data(5)], program) as batches:
        statistics = observe(program, ["mean", "linear"], batches, padding_mask="mask")
    (remark,) = statistics.remarks
    assert remark.startswith("padding is part of the statistics of mean: ")


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_batches_do_not_matter(one: int, other: int, with_mask: bool) -> None:
    _, program = masked_program()
    x, mask = data(6)
    name = "mask" if with_mask else None
    found = []
    for size in (one, other):
        with spool(zip(x.split(size), mask.split(size), strict=True), program) as batches:
            statistics = observe(program, ["x", "linear", "relu"], batches, padding_mask=name)
            found.append(all_ranges(statistics))
    first, second = found
    assert first.keys() == second.keys()
    for key, value in first.items():
        # Only the program's own arithmetic may depend on the batch.
        assert value == pytest.approx(second[key], rel=1e-5, abs=1e-6), key


def test_the_input_alone_is_the_same_to_the_last_bit() -> None:
    _, program = masked_program()
    x, mask = data(6)
    found = []
    for size in (1, 2, 4, 6):
        with spool(zip(x.split(size), mask.split(size), strict=True), program) as batches:
            found.append(all_ranges(observe(program, ["x"], batches, padding_mask="mask")))
    assert all(ranges == found[0] for ranges in found)


def test_channels_along_another_axis() -> None:
    program = plain_program(lambda x: x * 2, 2, 3, 4)
    x = torch.randn(5, 3, 4)
    with spool([x[:2], x[2:]], program) as batches:
        statistics = observe(program, [], batches, per_channel=[("mul", 1), "mul", ("mul", -2)])
    torch.testing.assert_close(statistics.channel("mul", 1).max, (2 * x).amax((0, 2)))
    torch.testing.assert_close(statistics.channel("mul", -2).min, (2 * x).amin((0, 2)))
    torch.testing.assert_close(statistics.channel("mul").max, (2 * x).amax((0, 1)))
    assert statistics.channel("mul", 1).count == 20
    with pytest.raises(UsageError, match="axis 0"):
        statistics.channel("mul", 0)


def test_progress_is_told() -> None:
    _, program = masked_program()
    x, mask = data(6)
    told: list[tuple[int, int]] = []
    with spool(zip(x.split(2), mask.split(2), strict=True), program) as batches:
        observe(program, ["x"], batches, tell=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_integers_and_half_precision_are_read_as_numbers() -> None:
    program = plain_program(lambda x: x.to(torch.float16) * 2, 2, 3)
    with spool([torch.tensor([[1.0, 2.0, 3.0]])], program) as batches:
        assert observe(program, ["mul"], batches).range("mul", "minmax", UINT8) == (2.0, 6.0)

    class Index(nn.Module):
        def forward(self, i: Tensor) -> Tensor:
            return i + 1

    index = capture(Index().eval(), (torch.tensor([1, 2, 3]),))
    with spool([torch.tensor([4, 5, 9])], index) as batches:
        assert observe(index, ["i"], batches).range("i", "minmax", UINT8) == (4.0, 9.0)


def test_a_value_without_an_axis_of_samples() -> None:
    program = plain_program(lambda x: x.sum() + x.mean(0), 2, 3)
    with spool([torch.ones(4, 3), 3 * torch.ones(4, 3)], program) as batches:
        statistics = observe(program, ["sum_1", "mean"], batches)
    assert statistics.range("sum_1", "minmax", UINT8) == (12.0, 36.0)
    assert statistics.range("mean", "average", UINT8) == (2.0, 2.0)


# -- errors ---------------------------------------------------------------------------------------


def test_no_calibration_is_an_error() -> None:
    _, program = masked_program()
    with pytest.raises(RequirementError, match="there are none") as caught:
        observe(program, ["linear"], None)
    assert "calibration=" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_names_the_operator_the_line_and_the_batch(bad: float) -> None:
    _module, program = masked_program()
    x, mask = data(4)
    spoiled = x.clone()
    spoiled[1, 0, 2] = bad
    with (
        spool([(x, mask), (spoiled, mask)], program) as batches,
        pytest.raises(
            PassError, match="calibration batch 1 makes linear NaN or infinite"
        ) as caught,
    ):
        observe(program, ["linear"], batches, padding_mask="mask")
    assert "self.linear(x)" in str(caught.value)
    # In padding it does not matter.
    spoiled = x.clone()
    spoiled[1][~mask[1].bool()] = bad
    with spool([(spoiled, mask)], program) as batches:
        observe(program, ["linear"], batches, padding_mask="mask")


def test_a_value_of_padding_only_was_never_reached() -> None:
    _, program = masked_program()
    x, mask = data(4)
    with (
        spool([(x, 0 * mask)], program) as batches,
        pytest.raises(RequirementError, match="never reached the value linear"),
    ):
        observe(program, ["linear"], batches, padding_mask="mask")


def test_names_that_do_not_exist() -> None:
    _, program = masked_program()
    with spool([data(2)], program) as batches:
        with pytest.raises(UsageError, match="no value 'linaer'") as caught:
            observe(program, ["linaer"], batches)
        assert "linear" in str(caught.value.hint)
        with pytest.raises(UsageError, match="no input of the program"):
            observe(program, ["linear"], batches, padding_mask="maks")
        with pytest.raises(UsageError, match=r"\[batch, tokens\]"):
            observe(program, ["linear"], batches, padding_mask="x")
        with pytest.raises(UsageError, match="no channels along axis 3"):
            observe(program, [], batches, per_channel=[("linear", 3)])
        with pytest.raises(UsageError, match="no channels along axis 0"):
            observe(program, [], batches, per_channel=[("linear", 0)])
        statistics = observe(program, ["linear"], batches)
    with pytest.raises(UsageError, match="'relu' was not observed"):
        statistics.range("relu", "minmax", UINT8)
    with pytest.raises(UsageError, match="no range method 'best'"):
        statistics.range("linear", "best", UINT8)  # type: ignore[arg-type]  # the point
    with pytest.raises(UsageError, match="does not make a scheme"):
        statistics.range("linear", "minmax", QuantScheme(granularity="channel", axis=0))
    with pytest.raises(UsageError, match="were not collected"):
        statistics.channel("linear")


def test_a_boolean_is_no_number() -> None:
    program = plain_program(lambda x: (x > 0).to(torch.float32), 2, 3)
    with (
        spool([torch.ones(2, 3)], program) as batches,
        pytest.raises(UsageError, match="no tensor of real numbers"),
    ):
        observe(program, ["gt"], batches)


def test_channels_that_change_between_batches() -> None:
    _, program = masked_program()
    with (
        spool([data(2, 5), data(2, 6)], program) as batches,
        pytest.raises(PassError, match="batch 1 gives linear another number of channels"),
    ):
        observe(program, [], batches, per_channel=[("linear", 1)])


def test_the_callers_loss_chooses_the_clip() -> None:
    _, program = masked_program()
    with spool([data(6)], program) as batches:
        statistics = observe(program, ["relu"], batches, padding_mask="mask")
    clips = statistics.candidates("relu")
    assert len(clips) > 2
    wanted = clips[2]
    found = statistics.range(
        "relu", "token", UINT8, loss=lambda low, high: abs(low - wanted[0]) + abs(high - wanted[1])
    )
    assert found == wanted
