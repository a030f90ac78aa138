from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.ops import aten, is_op
from planish.ir.quantscheme import QuantScheme, spread
from planish.ir.tensortype import SparseLayout
from planish.passes.base import PassContext
from planish.passes.quantize.where import Where
from planish.passes.recipe import resolve
from planish.passes.rounding.round_weights import RoundWeights, round_to_nearest
from planish.passes.rounding.targets import QUANTIZED, find_weights
from tests.passes.rounding.nets import ids, small_lm, tensor
from tests.support.check import check, refuses, run_checked

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# Fires ---------------------------------------------------------------------------------------


def test_rounds_a_linear_in_blocks() -> None:
    check(
        Two(),
        (X,),
        RoundWeights(dtype="int4", block_size=2),
        """
        program(%x: f32[3, 4])
          const @fc.bias: f32[6]
          const @fc.codes: i8[6, 4]
          const @fc.scale: f32[6, 2]
          const @fc.zero_point: i8[6, 2]
          %0: f32[6, 4] = planish.dequantize(@fc.codes, @fc.scale, @fc.zero_point, dtype='int4', axis=1, block_size=2)
          %1: f32[3, 6] = aten.linear(%x, %0, @fc.bias)
          return %1
        """,  # noqa: E501 - the text of a program
        changes=1,
    )


def test_one_set_of_codes_for_a_tied_table() -> None:
    result = run_checked(small_lm(), RoundWeights(dtype="uint4"))
    made = [n for n in result.program.operators if "dequantize" in str(n.target)]
    assert len(made) == 5  # gate, up, down, Conv1D, and one for table and output layer
    table = next(n for n in result.program.operators if is_op(n, aten.embedding.default))
    head = result.program.results[0]
    assert table.args[0] is head.args[1]
    values = [tensor(result.program, name) for name in result.program.constants]
    assert (
        max(v.numel() for v in values if v.is_floating_point()) <= 2 * 72 * 5
    )  # scales and biases


def test_per_channel_of_a_convolution() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 5, 3)
    result = check(net, (torch.randn(1, 3, 8, 8),), RoundWeights(convolutions=True), changes=1)
    assert result.program.constants["weight.scale"].shape == (5,)


# Refuses -------------------------------------------------------------------------------------


def test_refuses_a_weight_with_another_reader() -> None:
    class Shared(Two):
        def forward(self, x: Tensor) -> Any:
            return self.fc(x), self.fc.weight * 2, torch.nn.functional.linear(x, x)

    class More(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return *super().forward(x), self.other(x)

    refuses(More(), (X,), RoundWeights(), "aten.mul.Tensor reads the same constant", changes=1)
    refuses(More(), (X,), RoundWeights(), "its weight is computed", changes=1)


def test_refuses_what_is_not_finite_and_takes_what_is_sparse() -> None:
    program = small_lm()
    program.layouts["up.weight"] = SparseLayout(72, 72, 1)
    weight = tensor(program, "gate.weight")
    program.constants["gate.weight"] = torch.full_like(weight, torch.inf)
    weights, refusals = find_weights(program)
    reasons = {r.reason for r in refusals}
    assert {w.name: w.layout for w in weights}["up.weight"] == SparseLayout(72, 72, 1)
    assert any("not finite" in reason for reason in reasons)


def test_rounding_nothing_is_an_error() -> None:
    program = capture(nn.ReLU().eval(), (X,))
    with pytest.raises(PassError, match="found no weight to round"):
        RoundWeights().run(program, PassContext())
    with pytest.raises(PassError, match=r"where.exclude holds 'nonsense'"):
        RoundWeights(where=Where(exclude=("nonsense",))).run(small_lm(), PassContext())


# Meaning -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.integers(1, 70),
    st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_half_a_step(
    dtype: Any, block: int, symmetric: bool, inputs: int, seed: int
) -> None:
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(seed))
    scheme = QuantScheme(
        dtype=dtype,
        granularity="block" if block else "channel",
        axis=1 if block else 0,
        block_size=block,
        symmetric=symmetric,
    )
    codes = round_to_nearest(weight, scheme)
    step = spread(codes.scale, weight, *scheme.layout(weight))
    # An asymmetric zero point is rounded too, and symmetric unsigned codes reach 7 steps up.
    bound = 0.5 if symmetric and scheme.signed else 1.0
    assert bool(((codes.real() - weight).abs() <= step * (bound + 1e-4)).all())


def test_the_error_falls_with_bits_and_blocks_and_search() -> None:
    program, sample = small_lm(), (ids(3),)
    (exact,) = run(program, sample)

    def error(**options: Any) -> float:
        rounded = RoundWeights(**options).run(program.clone(), PassContext()).program
        return float((run(rounded, sample)[0] - exact).norm() / exact.norm())

    assert error(dtype="int8") < error(dtype="int4", block_size=16) / 8
    assert error(dtype="uint4", block_size=16) < error(dtype="uint4", block_size=0)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scheme = QuantScheme(dtype="int4", granularity="block", axis=1, block_size=32)
    plain, searched = (
        (round_to_nearest(weight, scheme, search=s).real() - weight).square().sum()
        for s in (False, True)
    )
    assert searched < plain


def test_an_asymmetric_block_of_known_codes() -> None:
    weight = torch.tensor([[4.0, -2.0, 1.2, 0.0] + [0.0] * 12])
    scheme = QuantScheme(dtype="uint4", granularity="block", axis=1, block_size=16, symmetric=False)
    codes = round_to_nearest(weight, scheme)
    assert float(codes.scale) == pytest.approx(0.4)
    assert int(codes.zero_point) == 5
    assert codes.codes[0, :4].tolist() == [15, 0, 8, 5]
    # Scales are positive even where the extreme is negative: some runtimes take no others.
    signed = QuantScheme(dtype="int4", granularity="block", axis=1, block_size=16)
    assert float(round_to_nearest(-weight, signed).scale) == pytest.approx(0.5)


def test_halves_keep_their_type() -> None:
    weight = torch.randn(4, 32).half()
    scheme = QuantScheme(dtype="int8", granularity="block", axis=1, block_size=32)
    codes = round_to_nearest(weight, scheme)
    assert codes.scale.dtype == torch.float16
    assert codes.real().dtype == torch.float16


# Neighbors -----------------------------------------------------------------------------------


def test_a_second_run_leaves_everything() -> None:
    rounded = RoundWeights().run(small_lm(), PassContext()).program
    again = RoundWeights().run(rounded, PassContext())
    assert not again.changes
    assert {r.reason for r in again.refusals} == {QUANTIZED}


def test_where_and_embeddings_choose() -> None:
    untied = small_lm(tied=False)
    assert len(RoundWeights().run(untied.clone(), PassContext()).changes) == 6
    options = RoundWeights(embeddings=False, where=Where(exclude=("gate",)))
    result = options.run(untied.clone(), PassContext())
    assert len(result.changes) == 4
    assert {"embed.weight", "gate.weight"} <= set(result.program.constants)


def test_options_round_trip() -> None:
    text = "round-weights{dtype=uint4,block_size=64,symmetric=true,where={exclude=[head]}}"
    (parsed,) = resolve(text).passes
    assert parsed == RoundWeights(
        dtype="uint4", block_size=64, symmetric=True, where=Where(exclude=("head",))
    )
