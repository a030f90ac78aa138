from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.ir.quantscheme import QuantScheme
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.recipe import resolve
from planish.passes.rounding.clipping import clipped_ranges, fitted
from planish.passes.rounding.columns import inverse_factor, sweep
from planish.passes.rounding.gptq import Gptq, gptq
from planish.passes.rounding.lockstep import Lockstep, gram
from planish.passes.rounding.round_weights import RoundWeights, round_to_nearest
from planish.passes.rounding.targets import QUANTIZED, find_weights
from tests.passes.rounding.nets import calibrated, ids, small_lm, tensor
from tests.support.check import run_checked

BLOCKS = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=16, symmetric=False)
CHANNELS = QuantScheme(dtype="int4", granularity="channel", axis=0)


def integers(column: Tensor, _: int) -> Tensor:
    return column.round()


def halves(column: Tensor, _: int) -> Tensor:
    return (column * 2).round() / 2


def inputs_of_rank_4() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator) @ torch.randn(4, 500, generator=generator)
    return x + 0.05 * torch.randn(16, 500, generator=generator)


def trace(d: Tensor, h: Tensor) -> float:
    return float(((d.double() @ h) * d).sum())


# Known answers -------------------------------------------------------------------------------


def test_two_correlated_inputs() -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    factor = inverse_factor(h, 0.0)
    expected = torch.tensor([[0.8165, -0.4082], [0.0, 0.7071]], dtype=torch.float64)
    torch.testing.assert_close(factor, expected, atol=5e-5, rtol=0)
    weight = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    done, loss = sweep(weight, factor, integers)
    assert done.tolist() == [[0.0, 1.0]]
    assert trace(done - weight, h) == pytest.approx(0.56)
    assert 2 * loss == pytest.approx(0.56)
    assert trace(weight.round() - weight, h) == pytest.approx(0.96)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_batch_of_columns_does_not_matter(batch: int) -> None:
    x = inputs_of_rank_4()
    h = (x @ x.T).double() * (2 / 500)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).double()
    factor = inverse_factor(h, 0.01)
    done, loss = sweep(weight, factor, halves, batch=batch)
    whole, _ = sweep(weight, factor, halves)
    assert torch.equal(done, whole)
    damped = h + torch.eye(16) * (0.01 * h.diagonal().mean())
    assert loss == pytest.approx(trace(done - weight, damped) / 2)


def test_low_rank_inputs_repair_most_of_the_error() -> None:
    x = inputs_of_rank_4()
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).double()
    done, _ = sweep(weight, inverse_factor((x @ x.T).double(), 0.01), halves)
    assert trace(done - weight, (x @ x.T).double()) < (
        trace(halves(weight, 0) - weight, (x @ x.T).double()) / 2.5
    )


@pytest.mark.parametrize("scheme", [BLOCKS, CHANNELS])
@pytest.mark.parametrize("reorder", [True, False])
def test_independent_inputs_are_rounded_to_the_nearest(scheme: QuantScheme, reorder: bool) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    h = torch.diag(torch.linspace(1, 5, 32))
    codes, _ = gptq(weight, h, scheme, reorder=reorder, clip=False, fit=False)
    assert torch.equal(codes.codes, round_to_nearest(weight, scheme).codes)


def obq(weight: Tensor, h: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization of one row, left to right, by downdates of the inverse."""
    w = weight.clone()
    inverse = (h + torch.eye(len(h)) * (damping * h.diagonal().mean())).inverse()
    done = torch.empty_like(w)
    for i in range(len(w)):
        done[i] = halves(w[i], i)
        w = w - (w[i] - done[i]) / inverse[i, i] * inverse[:, i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return done


def test_it_is_optimal_brain_quantization_from_left_to_right() -> None:
    x = inputs_of_rank_4().double()
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).double()
    done, _ = sweep(weight, inverse_factor(x @ x.T, 0.01), halves)
    expected = torch.stack([obq(row, x @ x.T, 0.01) for row in weight])
    assert torch.equal(done, expected)


# Numbers -------------------------------------------------------------------------------------


def correlated(inputs: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(400, inputs, generator=generator) @ mix
    return torch.randn(24, inputs, generator=generator), (x.T @ x).double() / 200


@pytest.mark.parametrize("scheme", [BLOCKS, CHANNELS])
@pytest.mark.parametrize(
    "options",
    [{}, {"reorder": False}, {"reorder": False, "static": False}, {"clip": False, "fit": False}],
)
def test_every_form_is_better_than_rounding(scheme: QuantScheme, options: dict[str, Any]) -> None:
    weight, h = correlated()
    codes, _ = gptq(weight, h, scheme, **options)
    low, high = scheme.range
    assert int(codes.codes.min()) >= low
    assert int(codes.codes.max()) <= high
    plain = trace(scheme.fake(weight) - weight, h)
    assert trace(codes.real() - weight, h) < 0.75 * plain


def test_the_loss_is_the_output_error_with_damping() -> None:
    weight, h = correlated()
    for reorder in (True, False):
        codes, loss = gptq(weight, h, BLOCKS, reorder=reorder, fit=False)
        damped = h + torch.eye(64) * (0.01 * h.diagonal().mean())
        assert loss == pytest.approx(trace(codes.real() - weight, damped) / 2, rel=1e-3)


def test_dead_inputs_get_no_weight() -> None:
    weight, h = correlated()
    h[5], h[:, 5] = 0, 0
    codes, _ = gptq(weight, h, BLOCKS)
    assert bool((codes.real()[:, 5] == 0).all())
    assert bool(codes.real().isfinite().all())


def test_fitted_scales_solve_the_normal_equations() -> None:
    weight, h = correlated()
    codes, _ = gptq(weight, h, BLOCKS, fit=False)
    better = fitted(weight, h, codes, damping=0.0)
    assert torch.equal(better.codes, codes.codes)
    error = trace(better.real() - weight, h)
    assert error < trace(codes.real() - weight, h)
    for factor in (0.999, 1.001):  # no other scales of the first block do better
        moved = better.scale.clone()
        moved[:, 0] *= factor
        other = BLOCKS.dequantize(better.codes, moved, better.zero_point)
        assert trace(other - weight, h) >= error


def test_clipping_never_raises_the_error_of_the_output() -> None:
    weight, h = correlated()
    narrow = torch.block_diag(*[h[g : g + 16, g : g + 16] for g in range(0, 64, 16)])
    scale, zero = clipped_ranges(weight, BLOCKS, h)
    real = BLOCKS.dequantize(BLOCKS.quantize(weight, scale, zero), scale, zero)
    assert trace(real - weight, narrow) < trace(BLOCKS.fake(weight) - weight, narrow)


def test_reordering_needs_static_scales() -> None:
    with pytest.raises(ValueError, match="static scales"):
        gptq(*correlated(), BLOCKS, static=False)


# The pass ------------------------------------------------------------------------------------


def test_the_error_is_below_that_of_rounding() -> None:
    program = small_lm()
    sample = (ids(50, 4, 30),)
    (exact,) = run(program, sample)

    def error(pass_: Any) -> float:
        result = run_checked(program, pass_, calibrated(program))
        assert len(result.changes) == 5
        return float((run(result.program, sample)[0] - exact).norm())

    plain = error(RoundWeights(dtype="uint4"))
    assert error(Gptq()) < 0.9 * plain
    assert error(Gptq(dtype="int8")) < plain / 8
    assert error(Gptq(dtype="int8", block_size=0)) < plain / 8


def test_each_layer_sees_what_the_rounded_layers_before_it_give() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(200, 32)
    program = capture(net, (x,))
    context = PassContext(calibration=spool([x], program))
    result = Gptq(block_size=16).run(program.clone(), context).program
    # Do it by hand: round the first layer, run it, and round the second by what it gives.
    scheme = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=16, symmetric=False)
    one, two = net[0], net[2]
    assert isinstance(one, nn.Linear)
    assert isinstance(two, nn.Linear)
    first, _ = gptq(one.weight.detach(), (x.T @ x).double() * (2 / 200), scheme)
    hidden = F.relu(F.linear(x, first.real(), one.bias)).detach()
    second, _ = gptq(two.weight.detach(), (hidden.T @ hidden).double() * (2 / 200), scheme)
    codes = [tensor(result, k) for k in result.constants if k.endswith("codes")]
    assert torch.equal(codes[0], first.codes)
    assert float(codes[1].ne(second.codes).float().mean()) < 0.02  # the last bit of H


def test_padding_stays_out_of_the_statistics() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.fc(x) * mask[..., None]

    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    mask[1, 3:] = 0
    x[1, 3:] = 1e3
    program = capture(Masked().eval(), (x, mask))
    held = spool([(x, mask)], program)
    reader = find_weights(program)[0][0].products[0]
    state = Lockstep(program, held, "mask")
    state.advance(reader)
    kept = x[mask.bool()]
    h = gram(state.inputs_of(reader), reader)[0]
    torch.testing.assert_close(h.float(), kept.T @ kept * (2 / len(kept)))


def test_a_pooled_value_has_no_padding_and_counts_in_full() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.fc(x[:, 0]) + mask.sum()

    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    mask[1, 3:] = 0
    program = capture(Pooled().eval(), (x, mask))
    reader = find_weights(program)[0][0].products[0]
    state = Lockstep(program, spool([(x, mask)], program), "mask")
    state.advance(reader)
    h = gram(state.inputs_of(reader), reader)[0]
    torch.testing.assert_close(h.float(), x[:, 0].T @ x[:, 0] * (2 / 3))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 4, (3, 2), padding="same", dilation=2),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.Conv1d(6, 4, 5, padding=2),
    ],
)
def test_a_convolution_is_a_linear_layer_on_its_windows(conv: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 8) if isinstance(conv, nn.Conv2d) else torch.randn(2, 6, 20)
    program = capture(conv.eval(), (x,))
    (weight,), _ = find_weights(program, convolutions=True)
    reader = weight.products[0]
    state = Lockstep(program, spool([(x,)], program))
    state.advance(reader)
    (windows,) = state.inputs_of(reader)
    rows = weight.rows().reshape(conv.groups, -1, windows.shape[2])
    made = (windows @ rows.transpose(1, 2)).movedim(0, 1).flatten(1)
    exact = run(program, (x,))[0] - conv.bias.reshape(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(made, exact.movedim(1, -1).reshape(made.shape), atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {"dtype": "int4", "convolutions": True}
    better = Gptq(**options).run(program.clone(), PassContext(calibration=spool([(x,)], program)))
    plain = RoundWeights(**options).run(program.clone(), PassContext())
    errors = [
        float((run(r.program, (x,))[0] - run(program, (x,))[0]).norm()) for r in (better, plain)
    ]
    assert errors[0] < errors[1]


def test_it_needs_calibration_that_reaches_the_layer() -> None:
    with pytest.raises(RequirementError, match="there are none"):
        Gptq().run(small_lm(), PassContext())
    program = small_lm()
    weight = next(n for n in program.constants if n.endswith("up.bias"))
    program.constants[weight] = torch.full_like(tensor(program, weight), torch.inf)
    with pytest.raises(PassError, match="not all finite"):
        Gptq().run(program, calibrated(program))


def test_a_second_run_leaves_everything_and_options_round_trip() -> None:
    program = small_lm()
    context = calibrated(program)
    again = Gptq().run(Gptq().run(program, context).program, context)
    assert not again.changes
    assert {r.reason for r in again.refusals} == {QUANTIZED}
    (parsed,) = resolve("gptq{dtype=int8,block_size=0,reorder=false,padding_mask=mask}").passes
    assert parsed == Gptq(dtype="int8", block_size=0, reorder=False, padding_mask="mask")


def test_tall_matrices_are_rounded_in_parts() -> None:
    _, h = correlated()
    weight = torch.randn(600, 64, generator=torch.Generator().manual_seed(4))
    codes, loss = gptq(weight, h, BLOCKS)
    parts = [gptq(part, h, BLOCKS) for part in (weight[:512], weight[512:])]
    assert torch.equal(codes.codes, torch.cat([c.codes for c, _ in parts]))
    assert torch.equal(codes.scale, torch.cat([c.scale for c, _ in parts]))
    assert loss == pytest.approx(sum(part_loss for _, part_loss in parts))
