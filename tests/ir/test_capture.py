"""Capture: the caller's own calls and structures in and out, and the model left as it was."""

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.modeling_outputs import BaseModelOutput

from planish.ir import capture, from_exported, text
from planish.ir.errors import CaptureError, UsageError
from tests.support.lambdas import Lambda, assert_captured, copies
from tests.support.nets import assert_same

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

# -- results --------------------------------------------------------------------------------------

Two = collections.namedtuple("Two", ["a", "b"])


@dataclass
class Out:
    a: Tensor
    b: Tensor | None = None
    n: int = 3


@dataclass(frozen=True)
class Inner:
    v: Tensor


@dataclass
class Outer:
    inner: Inner
    many: list[Any]
    by_name: dict[str, Any]


@dataclass
class Checked:
    v: Tensor

    def __post_init__(self) -> None:
        self.rows = self.v.shape[0]


RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "nested": lambda x: {"a": [x, (x + 1, None)], "b": {"c": 2.5, "d": "word", "e": True}},
    "named tuple": lambda x: Two(x, [x]),
    "ordered dict": lambda x: collections.OrderedDict(b=x, a=x + 1),
    "dataclass": lambda x: Out(x + 1, x * 2),
    "dataclass with defaults": lambda x: Out(x + 1),
    "nested dataclasses": lambda x: (Outer(Inner(x), [x + 1, Inner(x * 2)], {"k": x}), None),
    "dataclass that computes": lambda x: Checked(x * 2),
    "model output": lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, x + 1)),
    "torch's own": lambda x: x.max(0),
    "input as it is": lambda x: x,
    "one value twice": lambda x: (x + 1,) * 2,
    "a number": lambda x: 3,
    "nothing": lambda x: None,
    "empty": lambda x: (),
    "a size": lambda x: (x.shape[0], x.numel()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_come_back_in_the_callers_structure(name: str) -> None:
    model = Lambda(RESULTS[name])
    program = assert_captured(model, (X,), (X * 2,))
    assert type(program(X)) is type(model(X))


def test_results_are_named_by_their_place() -> None:
    program = capture(Lambda(lambda x: {"x": x, "pair": (x, x), "out": Out(x)}), (X,))
    assert program.signature.output_names == ("x", "pair_0", "pair_1", "out_a", "out_n")
    assert capture(Lambda(lambda x: (x, [x])), (X,)).signature.output_names == (
        "output_0",
        "output_1_0",
    )


def test_a_result_named_like_an_input_gets_another_name() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x + 1}

    assert capture(Same().eval(), (X,)).signature.output_names == ("x_out",)


@pytest.mark.parametrize("make", [lambda x: {x}, lambda x: (y for y in [x]), lambda x: object()])
def test_a_result_that_cannot_be_taken_apart_is_refused(make: Any) -> None:
    with pytest.raises(CaptureError, match=r"forward returns a .*, which cannot be taken apart"):
        capture(Lambda(make), (X,))


# -- arguments ------------------------------------------------------------------------------------


class Keywords(nn.Module):
    def forward(
        self, a: Tensor, *, b: Tensor, c: Tensor | None = None, scale: float = 2.0, mode: str = "x"
    ) -> Tensor:
        y = a + b if c is None else a + b * c
        return y * scale if mode == "x" else y - scale


def test_calls_may_mix_positions_and_names() -> None:
    model = Keywords().eval()
    program = capture(model, (X,), {"b": X * 2})
    expected = model(X, b=X * 2)
    assert_same(expected, program(X, b=X * 2))
    assert_same(expected, program(b=X * 2, a=X))
    assert_same(expected, program(X, b=X * 2, c=None, scale=2.0, mode="x"))
    assert program.signature.parameters == ("a", "b")


def test_keyword_order_follows_forward() -> None:
    program = capture(Keywords().eval(), (), {"scale": 3.0, "b": X, "a": X, "mode": "y"})
    assert program.signature.parameters == ("a", "b", "scale", "mode")
    assert program.signature.tensor_names == ("a", "b")
    assert program.signature.fixed == {2: 3.0, 3: "y"}


@pytest.mark.parametrize(
    ("args", "kwargs", "because"),
    [
        ((), {"b": X}, "missing input 'a'"),
        ((X, X, X), {}, "got 3 positional inputs"),
        ((X,), {"b": X, "a": X}, "input 'a' was given twice"),
        ((X,), {"b": X, "z": X}, "unknown input 'z'"),
        ((X,), {"b": X, "scale": 5.0}, "unknown input 'scale'"),
        ((X,), {"b": [X]}, "nested differently"),
        ((X,), {"b": None}, "input 'b' is a NoneType, not a tensor"),
        ((X,), {"b": X.double()}, "input 'b' is f64"),
        ((X,), {"b": X[:, :2]}, "input 'b' is f32"),
        ((X[0],), {"b": X}, "input 'a' is f32"),
    ],
)
def test_a_call_that_differs_from_capture_is_refused(args: Any, kwargs: Any, because: str) -> None:
    program = capture(Keywords().eval(), (X,), {"b": X})
    with pytest.raises(UsageError, match=because.replace("[", r"\[")):
        program(*args, **kwargs)


def test_constants_are_compiled_in_and_checked() -> None:
    class Consts(nn.Module):
        def forward(
            self, x: Tensor, mask: Tensor | None, flag: bool, name: str, n: int, f: float
        ) -> Tensor:
            y = x * n + f if flag else x
            return y if mask is None or name == "off" else y * mask

    program = assert_captured(Consts().eval(), (X, None, True, "on", 3, 0.5))
    assert program.signature.input_names == ("x", "mask", "flag", "name", "n", "f")
    assert len(program.placeholders) == 1
    with pytest.raises(UsageError, match="input 'n' was the constant 3 at capture and is 4 now"):
        program(X, None, True, "on", 4, 0.5)
    with pytest.raises(UsageError, match="input 'mask' was the constant None"):
        program(X, X, True, "on", 3, 0.5)


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], *more: Tensor, **named: Tensor) -> Tensor:
        total: Tensor = batch["a"] + batch["b"]["c"][0] + sum(more)
        return total * named["w"]


def test_nested_starred_and_named_arguments() -> None:
    model = Nested().eval()
    batch = {"a": X, "b": {"c": [X * 2]}}
    program = capture(model, copies((batch, X, X)), {"w": X})
    assert program.signature.input_names == ("batch_a", "batch_b_c_0", "more_0", "more_1", "w")
    assert_same(model(batch, X * 3, X, w=X), program(batch, X * 3, X, w=X))


def test_a_dataclass_may_be_an_argument() -> None:
    class Takes(nn.Module):
        def forward(self, d: Inner) -> Tensor:
            return d.v + 1

    program = capture(Takes().eval(), (Inner(X),))
    assert program.signature.input_names == ("d_v",)
    assert_same(X + 1, program(Inner(X)))


def test_one_tensor_given_twice_is_two_inputs() -> None:
    program = assert_captured(Lambda(lambda a, b: a - b), (X, X), (X, X * 2))
    assert len(program.placeholders) == 2


@pytest.mark.parametrize(
    "args", [(torch.tensor(2.0),), (torch.zeros(0, 3),), (X > 0,), (torch.fft.fft(X),)]
)
def test_tensors_of_all_sorts(args: Any) -> None:
    assert_captured(Lambda(lambda x: x * 2), args)


def test_a_model_without_inputs() -> None:
    assert_captured(Lambda(lambda: torch.ones(3) * 2), ())


# -- what a model holds ---------------------------------------------------------------------------


class Holder(nn.Module):
    kept: Tensor
    dropped: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("dropped", torch.full((3,), 2.0), persistent=False)
        self.register_buffer("unused", torch.ones(9))
        self.plain = torch.arange(3.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y: Tensor = self.second(self.first(x)) + self.kept * self.dropped + self.plain
        return y + torch.tensor(3.0), self.kept


def test_constants_are_kept_once_with_their_values() -> None:
    model = Holder().eval()
    program = assert_captured(model, (X,))
    names = set(program.constants)
    assert {"kept", "dropped", "first.bias", "second.bias"} <= names
    assert len(names & {"first.weight", "second.weight"}) == 1
    assert "unused" not in names
    assert all(not c.requires_grad for c in program.constants.values() if isinstance(c, Tensor))


def test_blocks_of_grad_modes_and_autocast_are_flattened() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                y = self.linear(x)
            with torch.enable_grad():
                z = y + 1
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = self.linear(x)
            with torch.autocast("cpu", enabled=False):
                high = self.linear(x)
            return y, z, low, high

    program = assert_captured(Modes().eval(), (X,))
    assert "higher_order" not in text(program)


def test_regions_may_be_nested_and_hold_branches_and_writes() -> None:
    def regions(x: Tensor) -> Any:
        with torch.enable_grad():
            y = x * 2
            with torch.no_grad():
                y = y.relu_()
            with torch.autocast("cpu", enabled=False):
                z = torch.cond(y.sum() > 0, lambda v: v + 1, lambda v: v - 1, (y,))
            upper, lower = z.split(2)
            upper.add_(1)
        with torch.enable_grad():
            w = z * 1
        return y, z, upper, lower, w

    program = assert_captured(Lambda(regions), (X,), (-X.abs(),))
    assert text(program).count("higher_order") == 1  # the branch


def test_branches_of_cond_are_followed_both_ways() -> None:
    def nested(x: Tensor) -> Any:
        def inner(a: Tensor) -> Any:
            return torch.cond(a.mean() > 1, lambda b: b + 1, lambda b: b + 2, (a,))

        return torch.cond(x.sum() > 0, inner, lambda a: a - 1, (x,))

    assert_captured(Lambda(nested), (X.abs(),), (X.abs() + 2,), (-X.abs(),))


def test_assertions_are_dropped_with_a_remark() -> None:
    def asserting(x: Tensor) -> Tensor:
        assert x.shape[0] > 2
        torch._check(x.shape[1] == 3)
        torch._assert_async(x.sum() < 1e9)
        return x * 2

    shapes = (({0: Dim("n", min=3, max=99)},),)
    program = assert_captured(Lambda(asserting), (X,), dynamic_shapes=shapes)
    assert [str(n.target) for n in program.operators] == ["aten.mul.Tensor"]
    assert "run-time assertions of the traced model were dropped" in program.remarks[-1]


def test_drawing_random_numbers_is_a_remark() -> None:
    forgot = Lambda(lambda x: nn.functional.dropout(x, 0.5))
    assert "forward draws random numbers" in capture(forgot, (X,)).remarks[0]
    fine = Lambda(lambda x: nn.functional.dropout(x, 0.5, training=False))
    assert capture(fine, (X,)).remarks == ()


def test_a_compiled_model_is_taken_as_the_model_it_wraps() -> None:
    model = nn.Linear(3, 2).eval()
    compiled: Any = torch.compile(model)
    program = capture(compiled, (X,))
    assert_same(model(X), program(X))


# -- exported programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_is_taken_as_it_is(decomposed: bool) -> None:
    model = Holder().eval()
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: Dim("n")},))
    if decomposed:
        exported = exported.run_decompositions()
    before = str(exported)
    program = capture(exported)
    assert_same(model(X[:2]), program(X[:2]))
    assert_same((X,), program.samples[0])
    assert str(exported) == before


def test_an_exported_program_without_example_inputs_is_refused() -> None:
    exported = torch.export.export(nn.Linear(3, 2), (X,))
    exported._example_inputs = None
    with pytest.raises(CaptureError, match="carries no example inputs"):
        from_exported(exported)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


def test_nodes_of_no_module_name_none() -> None:
    net = nn.Sequential(nn.Conv1d(4, 2, 1), Flat()).eval()
    program = capture(net, (torch.randn(2, 4, 3),), dynamic_shapes=({0: Dim("batch")},))
    stacks = [node.meta.get("nn_module_stack") for node in program.operators]
    assert None in stacks  # the size of the input is nobody's
    assert {path for stack in stacks for path, _ in (stack or {}).values()} == {"", "0", "1"}
