"""Dynamic dimensions keep the user's names and work at size 1, however they were declared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import AdditionalInputs, Dim, ShapesCollection

from planish.ir import Program, capture, text
from planish.ir.calling import Call
from planish.ir.dims import dynamic_axes, enlarge_singletons
from planish.ir.errors import CaptureError, UsageError
from tests.support.lambdas import Lambda, assert_captured
from tests.support.nets import assert_same

N, LENGTH, HALF = Dim("n"), Dim("length"), Dim("half")
LINEAR = nn.Linear(3, 2).eval()


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def header(program: Program) -> str:
    return text(program).splitlines()[0]


def rows(*sizes: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, 3) for size in sizes)


@pytest.mark.parametrize("sample", [0, 1, 2, 5])
@pytest.mark.parametrize("marker", [Dim("batch"), Dim("batch", min=0, max=64)])
def test_a_named_dimension_keeps_its_name_and_any_sample_does(marker: Any, sample: int) -> None:
    calls = [rows(sample), rows(1), rows(2), rows(7)]
    program = assert_captured(LINEAR, *calls, dynamic_shapes=({0: marker},))
    assert header(program) == "program(%input: f32[batch, 3])"
    assert program.samples[0][0].shape == (sample, 3)
    (symbol,) = program.signature.symbols
    assert program.signature.ranges[symbol][0] == 0


@pytest.mark.parametrize("hint", [Dim.DYNAMIC, Dim.AUTO, Dim.AUTO(min=1, max=9)])
@pytest.mark.parametrize("sample", [1, 4])
def test_a_hint_is_named_by_its_place(hint: Any, sample: int) -> None:
    program = assert_captured(LINEAR, rows(sample), rows(1), rows(7), dynamic_shapes=({0: hint},))
    assert header(program) == "program(%input: f32[input_dim_0, 3])"


@pytest.mark.parametrize("marker", [Dim.STATIC, 1, None])
def test_a_static_axis_stays_static(marker: Any) -> None:
    program = capture(LINEAR, rows(1), dynamic_shapes=({0: marker},))
    assert header(program) == "program(%input: f32[1, 3])"


@pytest.mark.parametrize("shapes", [None, {}, (None,), [None], {"input": None}])
def test_no_dynamic_shapes(shapes: Any) -> None:
    assert header(capture(LINEAR, rows(1), dynamic_shapes=shapes)) == "program(%input: f32[1, 3])"


@pytest.mark.parametrize(
    ("args", "kwargs", "shapes"),
    [
        (rows(1, 1), {}, ({0: N}, {0: N})),
        (rows(1, 1), {}, [[N, None], (N, None)]),
        (rows(1), {"y": rows(1)[0]}, {"y": {0: N}, "x": {0: N}}),
        ((), {"y": rows(1)[0], "x": rows(1)[0]}, {"x": {0: N}, "y": {0: N}}),
        ((rows(1) * 2), {}, ({0: N}, {0: N})),  # one tensor, given twice
    ],
)
def test_axes_of_one_name_grow_together(args: Any, kwargs: Any, shapes: Any) -> None:
    program = capture(Add().eval(), args, kwargs, dynamic_shapes=shapes)
    assert header(program) == "program(%x: f32[n, 3], %y: f32[n, 3])"
    x, y = rows(5, 5)
    assert_same(x + y, program(x=x, y=y))


def test_two_hints_that_must_agree_share_one_name() -> None:
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.AUTO})
    program = assert_captured(Add().eval(), rows(1, 1), rows(6, 6), dynamic_shapes=shapes)
    assert header(program) == "program(%x: f32[x_dim_0, 3], %y: f32[x_dim_0, 3])"


def test_several_dimensions_of_size_1() -> None:
    shapes = {"ids": {0: N, 1: LENGTH}, "mask": {0: N, 1: LENGTH}}

    class Masked(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return (ids.float() * mask).sum(-1)

    def call(*size: int) -> tuple[Tensor, Tensor]:
        return torch.ones(size, dtype=torch.long), torch.rand(size)

    calls = [call(1, 1), call(3, 5), call(1, 4), call(4, 1)]
    program = assert_captured(Masked().eval(), *calls, dynamic_shapes=shapes)
    assert header(program) == "program(%ids: i64[n, length], %mask: f32[n, length])"


class Twice(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, x]) + y


class Shorter(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x[1:] + y


@pytest.mark.parametrize(
    ("model", "shapes", "calls", "printed"),
    [
        (Twice(), ({0: HALF}, {0: 2 * HALF}), [(3, 6), (5, 10)], ("half", "2*half")),
        (Twice(), ({0: HALF}, {0: 2 * HALF}), [(1, 2), (5, 10)], ("half", "2*half")),
        (Shorter(), ({0: HALF + 1}, {0: HALF}), [(4, 3), (9, 8)], ("half + 1", "half")),
        (Shorter(), ({0: HALF + 1}, {0: HALF}), [(2, 1), (9, 8)], ("half + 1", "half")),
    ],
)
def test_derived_dimensions_grow_with_their_root(
    model: nn.Module, shapes: Any, calls: Any, printed: tuple[str, str]
) -> None:
    made = [rows(*sizes) for sizes in calls]
    program = assert_captured(model.eval(), *made, dynamic_shapes=shapes)
    assert header(program) == f"program(%x: f32[{printed[0]}, 3], %y: f32[{printed[1]}, 3])"


def test_a_derived_dimension_alone_has_the_name_of_its_root() -> None:
    model = Lambda(lambda x: x.view(-1, 2, 3).sum(1))
    shapes = (({0: 2 * HALF},),)
    program = assert_captured(model, rows(4), rows(10), dynamic_shapes=shapes)
    assert header(program) == "program(%args_0: f32[2*half, 3])"
    assert "f32[half, 3]" in text(program)


def test_nested_and_starred_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, batch: dict[str, Any], *more: Tensor) -> Tensor:
            total: Tensor = batch["a"] + batch["b"][0] + sum(more)
            return total

    def call(n: int) -> tuple[Any, ...]:
        return {"a": rows(n)[0], "b": [rows(n)[0]]}, *rows(n, n)

    one = {0: N}
    shapes = {"batch": {"a": one, "b": [one]}, "more": (one, one)}
    assert_captured(Nested().eval(), call(1), call(4), dynamic_shapes=shapes)
    assert_captured(
        Nested().eval(), call(3), call(4), dynamic_shapes=({"a": one, "b": [one]}, (one, one))
    )


def test_a_shapes_collection_finds_tensors_that_are_replaced_for_the_trace() -> None:
    (x,) = rows(1)
    shapes = ShapesCollection()
    shapes[x] = {0: N}
    program = capture(LINEAR, (x,), dynamic_shapes=shapes)
    assert header(program) == "program(%input: f32[n, 3])"


def test_additional_inputs_make_their_axes_dynamic() -> None:
    shapes = AdditionalInputs()
    for size in (5, 9):
        shapes.add(rows(size))
    program = assert_captured(LINEAR, rows(1), rows(7), dynamic_shapes=shapes)
    assert header(program) == "program(%input: f32[input_dim_0, 3])"


def test_a_dynamic_int_is_an_input() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    shapes = {"x": None, "n": Dim.DYNAMIC}
    assert_captured(Scale().eval(), (*rows(2), 3), (*rows(2), 5), dynamic_shapes=shapes)


# -- size 1 is not always what 2 is ---------------------------------------------------------------


def test_a_hint_that_only_fits_at_size_1_becomes_static_where_torch_may_choose() -> None:
    shapes = ({0: Dim.AUTO}, {0: Dim.AUTO})
    program = assert_captured(Add().eval(), rows(1, 4), rows(1, 7), dynamic_shapes=shapes)
    assert header(program) == "program(%x: f32[1, 3], %y: f32[y_dim_0, 3])"
    assert "became static" in program.remarks[0]


@pytest.mark.parametrize("pair", [(Dim.DYNAMIC, Dim.DYNAMIC), (Dim("a"), Dim("b"))])
def test_a_dimension_that_only_fits_at_size_1_is_refused(pair: Any) -> None:
    shapes = ({0: pair[0]}, {0: pair[1]})
    with pytest.raises(CaptureError, match="leave the dimension static"):
        capture(Add().eval(), rows(1, 4), dynamic_shapes=shapes)


def test_a_model_that_does_something_else_at_size_1_is_refused() -> None:
    def special(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x * 3

    with pytest.raises(CaptureError, match="the traced graph is not the model"):
        capture(Lambda(special), rows(1), dynamic_shapes=(({0: N},),))


def test_squeeze_is_what_it_is_at_size_1() -> None:
    shapes = (({0: N},),)
    assert_captured(Lambda(lambda x: x.squeeze()), rows(1), rows(4), dynamic_shapes=shapes)


# -- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "because"),
    [
        (({5: N},), "names axis 5 of an input with 2 axes"),
        (({-1: N},), "names axis -1 of an input with 2 axes"),
        (({"rows": N},), "names axis 'rows' of an input with 2 axes"),
        ({"z": {0: N}}, "names 'z', which is not among the inputs"),
        (({0: N}, {0: N}), "`inputs` has 1 elements, but `dynamic_shapes` has 2"),
        (({0: "batch"},), r"write torch\.export\.Dim\('batch'\)"),
        ((N,), "describes an input by Dim"),
        (((N,),), "has 1 entries for an input with 2 axes"),
        (({0: Dim("n", max=1)},), "has size 4 in dimension n"),
        (({0: Dim("n", min=5, max=9)},), "declared to be from 5 to 9"),
        (({0: Dim("n", max=3)},), "declared to be from 0 to 3"),
        (({0: 2 * Dim("n", max=1)},), "declared to be from 0 to 2"),
    ],
)
def test_a_declaration_that_does_not_fit_the_inputs(shapes: Any, because: str) -> None:
    with pytest.raises(UsageError, match=because):
        capture(LINEAR, rows(4), dynamic_shapes=shapes)


def test_a_dimension_that_may_not_exceed_1_is_refused() -> None:
    with pytest.raises(UsageError, match="declared dynamic with largest size 1"):
        capture(LINEAR, rows(1), dynamic_shapes=({0: Dim("n", max=1)},))


def test_a_collection_over_other_tensors_is_refused() -> None:
    other, shapes = torch.ones(3), ShapesCollection()
    shapes[other] = {0: N}
    with pytest.raises(UsageError, match="name only tensors that are among the example inputs"):
        capture(LINEAR, rows(3), dynamic_shapes=shapes)


def test_starred_keywords_cannot_be_dynamic() -> None:
    class Named(nn.Module):
        def forward(self, **tensors: Tensor) -> Tensor:
            return tensors["a"] * 2

    with pytest.raises(CaptureError, match="name these inputs in the signature of forward"):
        capture(Named().eval(), (), {"a": rows(2)[0]}, dynamic_shapes={"tensors": {"a": {0: N}}})


@pytest.mark.parametrize(
    ("function", "because"),
    [
        (lambda x: x * 2 if x.shape[0] > 5 else x, r"does not work for every size.*"),
        (lambda x: x + torch.ones(4, 3), r"does not work for every size.*"),
    ],
)
def test_a_model_that_needs_a_size_says_so(function: Callable[..., Any], because: str) -> None:
    with pytest.raises(CaptureError, match=because) as caught:
        capture(Lambda(function), rows(4), dynamic_shapes=(({0: N},),))
    assert caught.value.hint is not None
    assert "n = " in caught.value.hint


# -- calls ----------------------------------------------------------------------------------------


def test_calls_are_held_to_the_declared_sizes() -> None:
    shapes = ({0: Dim("n", max=8)}, {0: Dim("n", max=8)})
    program = capture(Add().eval(), rows(3, 3), dynamic_shapes=shapes)
    with pytest.raises(UsageError, match="has size 9 in dimension n, which may be from 0 to 8"):
        program(*rows(9, 9))
    with pytest.raises(UsageError, match="input 'y' has size 2 in dimension n, which is 3 by"):
        program(*rows(3, 2))
    twice = capture(Twice().eval(), rows(3, 6), dynamic_shapes=({0: HALF}, {0: 2 * HALF}))
    with pytest.raises(UsageError, match=r"has size 5 in dimension 2\*half, which is 6"):
        twice(*rows(3, 5))


@pytest.mark.parametrize(
    ("marker", "sample", "expected"),
    [
        (Dim("batch", min=3), 5, (3, None)),
        (Dim("batch", min=3, max=9), 5, (3, 9)),
        (Dim("batch", max=9), 5, (0, 9)),
        (Dim.DYNAMIC, 5, (0, None)),
        (Dim.DYNAMIC(min=4, max=8), 5, (4, 8)),
        (Dim.DYNAMIC(min=1), 5, (1, None)),
    ],
)
def test_ranges_are_those_declared(marker: Any, sample: int, expected: Any) -> None:
    program = capture(LINEAR, rows(sample), dynamic_shapes=({0: marker},))
    assert list(program.signature.ranges.values()) == [expected]


def test_a_sample_outside_of_its_hint_is_refused() -> None:
    for size in (3, 9):
        with pytest.raises(UsageError, match=f"size {size} in dimension 0(.|\\n)*from 4 to 8"):
            capture(LINEAR, rows(size), dynamic_shapes=({0: Dim.DYNAMIC(min=4, max=8)},))


@pytest.mark.parametrize("least", [(2, 0), (0, 2)])
def test_of_two_hints_for_one_size_the_narrower_counts(least: tuple[int, int]) -> None:
    shapes = tuple({0: Dim.DYNAMIC(min=n) if n else Dim.DYNAMIC} for n in least)
    program = capture(Add().eval(), rows(5, 5), dynamic_shapes=shapes)
    assert list(program.signature.ranges.values()) == [(2, None)]


@pytest.mark.parametrize("sizes", [(4, 1), (1, 4)])
def test_one_dimension_of_size_1_beside_a_larger(sizes: tuple[int, int]) -> None:
    def outer(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.transpose(0, 1)

    shapes = (({0: N}, {0: LENGTH}),)
    program = assert_captured(
        Lambda(outer).eval(), rows(*sizes), rows(2, 3), rows(5, 1), dynamic_shapes=shapes
    )
    assert header(program).count("[n, 3]") == header(program).count("[length, 3]") == 1


def test_an_axis_that_would_be_1_at_the_smallest_root_is_traced_larger() -> None:
    call = Call(rows(2, 1), {}, ("x", "y"), {})
    axes = dynamic_axes(Shorter(), call, ({0: HALF + 1}, {0: HALF}))
    assert [tuple(x.shape) for x in enlarge_singletons(call, axes).args] == [(3, 3), (2, 3)]
    shorter = ({0: HALF}, {0: HALF - 1})
    axes = dynamic_axes(Shorter(), call, shorter)
    assert [tuple(x.shape) for x in enlarge_singletons(call, axes).args] == [(3, 3), (2, 3)]
