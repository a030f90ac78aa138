"""The second probe: legal, different, deterministic; masks padded; refusals told."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.errors import UsageError
from planish.ir.execute import run
from planish.ir.probe import sample_inputs_at, second_probe, second_reference
from planish.ir.program import Program

LENGTHS = st.integers(2, 20)
LOWEST = torch.finfo(torch.float32).min


class Encoder(nn.Module):
    """Embeds ids, masks them, pools: the shape of a sentence encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids) * mask.unsqueeze(-1)
        return hidden.sum(1)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def probe(program: Program, seed: int = 0) -> tuple[Any, ...]:
    found = second_probe(program, seed)
    assert found is not None
    return found


@cache
def traced(longest: int | None) -> Program:
    b, s = Dim("batch"), Dim("length", max=longest)
    shapes = {"ids": {0: b, 1: s}, "mask": {0: b, 1: s}}
    example = (torch.full((2, 6), 10), torch.ones(2, 6, dtype=torch.long))
    return capture(Encoder().eval(), example, dynamic_shapes=shapes)


def encoder(batch: int = 2, length: int = 6, longest: int | None = 64) -> Program:
    """A program with dynamic batch and length, and a sample of that size."""
    program = traced(longest).clone()
    ids = torch.randint(10, 20, (batch, length), generator=torch.Generator().manual_seed(0))
    program.samples = ((ids, torch.ones(batch, length, dtype=torch.long)),)
    return program


def static(sample: Tensor) -> Program:
    return capture(Identity().eval(), (sample,))


def drawn(sample: Tensor, seed: int = 0) -> Tensor:
    """The probe's value for a static program of one input."""
    value: Tensor = probe(static(sample), seed)[0]
    assert value.shape == sample.shape
    assert value.dtype == sample.dtype
    return value


# -- sizes ----------------------------------------------------------------------------------------


def test_every_dynamic_dimension_gets_another_size() -> None:
    ids, mask = probe(encoder(batch=2, length=6))
    assert ids.shape == mask.shape == (3, 7)


def test_dimensions_that_are_equal_in_the_sample_are_told_apart() -> None:
    ids, _ = probe(encoder(batch=5, length=5))
    assert ids.shape[0] != ids.shape[1]
    assert 5 not in ids.shape


def test_a_long_sample_is_halved() -> None:
    ids, _ = probe(encoder(batch=2, length=40))
    assert ids.shape == (3, 20)


def test_the_range_is_kept() -> None:
    ids, _ = probe(encoder(batch=2, length=8, longest=8))
    assert ids.shape == (3, 7)


def test_a_sample_of_size_one_is_probed_at_two() -> None:
    axes = {0: Dim("batch"), 1: Dim("length")}
    shapes = {"ids": axes, "mask": axes}
    example = (torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.ones(1, 6))
    program = capture(Encoder().eval(), example, dynamic_shapes=shapes)
    assert program.samples[0][0].shape == (1, 6)
    ids, _ = probe(program)
    assert ids.shape == (2, 7)


@given(st.integers(1, 20), LENGTHS, st.integers(20, 24))
def test_sizes_are_legal_and_new(batch: int, length: int, longest: int) -> None:
    program = encoder(batch, length, longest)
    ids, mask = probe(program)
    assert ids.shape == mask.shape
    assert ids.shape[0] != batch
    assert ids.shape[1] != length
    assert min(ids.shape) >= 2
    assert ids.shape[1] <= longest
    run(program, (ids, mask))


class Halves(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(-1, 2) + y.unsqueeze(-1)


def halves() -> Program:
    half = Dim("half")
    shapes = {"x": {0: 2 * half}, "y": {0: half}}
    return capture(Halves().eval(), (torch.randn(10), torch.randn(5)), dynamic_shapes=shapes)


def test_derived_dimensions_follow() -> None:
    program = halves()
    x, y = probe(program)
    assert (x.shape, y.shape) == ((12,), (6,))
    run(program, (x, y))


class EvenOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // 2, 2, -1).sum(1)


def test_a_dimension_that_appears_only_derived_is_solved_for() -> None:
    shapes = {"x": {0: 2 * Dim("half")}}
    program = capture(EvenOnly().eval(), (torch.randn(6, 4),), dynamic_shapes=shapes)
    (x,) = probe(program)
    assert x.shape == (8, 4)
    run(program, (x,))


def test_the_only_legal_size_stays() -> None:
    program = encoder(batch=2, length=6)
    symbol = next(s for s, name in program.signature.symbols.items() if name == "length")
    ranges = {**program.signature.ranges, symbol: (6, 6)}
    program.signature = dataclasses.replace(program.signature, ranges=ranges)
    ids, _ = probe(program)
    assert ids.shape == (3, 6)


# -- values ---------------------------------------------------------------------------------------


def test_a_seed_decides_every_value() -> None:
    program = encoder(batch=4, length=9)
    first, same, other = probe(program, 1), probe(program, 1), probe(program, 2)
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_the_global_generator_and_the_sample_are_left_alone() -> None:
    program = encoder()
    state, before = torch.get_rng_state(), [v.clone() for v in program.samples[0]]
    probe(program)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, program.samples[0], before))


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=6), st.integers(0, 99))
def test_integers_are_the_samples_own(values: list[int], seed: int) -> None:
    sample = torch.tensor([7, *values, -9] * 3)
    value = drawn(sample, seed)
    assert set(value.tolist()) <= set(sample.tolist())
    assert not torch.equal(value, sample)


@given(st.floats(-5, 5), st.floats(0.1, 10), st.integers(0, 99))
def test_floats_have_the_samples_mean_and_deviation(mean: float, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample = mean + std * torch.randn(4096, generator=generator)
    value = drawn(sample, seed + 1)
    assert not torch.equal(value, sample)
    assert float(value.mean()) == pytest.approx(float(sample.mean()), abs=0.1 * std)
    assert float(value.std()) == pytest.approx(float(sample.std()), rel=0.1)
    assert float(value.min()) >= float(sample.min())
    assert float(value.max()) <= float(sample.max())


def test_a_sample_of_zeros_is_no_probe_of_zeros() -> None:
    value = drawn(torch.zeros(2, 8))
    assert float(value.std()) > 0.3


@pytest.mark.parametrize("constant", [0.5, -981.0])
def test_a_constant_sample_varies_and_keeps_its_sign(constant: float) -> None:
    value = drawn(torch.full((64,), constant))
    assert float(value.std()) > 0
    assert bool(((value * constant) > 0).all())


def test_complex_values_vary_in_both_parts() -> None:
    value = drawn(torch.complex(torch.randn(64), torch.randn(64) + 10))
    assert float(value.imag.mean()) == pytest.approx(10, abs=1)
    assert float(value.real.std()) > 0.5


def test_an_empty_sample_stays_empty() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y])

    program = capture(Two().eval(), (torch.empty(0, 3), torch.randn(2, 3)))
    assert probe(program)[0].shape == (0, 3)


# -- masks ----------------------------------------------------------------------------------------


def assert_padded(mask: Tensor, keep: float, drop: float) -> None:
    """Every row keeps a prefix of at least one position, and drops the rest."""
    rows = mask.reshape(-1, mask.shape[-1]).tolist()
    for row in rows:
        kept = row.index(drop)
        assert kept >= 1
        assert row == [keep] * kept + [drop] * (len(row) - kept)


@given(st.integers(1, 5), LENGTHS, st.integers(0, 99))
def test_an_attention_mask_is_padded_and_keeps_position_zero(
    batch: int, length: int, seed: int
) -> None:
    _, mask = probe(encoder(batch, length), seed)
    assert_padded(mask, 1, 0)


@pytest.mark.parametrize(
    ("sample", "keep", "drop"),
    [
        (torch.ones(2, 6, dtype=torch.int64), 1, 0),
        (torch.ones(2, 6, dtype=torch.bool), True, False),
        (torch.ones(2, 6), 1.0, 0.0),
        (torch.ones(2, 6, dtype=torch.uint8), 1, 0),
        (torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), 1, 0),
        (torch.zeros(2, 6, dtype=torch.bool), False, True),  # True marks what is ignored
        (torch.ones(3, 4).tril().bool(), True, False),
        (torch.tensor([[0.0, 0.0, -torch.inf]]), 0.0, -torch.inf),
        (torch.tensor([[0.0, LOWEST]]), 0.0, LOWEST),
        (torch.tensor([[0.0, 0.0, -1e4]]), 0.0, -1e4),
    ],
)
def test_masks_of_every_kind_are_padded(sample: Tensor, keep: float, drop: float) -> None:
    values = [sample_inputs_at(static(sample), {}, seed=seed)[0] for seed in range(20)]
    for value in values:
        assert value.dtype == sample.dtype
        assert_padded(value, keep, drop)
    assert len({str(v.tolist()) for v in values}) > 1 or sample.shape[-1] == 2


def test_rows_are_padded_along_the_last_axis_longer_than_one() -> None:
    value = sample_inputs_at(static(torch.ones(2, 5, 1)), {})[0]
    assert_padded(value.squeeze(-1), 1.0, 0.0)


def test_a_mask_of_one_position_keeps_it() -> None:
    assert sample_inputs_at(static(torch.ones(1, 1)), {})[0].tolist() == [[1.0]]


def test_token_types_of_zero_are_no_mask() -> None:
    zeros = torch.zeros(2, 6, dtype=torch.int64)
    assert sample_inputs_at(static(zeros), {})[0].tolist() == zeros.tolist()


# -- nothing to vary ------------------------------------------------------------------------------


def test_a_static_program_gets_other_values() -> None:
    sample = torch.randn(2, 3)
    assert not torch.equal(drawn(sample), sample)


def test_there_is_no_probe_where_nothing_can_vary() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(3) * 2

    assert second_probe(capture(Constant().eval(), ())) is None
    assert second_probe(static(torch.tensor([4, 4, 4]))) is None
    bare = static(torch.randn(2))
    bare.samples = ()
    assert second_probe(bare) is None
    assert second_reference(bare).inputs is None


# -- at given sizes -------------------------------------------------------------------------------


def test_inputs_at_given_sizes() -> None:
    program = encoder(batch=2, length=6)
    ids, mask = sample_inputs_at(program, {"batch": 1, "length": 9})
    assert ids.shape == mask.shape == (1, 9)
    assert sample_inputs_at(program, {"batch": 4})[0].shape == (4, 6)
    run(program, (ids, mask))


def test_unknown_dimensions_and_illegal_sizes_are_errors() -> None:
    program = encoder(longest=64)
    with pytest.raises(UsageError, match=r"no dynamic dimension 'batsh'(.|\n)*batch, length"):
        sample_inputs_at(program, {"batsh": 2})
    with pytest.raises(UsageError, match=r"length cannot be 65(.|\n)*to 64"):
        sample_inputs_at(program, {"length": 65})
    with pytest.raises(UsageError, match="all its sizes are static"):
        sample_inputs_at(static(torch.randn(2)), {"batch": 2})
    program.samples = ()
    with pytest.raises(UsageError, match="no sample inputs"):
        sample_inputs_at(program, {})


# -- the reference --------------------------------------------------------------------------------


def test_the_reference_is_what_the_program_answers_there() -> None:
    program = encoder(batch=2, length=6)
    found = second_reference(program)
    assert found.inputs is not None
    assert found.sizes == {"batch": 3, "length": 7}
    assert found.resized
    assert found.rejected == ()
    assert all(map(torch.equal, found.inputs, probe(program)))
    assert torch.equal(found.outputs[0], run(program, found.inputs)[0])


def loosened(module: nn.Module, shapes: Any, *args: Tensor) -> Program:
    """A program whose operators accept fewer sizes than its ranges allow.

    The reshape is put in by hand: torch would refuse to trace it.
    """
    program = capture(module.eval(), args, dynamic_shapes=shapes)
    node = program.operators[0]
    with program.graph.inserting_before(node):
        target = torch.ops.aten.reshape.default
        rows = program.graph.call_function(target, (node.args[0], [-1, 4]))
    rows.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    node.args = (rows, *node.args[1:])
    return program


def test_sizes_that_the_program_rejects_are_told_and_others_tried() -> None:
    # Rows of four: 6 does not divide, 5 neither; doubled it does.
    program = loosened(Identity(), {"x": {0: Dim("rows")}}, torch.randn(4, 2, 1))
    found = second_reference(program)
    assert found.resized
    assert found.sizes == {"rows": 8}
    assert len(found.rejected) == 1
    assert "the program itself rejects rows=5: operator failed: shape" in found.rejected[0]


def test_sizes_equal_in_the_sample_are_kept_equal_where_they_must() -> None:
    shapes = {"x": {0: Dim("height"), 1: Dim("width")}}
    program = capture(Identity().eval(), (torch.randn(6, 6),), dynamic_shapes=shapes)
    node = program.operators[0]
    with program.graph.inserting_before(node):
        turned = program.graph.call_function(torch.ops.aten.t.default, (node.args[0],))
    turned.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    node.target, node.args = torch.ops.aten.add.Tensor, (node.args[0], turned)
    found = second_reference(program)
    assert found.sizes == {"height": 7, "width": 7}
    assert "rejects height=7, width=8" in found.rejected[0]


def test_where_no_other_size_works_only_values_vary() -> None:
    program = capture(Identity().eval(), (torch.randn(3),), dynamic_shapes={"x": {0: Dim("rows")}})
    node = program.operators[0]
    node.target, node.args = torch.ops.aten.reshape.default, (node.args[0], [3])
    found = second_reference(program)
    assert found.inputs is not None
    assert found.inputs[0].shape == (3,)
    assert not found.resized
    assert len(found.rejected) == 2


def test_a_probe_without_a_finite_number_is_no_check() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (-x.abs() - 1).log()

    found = second_reference(capture(Log().eval(), (torch.randn(4),)))
    assert found.inputs is None
    assert found.rejected == ("the program itself gives no finite number at other values",)
