"""What a program accepts from its caller, and in which words it refuses the rest."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir import Program, capture
from planish.ir.contract import check_inputs
from planish.ir.errors import UsageError, VerificationError
from tests.support.nets import branch_program

# -- types and sizes ------------------------------------------------------------------------------


class Sizes(nn.Module):
    """Two dynamic dimensions; one is read twice, one is derived, one is static."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x.sum() + y.sum() + z.sum()


@cache
def sized() -> Program:
    rows, columns = Dim("rows", min=2, max=8), Dim("columns", min=1)
    shapes = ({0: rows, 1: columns}, {0: columns}, {0: 2 * rows})
    args = (torch.ones(3, 4), torch.ones(4, 5), torch.ones(6))
    return capture(Sizes().eval(), args, dynamic_shapes=shapes)


def inputs(rows: int = 3, columns: int = 4, again: int = 4, double: int = 6) -> list[Tensor]:
    return [torch.ones(rows, columns), torch.ones(again, 5), torch.ones(double)]


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (8, 100), (3, 4), (5, 5)])
def test_every_legal_size_is_accepted(rows: int, columns: int) -> None:
    check_inputs(sized(), inputs(rows, columns, columns, 2 * rows))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            inputs(rows=1, double=2),
            "input 'x' has size 1 in dimension rows, which may be from 2 to 8",
        ),
        (
            inputs(rows=9, double=18),
            "input 'x' has size 9 in dimension rows, which may be from 2 to 8",
        ),
        (inputs(again=5), "input 'y' has size 5 in dimension columns, which is 4 by input 'x'"),
        (inputs(double=7), "input 'z' has size 7 in dimension 2*rows, which is 6 by input 'x'"),
        (
            [torch.ones(3, 4).double(), *inputs()[1:]],
            "input 'x' is f64[3, 4]; the program takes f32[rows, columns]",
        ),
        (
            [torch.ones(3), *inputs()[1:]],
            "input 'x' is f32[3]; the program takes f32[rows, columns]",
        ),
        (
            [inputs()[0], torch.ones(4, 6), inputs()[2]],
            "input 'y' is f32[4, 6]; the program takes f32[columns, 5]",
        ),
        ([inputs()[0], 3, inputs()[2]], "input 'y' is a int, not a tensor f32[columns, 5]"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(given: list[Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_inputs(sized(), given)
    assert caught.value.what == says


def test_a_derived_size_names_only_the_inputs_that_decide_it() -> None:
    a, b = Dim("a"), Dim("b")
    args = (torch.ones(3), torch.ones(4), torch.ones(6))
    program = capture(Sizes().eval(), args, dynamic_shapes=({0: a}, {0: b}, {0: 2 * a}))
    with pytest.raises(UsageError) as caught:
        check_inputs(program, [torch.ones(3), torch.ones(5), torch.ones(8)])
    assert caught.value.what.endswith("in dimension 2*a, which is 6 by input 'x'")


def test_a_size_without_an_upper_end_says_so() -> None:
    program = sized().clone()
    ranges = {symbol: (2, None) for symbol in program.signature.ranges}
    program.signature = dataclasses.replace(program.signature, ranges=ranges)
    check_inputs(program, inputs(rows=9, double=18))
    with pytest.raises(UsageError, match="which may be from 2 to any size"):
        check_inputs(program, inputs(columns=1, again=1))


# -- the call -------------------------------------------------------------------------------------


class Called(nn.Module):
    def forward(self, x: Tensor, n: int, mask: Tensor | None = None, flag: bool = False) -> Tensor:
        return x * n


@cache
def called() -> Program:
    return capture(Called().eval(), (torch.ones(2), 3), {"mask": None})


X = torch.full((2,), 5.0)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, 3, None), {}),
        ((X, 3), {"mask": None}),
        ((X, 3), {}),
        ((X,), {"n": 3}),
        ((), {"n": 3, "x": X}),
        ((), {"mask": None, "n": 3, "x": X}),
        ((X, 3), {"flag": False}),  # the default that `forward` has
    ],
)
def test_arguments_come_by_position_or_by_name(args: Any, kwargs: Any) -> None:
    assert torch.equal(called()(*args, **kwargs), X * 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X, 3, None, False), {}, "got 4 positional inputs; the program takes 3: x, n, mask"),
        ((X, 3), {"x": X}, "input 'x' was given twice"),
        ((X, 3), {"other": 1}, "unknown input 'other'"),
        ((X, 3), {"flag": True}, "unknown input 'flag'"),
        ((X, 3), {"flag": 0}, "unknown input 'flag'"),  # equal to False, and not it
        ((X,), {}, "missing input 'n'"),
        ((), {"n": 3}, "missing input 'x'"),
        ((X, 4), {}, "input 'n' was the constant 3 at capture and is 4 now"),
        (([X], 3), {}, "the inputs are nested differently than the example inputs were"),
        ((X, X), {}, "input 'n' was the constant 3 at capture and is tensor"),
        ((X, 3, X), {}, "input 'mask' was the constant None at capture and is"),
    ],
)
def test_a_call_that_is_another_is_refused(args: Any, kwargs: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        called()(*args, **kwargs)
    assert caught.value.what.startswith(says)
    assert says.endswith((" is", " is tensor")) or caught.value.what == says


class Optional(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.5, word: str = "mul") -> Tensor:
        return x * scale if word == "mul" else x + scale


def test_a_constant_may_be_left_out_where_forward_would_take_the_same() -> None:
    model = Optional().eval()
    program = capture(model, (X, float("2.5"), "mul"))  # equal to the default, and not it
    for args in ((X,), (X, float("2.5")), (X, 2.5, "".join(["m", "ul"]))):
        assert torch.equal(program(*args), X * 2.5)
    other = capture(model, (X, 3.5, "mul"))
    with pytest.raises(UsageError, match="missing input 'scale'"):
        other(X)
    assert torch.equal(other(X, 3.5), X * 3.5)


def test_where_names_are_unknown_a_call_is_taken_as_it_is() -> None:
    program = capture(Optional().eval(), (X, 2.5), {"word": "mul"})
    program.signature = dataclasses.replace(program.signature, parameters=())
    assert torch.equal(program(X, 2.5, word="mul"), X * 2.5)
    with pytest.raises(UsageError, match="nested differently"):
        program(X, 2.5, "mul")


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 3.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - 2 * y) * self.scale


@pytest.mark.parametrize("given", ["one tensor for both inputs", "the model's own parameter"])
def test_inputs_are_told_apart_whatever_the_example_was(given: str) -> None:
    model = Difference().eval()
    same = torch.ones(2)
    examples = (same, same) if given.startswith("one") else (same, model.scale)
    program = capture(model, examples)
    assert all(kept is example for kept, example in zip(program.samples[0], examples, strict=True))
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert torch.equal(program(x, y), model(x, y))
    assert torch.equal(program(x, y), program(y=y, x=x))


def test_an_exported_program_that_mistook_its_inputs_is_remarked_on() -> None:
    same = torch.ones(2)
    model = Difference().eval()
    exported = torch.export.export(model, (same, same))
    (remark,) = capture(exported).remarks
    assert remark.startswith("input 'x' is not read, and its example is another input's, too")
    assert capture(torch.export.export(model, (same, same.clone()))).remarks == ()


# -- constants that somebody else wrote -----------------------------------------------------------


def linear() -> Program:
    return capture(nn.Linear(3, 2).eval(), (torch.ones(1, 3),))


def test_edits_of_the_module_become_constants() -> None:
    program = linear()
    module, bias = program.graph_module, program.constants["bias"]
    weight = nn.Parameter(torch.zeros(2, 3))
    module.weight = weight
    program.absorb_module_edits()
    taken = program.constants["weight"]
    assert isinstance(taken, Tensor)
    assert taken.data_ptr() == weight.data_ptr()
    assert not taken.requires_grad
    assert program.constants["bias"] is bias
    assert program.graph_module is not module
    assert torch.equal(program(torch.ones(1, 3)), bias[None])  # type: ignore[index]


def test_a_module_edit_that_is_read_and_missing_is_refused() -> None:
    program = linear()
    _ = program.graph_module
    node = program.graph.find_nodes(op="get_attr")[0]
    node.target = "gone.away"
    with pytest.raises(VerificationError, match=r"reads 'gone\.away', which does not exist"):
        program.absorb_module_edits()


def test_without_a_module_there_is_nothing_to_absorb() -> None:
    program = linear()
    program.graph.find_nodes(op="get_attr")[0].target = "gone.away"
    program.absorb_module_edits()


def test_dead_constants_and_their_layouts_are_forgotten() -> None:
    from planish.ir.tensortype import SparseLayout

    program, layout = linear(), SparseLayout(2, 4, 1)
    program.constants["left.over"] = torch.ones(4)
    program.layouts = {"left.over": layout, "weight": layout}
    program.drop_dead_constants()
    assert set(program.constants) == {"weight", "bias"}
    assert program.layouts == {"weight": layout}


def test_the_module_is_for_inference_and_holds_what_is_read() -> None:
    program = linear()
    program.constants["left.over"] = torch.ones(4)
    module = program.graph_module
    assert not module.training
    assert set(module.state_dict()) | set(dict(module.named_buffers())) <= {"weight", "bias"}
    assert not hasattr(module, "left")


def test_only_a_tensor_is_the_value_of_a_constant() -> None:
    program = branch_program()
    kinds = {n.target: program.constant(n) for n in program.graph.find_nodes(op="get_attr")}
    assert kinds.pop("true_graph_0") is kinds.pop("false_graph_0") is None
    assert all(isinstance(value, Tensor) for value in kinds.values())
    assert program.constant(program.placeholders[0]) is program.constant(3) is None


def test_a_clone_shares_values_and_nothing_that_is_edited() -> None:
    program = linear()
    program.remarks = ("said",)
    edit: list[Callable[[Program], object]] = [
        lambda p: p.constants.clear(),
        lambda p: p.layouts.update({"weight": 1}),  # type: ignore[dict-item]
        lambda p: p.operators[0].meta.clear(),
        lambda p: p.output.meta.update({"mine": 1}),
        lambda p: p.graph.erase_node(p.output),
    ]
    before = str(program), dict(program.output.meta)
    for change in edit:
        copy = program.clone()
        assert copy.constants["weight"] is program.constants["weight"]
        assert (copy.signature, copy.samples) == (program.signature, program.samples)
        assert copy.remarks == ("said",)
        assert copy.output.meta.keys() == program.output.meta.keys()
        change(copy)
        assert (str(program), dict(program.output.meta)) == before
