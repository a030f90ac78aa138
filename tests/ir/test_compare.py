"""Metrics: known values, laws, and what counts as equal."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.ir import fidelity
from planish.ir.capture import capture
from planish.ir.compare import (
    BOUNDS,
    Fidelity,
    bounds_of,
    cosine,
    difference,
    max_abs,
    measure,
    rel_l2,
    sqnr_db,
)
from planish.ir.errors import UsageError
from tests.support.strategies import FLOATS, INTEGERS, normal, shapes, tensors

INF, NAN = math.inf, math.nan


def of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# -- known values ---------------------------------------------------------------------------------


def test_metrics_of_a_case_done_by_hand() -> None:
    # ||b|| = 5, a - b = (0, 1): SQNR = 20 log10(5 / 1), a . b = 9 + 20, ||a|| = sqrt(34).
    b, a = of(3.0, 4.0), of(3.0, 5.0)
    assert max_abs(b, a) == 1.0
    assert rel_l2(b, a) == pytest.approx(0.2)
    assert sqnr_db(b, a) == pytest.approx(20 * math.log10(5))
    assert cosine(b, a) == pytest.approx(29 / (5 * math.sqrt(34)))


def test_a_tenth_of_noise_is_twenty_decibels() -> None:
    b = normal((1000,), 0)
    assert sqnr_db(b, b * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(b, b * 1.01) == pytest.approx(40.0, abs=1e-3)


def test_an_opposite_output_has_cosine_minus_one() -> None:
    b = normal((50,), 1)
    assert cosine(b, -b) == pytest.approx(-1.0)
    assert rel_l2(b, -b) == pytest.approx(2.0)


def test_nothing_differs() -> None:
    b = normal((3, 4), 2)
    found = measure((b,), (b.clone(),))
    assert found == Fidelity(INF, 1.0, 0.0, 0.0, equal=True)
    assert str(found) == "equal"


def test_a_zero_reference_has_no_signal() -> None:
    found = measure((of(0.0, 0.0),), (of(0.0, 0.5),))
    assert found == Fidelity(-INF, 0.0, 0.5, INF, equal=False)


def test_a_zero_output_has_no_direction() -> None:
    assert cosine(of(1.0, 2.0), of(0.0, 0.0)) == 0.0
    assert sqnr_db(of(1.0, 2.0), of(0.0, 0.0)) == pytest.approx(0.0)


def test_empty_outputs_are_equal() -> None:
    assert measure((torch.empty(0, 3),), (torch.empty(0, 3),)).equal
    assert measure((), ()).equal
    assert difference((), ()) is None


def test_sums_are_exact_where_float32_would_lose_them() -> None:
    # In float32, 1e8 + 1 is 1e8; the error of one element in 2**24 would vanish in the sum.
    b = torch.full((1 << 20,), 100.0)
    a = b.clone()
    a[7] += 0.5
    assert rel_l2(b, a) == pytest.approx(0.5 / (100.0 * 1024), rel=1e-9)


def test_float64_squares_do_not_overflow() -> None:
    b = of(1e300, 1.0, dtype=torch.float64)
    assert sqnr_db(b, b * 1.1) == pytest.approx(20.0, abs=1e-6)
    assert cosine(b, b * 1.1) == pytest.approx(1.0)


def test_complex_outputs_are_pairs() -> None:
    b = torch.tensor([3 + 4j, 0j])
    a = torch.tensor([3 + 4j, 1j])
    assert rel_l2(b, a) == pytest.approx(0.2)
    assert difference((b,), (b * 1.00001,)) is None
    assert difference((b,), (a,)) is not None


def test_several_outputs_give_the_worst_of_each() -> None:
    b = of(3.0, 4.0)
    found = measure((b, b), (of(3.0, 5.0), b))
    assert found == measure((b,), (of(3.0, 5.0),))


# -- laws -----------------------------------------------------------------------------------------


@given(tensors(dtypes=FLOATS), st.integers(0, 2**16), st.sampled_from([1e-6, 1e-3, 0.1, 3.0]))
def test_the_metrics_agree_with_their_definitions(b: Tensor, seed: int, noise: float) -> None:
    a = (b.double() + noise * normal(tuple(b.shape), seed).double()).to(b.dtype)
    found = measure((b,), (a,))
    x, error = b.double(), a.double() - b.double()
    assert found.max_abs == float(error.abs().max())
    assert found.rel_l2 == pytest.approx(float(error.norm() / x.norm()), rel=1e-9)
    if found.equal:
        assert found.sqnr_db == INF
    else:
        assert found.sqnr_db == pytest.approx(-20 * math.log10(found.rel_l2), rel=1e-9, abs=1e-9)
        expected = float((x * a.double()).sum() / (x.norm() * a.double().norm()))
        assert found.cosine == pytest.approx(expected, abs=1e-9)


@given(tensors(shapes(min_side=0), dtypes=(*FLOATS, *INTEGERS, torch.bool)))
def test_every_tensor_equals_its_copy(b: Tensor) -> None:
    copy = b.clone(memory_format=torch.contiguous_format)
    assert measure((b,), (copy,)).equal
    assert difference((b,), (copy,)) is None


@given(tensors(dtypes=FLOATS), st.integers(0, 2**16), st.sampled_from([2.0, -0.5, 1024.0]))
def test_relative_metrics_do_not_see_the_scale(b: Tensor, seed: int, factor: float) -> None:
    b = b.double()
    a = b + 0.01 * normal(tuple(b.shape), seed).double()
    small, large = measure((b,), (a,)), measure((b * factor,), (a * factor,))
    assert large.sqnr_db == pytest.approx(small.sqnr_db)
    assert large.cosine == pytest.approx(small.cosine)
    assert large.max_abs == pytest.approx(small.max_abs * abs(factor))


@given(tensors(shapes(min_dims=1, max_side=9)), st.integers(0, 2**16))
def test_chunks_change_nothing(b: Tensor, seed: int) -> None:
    a = b + 0.1 * normal(tuple(b.shape), seed)
    whole = measure((b,), (a,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "_CHUNK", 3)
        pieces = measure((b,), (a,))
    assert pieces.max_abs == whole.max_abs
    assert pieces.sqnr_db == pytest.approx(whole.sqnr_db)
    assert pieces.cosine == pytest.approx(whole.cosine)


def test_chunks_cover_each_element_once() -> None:
    b = torch.arange(5 * 7 * 3).reshape(5, 7, 3).permute(2, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "_CHUNK", 4)
        pieces = [x for x, _ in fidelity.chunks(b, b)]
    assert max(p.numel() for p in pieces) <= 4
    assert sorted(torch.cat(pieces).tolist()) == list(range(105))


# -- infinities and NaN ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_output_must_be_finite_where_the_reference_is(bad: float) -> None:
    b, a = of(1.0, 2.0), of(1.0, bad)
    assert "not finite" in (difference((b,), (a,)) or "")
    assert measure((b,), (a,)) == Fidelity(-INF, 0.0, INF, INF, equal=False)


@pytest.mark.parametrize("a", [of(1.0, 5.0), of(1.0, -INF), of(1.0, NAN), of(1.0, 3.4e38)])
def test_infinities_must_be_where_the_reference_has_them(a: Tensor) -> None:
    b = of(1.0, INF)
    assert difference((b,), (b.clone(),)) is None
    assert difference((b,), (a,)) is not None


def test_nothing_is_demanded_where_the_reference_is_nan() -> None:
    b = of(NAN, 2.0)
    assert difference((b,), (of(7.0, 2.0),)) is None
    assert difference((b,), (of(NAN, 2.0),)) is None
    assert difference((b,), (of(NAN, 2.1),)) is not None


def test_the_fill_of_a_mask_hides_no_error() -> None:
    lowest = torch.finfo(torch.float32).min
    b = of(lowest, 1.0, 2.0)
    assert difference((b,), (of(lowest, 1.0, 2.0),)) is None
    assert "of its scale 2" in (difference((b,), (of(lowest, 1.0, 2.5),)) or "")
    assert sqnr_db(b, of(lowest, 1.0, 2.5)) == pytest.approx(20 * math.log10(math.sqrt(5) / 0.5))
    assert difference((b,), (of(-INF, 1.0, 2.0),)) is not None


# -- equal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_the_bound_of_each_type_is_where_the_table_says(dtype: torch.dtype) -> None:
    b = torch.tensor([8.0, 1.0]).to(torch.complex128 if dtype.is_complex else torch.float64)
    within = b + torch.tensor([8.0 * BOUNDS[dtype] * 0.8, 0.0])
    beyond = b + torch.tensor([8.0 * BOUNDS[dtype] * 1.25, 0.0])
    assert difference((b.to(dtype),), (within.to(dtype),)) is None
    assert difference((b.to(dtype),), (beyond.to(dtype),)) is not None


def test_float32_is_held_to_one_in_ten_thousand() -> None:
    assert BOUNDS[torch.float32] == 1e-4
    assert sorted(BOUNDS.values())[-1] < 0.1


def test_tiny_references_are_compared_absolutely() -> None:
    assert difference((of(0.0),), (of(0.9e-10),)) is None
    assert difference((of(0.0),), (of(1.1e-10),)) is not None


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_integers_and_bools_are_compared_exactly(dtype: torch.dtype) -> None:
    b = torch.tensor([0, 1, 1]).to(dtype)
    a = torch.tensor([0, 1, 0]).to(dtype)
    assert difference((b,), (b.clone(),)) is None
    assert "differs in 1 of 3" in (difference((b,), (a,)) or "")


def test_integers_beyond_float64_are_compared_exactly() -> None:
    b = torch.tensor([2**60])
    assert difference((b,), (b + 1,)) is not None
    assert not measure((b,), (b + 1,)).equal
    assert math.isfinite(sqnr_db(b, b + 1))


@pytest.mark.parametrize(
    ("b", "a", "says"),
    [
        ((of(1.0),), (), "there are 0 outputs where the reference has 1"),
        ((of(1.0),), (of(1.0, 1.0),), "output 0 has shape [2] where the reference has [1]"),
        ((of(1.0),), (of(1.0).double(),), "output 0 is f64 where the reference is f32"),
        ((of(1.0),), (1.0,), "output 0 is a float where the reference is a Tensor"),
        ((of(1.0), None), (of(1.0), 0), "output 1 is a int where the reference is a NoneType"),
        ((3,), (4,), "output 0 is 4 where the reference is 3"),
        (("a",), ("b",), "output 0 is 'b' where the reference is 'a'"),
        ((True,), (1,), "output 0 is a int where the reference is a bool"),
        ((1.0,), (1.1,), "output 0 differs by 0.1"),
    ],
)
def test_a_difference_is_a_sentence(b: tuple, a: tuple, says: str) -> None:  # type: ignore[type-arg]
    assert (difference(b, a) or "").startswith(says)


def test_python_outputs_may_be_equal() -> None:
    b = (None, 3, True, "x", 1.0)
    assert difference(b, (None, 3, True, "x", 1.0 + 1e-6)) is None
    assert measure(b, b).equal
    assert not measure(("x",), ("y",)).equal
    assert measure((2,), (3,)).max_abs == 1.0


def test_the_sentence_names_the_output_and_its_figures() -> None:
    found = difference((of(1.0), of(2.0)), (of(1.0), of(2.5)), names=("hidden", "logits"))
    assert found == (
        "output 1 (logits) differs by 0.5, which is 0.25 of its scale 2; "
        "the bound for f32 is 0.0001"
    )


@pytest.mark.parametrize("a", [(), (of(1.0, 2.0),), (1.0,)])
def test_what_cannot_be_measured_is_an_error(a: tuple) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match="output"):
        measure((of(1.0),), a)


@pytest.mark.parametrize("metric", [sqnr_db, cosine, max_abs, rel_l2])
def test_single_metrics_reject_other_shapes(metric: object) -> None:
    with pytest.raises(UsageError, match="shape"):
        metric(of(1.0), of(1.0, 2.0))  # type: ignore[operator]


# -- JSON and bounds ------------------------------------------------------------------------------


def test_json_has_no_infinities() -> None:
    same = measure((of(1.0),), (of(1.0),)).to_dict()
    broken = measure((of(1.0),), (of(NAN),)).to_dict()
    assert json.loads(json.dumps(same, allow_nan=False)) == {
        "sqnr_db": None,
        "cosine": 1.0,
        "max_abs": 0.0,
        "rel_l2": 0.0,
        "equal": True,
    }
    assert json.loads(json.dumps(broken, allow_nan=False))["sqnr_db"] is None
    assert broken["equal"] is False


class Mixed(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x.bfloat16().float(), y * 2, x.double(), x.bfloat16().argmax()


def test_an_output_is_no_more_exact_than_the_coarsest_type_on_its_way() -> None:
    program = capture(Mixed().eval(), (torch.randn(3), torch.randn(3)))
    assert bounds_of(program) == (BOUNDS[torch.bfloat16], 1e-4, 1e-4, 0.0)
    b, a = of(1.0), of(1.01)
    assert difference((b,), (a,)) is not None
    assert difference((b,), (a,), bounds=bounds_of(program)[:1]) is None
