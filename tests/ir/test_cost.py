"""Costs, checked against hand counts and torch's own FLOP counter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from planish.ir import Program, capture, from_exported
from planish.ir.cost import Cost, cost, macs_by_operator
from planish.ir.quantscheme import QuantScheme


class Call(nn.Module):
    """Any function of tensors, as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def program_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    module = function if isinstance(function, nn.Module) else Call(function)
    return capture(module.eval(), tuple(torch.randn(shape) for shape in shapes))


# Operators that torch counts too. A FLOP count is twice the multiply-accumulates.
COUNTED: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "linear": (nn.Linear(3, 5), [(2, 7, 3)]),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), [(2, 4, 9)]),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2), [(2, 4, 9, 8)]),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), [(2, 4, 9, 8)]),
    "same padding": (nn.Conv2d(4, 6, 3, padding="same"), [(2, 4, 9, 8)]),
    "conv3d": (nn.Conv3d(2, 4, 3, groups=2), [(1, 2, 5, 6, 7)]),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 4)]),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2), [(2, 4, 5)]),
    "matmul": (torch.matmul, [(5, 2, 3), (3, 4)]),
    "batched matmul": (torch.matmul, [(2, 1, 4, 3), (5, 3, 6)]),
    "bmm": (torch.bmm, [(5, 2, 3), (5, 3, 4)]),
    "addmm": (torch.addmm, [(4,), (2, 3), (3, 4)]),
    "baddbmm": (torch.baddbmm, [(5, 2, 4), (5, 2, 3), (5, 3, 4)]),
    "tensordot": (
        lambda a, b: torch.tensordot(a, b, dims=([1, 2], [0, 1])),
        [(2, 3, 4), (3, 4, 5)],
    ),
    "einsum": (lambda a, b: torch.einsum("bqd,bkd->bqk", a, b), [(2, 3, 4), (2, 5, 4)]),
    "einsum with an ellipsis": (
        lambda a, b: torch.einsum("...ij,jk->...ik", a, b),
        [(6, 2, 3), (3, 4)],
    ),
    "implicit einsum": (lambda a, b: torch.einsum("ij,jk", a, b), [(2, 3), (3, 4)]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_macs_are_half_of_torchs_flops(name: str) -> None:
    function, shapes = COUNTED[name]
    program = program_of(function, *shapes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*program.samples[0])
    assert counter.get_total_flops() > 0
    assert 2 * cost(program).macs == counter.get_total_flops()


# Operators that torch's counter does not know, or knows only in pieces.
BY_HAND: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int]] = {
    # 4 gates, 2 layers, both directions; the second layer reads both directions of the first.
    "lstm": (
        nn.LSTM(3, 5, 2, bias=False, bidirectional=True, batch_first=True),
        [(2, 7, 3)],
        2 * 7 * 4 * 2 * ((3 * 5 + 5 * 5) + (10 * 5 + 5 * 5)),
    ),
    "gru": (nn.GRU(3, 5), [(7, 2, 3)], 2 * 7 * 3 * (3 * 5 + 5 * 5)),
    "rnn": (nn.RNN(3, 5), [(7, 3)], 7 * (3 * 5 + 5 * 5)),
    "lstm cell": (nn.LSTMCell(3, 5), [(2, 3)], 2 * 4 * (3 * 5 + 5 * 5)),
    "matrix and vector": (torch.matmul, [(4, 3), (3,)], 12),
    # Scores over 7 queries and 9 keys, then the same number of products with the values.
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 5)],
        2 * 4 * 7 * 9 * (8 + 5),
    ),
    "bilinear": (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], 2 * 5 * (3 * 4 + 4)),
    "dot": (torch.dot, [(6,), (6,)], 6),
    "addmv": (torch.addmv, [(4,), (4, 3), (3,)], 12),
    "addbmm": (torch.addbmm, [(2, 4), (5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
    "einsum of three": (
        lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c),
        [(2, 3), (3, 4), (4, 5)],
        2 * 3 * 4 + 2 * 4 * 5,
    ),
    "implicit einsum of three": (
        lambda a, b, c: torch.einsum("ij,jk,kl", a, b, c),
        [(2, 3), (3, 4), (4, 5)],
        2 * 3 * 4 + 2 * 4 * 5,
    ),
    "implicit einsum of three with an ellipsis": (
        lambda a, b, c: torch.einsum("...ij,jk,kl", a, b, c),
        [(6, 2, 3), (3, 4), (4, 5)],
        6 * (2 * 3 * 4 + 2 * 4 * 5),
    ),
    "einsum of three that keeps an ellipsis": (
        lambda a, b, c: torch.einsum("...ij,jk,kl->...il", a, b, c),
        [(6, 2, 3), (3, 4), (4, 5)],
        6 * (2 * 3 * 4 + 2 * 4 * 5),
    ),
    "einsum of three that sums an ellipsis": (
        lambda a, b, c: torch.einsum("...ij,jk,kl->il", a, b, c),
        [(6, 2, 3), (3, 4), (4, 5)],
        6 * 2 * 3 * 4 + 2 * 4 * 5,
    ),
    "einsum of one long index": (
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
        [(2, 1), (1, 4)],
        2 * 1 * 4,
    ),
    "einsum that broadcasts": (
        lambda a, b: torch.einsum("...ij,...jk->...ik", a, b),
        [(1, 2, 3), (6, 3, 4)],
        6 * 2 * 3 * 4,
    ),
    "pointwise": (lambda a: torch.softmax(a.relu() * 2, -1), [(2, 3)], 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_macs_by_hand(name: str) -> None:
    function, shapes, expected = BY_HAND[name]
    assert cost(program_of(function, *shapes)).macs == expected


# torch fixes every size of a plain RNN.
@pytest.mark.parametrize("name", [name for name in (*COUNTED, *BY_HAND) if name != "rnn"])
def test_dynamic_sizes_cost_the_same(name: str) -> None:
    function, shapes = (COUNTED.get(name) or BY_HAND[name])[:2]
    static = program_of(function, *shapes)
    module = function if isinstance(function, nn.Module) else Call(function)
    free = tuple(dict.fromkeys(range(len(shape)), Dim.AUTO) for shape in shapes)
    dynamic_shapes: Any = free if isinstance(function, nn.Module) else (free,)
    program = capture(module.eval(), static.samples[0], dynamic_shapes=dynamic_shapes)
    assert program.signature.symbols
    assert macs_by_operator(program) == macs_by_operator(static)


class Tied(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("unused", torch.ones(1000))

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.out(self.embed(ids + self.steps))
        return result


def test_tied_and_unused_constants_count_once_and_not_at_all() -> None:
    program = capture(Tied().eval(), (torch.tensor([[1, 2, 3], [4, 5, 6]]),))
    assert cost(program) == Cost(parameters=40, bytes=40 * 4 + 3 * 8, macs=2 * 3 * 4 * 10)


def test_to_dict_is_plain() -> None:
    assert Cost(1, 2, 3).to_dict() == {"parameters": 1, "bytes": 2, "macs": 3}


def test_symbolic_sizes_count_as_the_sample_has_them() -> None:
    model = nn.Linear(4, 8).eval()
    for batch in (1, 2, 5):
        program = capture(model, (torch.randn(batch, 4),), dynamic_shapes=({0: Dim("n")},))
        assert cost(program).macs == batch * 32


def test_derived_sizes_are_solved_for_the_sample() -> None:
    def halves(x: Tensor) -> Tensor:
        return x.reshape(2, -1) @ x.reshape(-1, 2)

    sizes = ({0: 2 * Dim("half")},)
    program = capture(Call(halves).eval(), (torch.randn(12),), dynamic_shapes=(sizes,))
    assert cost(program).macs == 2 * 6 * 2


def test_the_first_sample_counts_and_not_the_one_that_was_traced() -> None:
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    rows = Dim("rows")
    sizes = ({0: 2 * rows}, {1: Dim("columns")})
    program = capture(
        Call(product).eval(), (torch.randn(6, 4), torch.randn(4, 5)), dynamic_shapes=(sizes,)
    )
    assert cost(program).macs == 6 * 4 * 5
    large, small = (torch.randn(10, 4), torch.randn(4, 7)), (torch.randn(2, 4), torch.randn(4, 1))
    program.samples = (large, small)
    assert cost(program).macs == 10 * 4 * 7
    program.samples = ()
    assert cost(program).macs == 6 * 4 * 5


def test_the_dearer_branch_counts() -> None:
    def choose(x: Tensor, w: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda a, b: a @ b @ b, lambda a, b: a @ b, (x, w))

    assert cost(program_of(choose, (2, 3), (3, 3))).macs == 2 * (2 * 3 * 3)


def test_operators_are_listed_dearest_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 9, 3))
    counts = macs_by_operator(program_of(model, (2, 4)))
    assert list(counts.items()) == [("aten.conv1d", 2 * 9 * 2 * 3), ("aten.linear", 32)]


def test_operators_of_one_cost_are_listed_by_name() -> None:
    model = Call(lambda x, w: torch.addmm(x @ w, x, w) + F.linear(x, w))
    counts = macs_by_operator(program_of(model, (3, 3), (3, 3)))
    assert list(counts) == ["aten.addmm", "aten.linear", "aten.matmul"]
    assert set(counts.values()) == {27}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    ],
)
def test_a_decomposed_convolution_costs_the_same(module: nn.Module, shape: tuple[int, ...]) -> None:
    whole = torch.export.export(module.eval(), (torch.randn(shape),))
    parts = from_exported(whole.run_decompositions())
    assert list(macs_by_operator(parts)) == ["aten.convolution"]
    assert cost(parts).macs == cost(from_exported(whole)).macs


def test_a_size_that_the_data_decides_counts_once() -> None:
    program = program_of(lambda x, w: x.nonzero().float() @ w, (4, 3), (2, 5))
    assert cost(program).macs == 2 * 5


def test_sizes_with_a_rest_and_numbers_among_the_inputs() -> None:
    odd = ({0: 2 * Dim("n") + 1},)
    program = capture(nn.Linear(3, 5).eval(), (torch.randn(7, 3),), dynamic_shapes=odd)
    program.samples = ((torch.randn(11, 3),),)
    assert cost(program).macs == 11 * 3 * 5

    def repeated(x: Tensor, n: Any) -> Tensor:
        return x.expand(n, 3) @ x.reshape(3, 1)

    shapes: Any = ((None, Dim.DYNAMIC),)
    program = capture(Call(repeated).eval(), (torch.randn(1, 3), 5), dynamic_shapes=shapes)
    assert cost(program).macs == 5 * 3
    program.samples = ((torch.randn(1, 3), 8),)
    assert cost(program).macs == 8 * 3


def test_quantized_weights_count_as_they_are_packed() -> None:
    scheme = QuantScheme(dtype="int4", granularity="block", axis=1, block_size=4)
    scale, zero = scheme.qparams_of(torch.randn(3, 8))

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Buffer(scheme.quantize(torch.randn(3, 8), scale, zero))
            self.scale, self.zero = nn.Buffer(scale), nn.Buffer(zero)
            self.bias = nn.Buffer(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.planish.dequantize(
                self.codes, self.scale, self.zero, dtype="int4", axis=1, block_size=4
            )
            return F.linear(x, weight, self.bias)

    found = cost(capture(Packed().eval(), (torch.randn(2, 8),)))
    assert found.parameters == 24 + 3
    # 24 codes, 6 scales, 6 zero points, 3 float biases
    assert found.bytes == 12 + 24 + 6 + 12
    assert found.macs == 2 * 3 * 8
