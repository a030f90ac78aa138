from itertools import pairwise

import pytest
import torch
from torch import Tensor

from planish.ir.errors import RequirementError
from planish.ir.execute import run
from planish.ir.quantscheme import QuantScheme
from planish.passes.base import PassContext
from planish.passes.recipe import resolve
from planish.passes.rounding.awq import Awq, output_error, scales, search_scale
from planish.passes.rounding.round_weights import RoundWeights
from planish.passes.rounding.targets import QUANTIZED
from tests.passes.rounding.nets import calibrated, ids, small_lm
from tests.support.check import assert_equal, run_checked

SCHEME = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=16, symmetric=False)


def layer() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, X^T X of inputs of which few are large, and their mean size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator)
    x[:, ::11] *= 20
    return torch.randn(8, 32, generator=generator), x.T @ x, x.abs().mean(0)


def test_no_ratio_is_no_scale_and_rounding_to_the_nearest() -> None:
    weight, h, mean = layer()
    assert torch.equal(scales(mean, 0.0), torch.ones(32))
    d = SCHEME.fake(weight) - weight
    plain = float(((d @ h) * d).sum())
    assert output_error([weight], [SCHEME], h, scales(mean, 0.0)) == pytest.approx(plain)
    assert search_scale([weight], [SCHEME], h, mean, steps=1).ratio == 0


def test_scales_are_centered_and_follow_the_inputs() -> None:
    _, _, mean = layer()
    s = scales(mean, 0.5)
    assert float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(s.argsort(), mean.argsort())


def test_the_search_is_never_worse_and_finds_the_best_of_the_grid() -> None:
    weight, h, mean = layer()
    found = search_scale([weight], [SCHEME], h, mean)
    errors = [output_error([weight], [SCHEME], h, scales(mean, r / 20)) for r in range(20)]
    assert found.error == pytest.approx(min(errors))
    assert found.plain == pytest.approx(errors[0])
    assert found.error < 0.7 * found.plain  # large inputs are worth a scale
    # Not monotone in r, so that bisection would not do.
    rises = [b > a for a, b in pairwise(errors)]
    assert any(rises)
    assert not all(rises)


def test_all_readers_of_one_value_count() -> None:
    weight, h, mean = layer()
    both = search_scale([weight, weight.flip(0)], [SCHEME, SCHEME], h, mean)
    assert both.error == pytest.approx(2 * search_scale([weight], [SCHEME], h, mean).error)


def test_folding_alone_leaves_the_output() -> None:
    program = small_lm()
    # 8 bits with scales: what remains is the rounding of 8 bits, far below what a scale moves.
    result = run_checked(program, Awq(dtype="int8"), calibrated(program))
    scaled = [c for c in result.changes if c.rule == "scale-inputs"]
    assert len(scaled) == 2  # the norm for up and gate, and up for down
    (exact,), (found,) = (run(p, (ids(60),)) for p in (program, result.program))
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_only_scales_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    import planish.passes.rounding.awq as awq

    monkeypatch.setattr(awq, "round_in_sequence", lambda *_: None)
    program = small_lm()
    result = Awq().run(program.clone(), calibrated(program))
    assert {c.rule for c in result.changes} == {"scale-inputs"}
    assert_equal(program, result.program)


@pytest.mark.parametrize("rounding", ["clip", "gptq"])
def test_the_error_is_below_that_of_rounding(rounding: str) -> None:
    program = small_lm()
    sample = (ids(61, 4, 30),)
    (exact,) = run(program, sample)
    result = run_checked(
        program,
        Awq(rounding=rounding),  # type: ignore[arg-type]  # one of a Literal
        calibrated(program),
    )
    plain = RoundWeights(dtype="uint4").run(program.clone(), PassContext()).program
    errors = [float((run(p, sample)[0] - exact).norm()) for p in (result.program, plain)]
    assert errors[0] < 0.95 * errors[1]
    assert any("nothing that makes its input can take a scale" in r.reason for r in result.refusals)


def test_needs_calibration_runs_once_and_options_round_trip() -> None:
    with pytest.raises(RequirementError, match="there are none"):
        Awq().run(small_lm(), PassContext())
    program = small_lm()
    context = calibrated(program)
    again = Awq().run(Awq().run(program, context).program, context)
    assert not again.changes
    assert QUANTIZED in {r.reason for r in again.refusals}
    (parsed,) = resolve("awq{steps=10,rounding=gptq,block_size=128}").passes
    assert parsed == Awq(steps=10, rounding="gptq", block_size=128)
