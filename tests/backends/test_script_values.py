"""What a TorchScript file computes: arithmetic on sizes, constants, dtypes, overloads, branches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.errors import UnsupportedError
from tests.support.script_files import agrees, module, written

F = nn.functional
X = torch.linspace(-1, 2, 12).reshape(3, 4)
B = Dim("b", min=2, max=64)


def _ones(size: Any, x: Tensor) -> Tensor:
    return x.new_ones(size) + x.sum()


SIZES = {
    "floor": lambda self, x: x * (x.shape[0] // 2) + (-x.shape[0]) // 2,
    "remainder": lambda self, x: _ones((-x.shape[0]) % 4 + 5, x),
    "smaller": lambda self, x: _ones(min(x.shape[0], 4) + 5, x),
    "larger, real": lambda self, x: x * torch.sym_max(x.shape[0], 4.5),
    "root": lambda self, x: x * torch._sym_sqrt(x.shape[0]),  # type: ignore[attr-defined]
    "real power": lambda self, x: x * x.shape[0] ** 0.5,
    "power": lambda self, x: _ones(x.shape[0] ** 2 + 5, x),
    "real quotient": lambda self, x: x * (1.0 / x.shape[0]),
    "ceiling": lambda self, x: _ones(math.ceil(x.shape[0] / 2) + 5, x),
    "rounded": lambda self, x: _ones(round(x.shape[0] / 2) + 5, x),
    "cut": lambda self, x: x * math.trunc(x.shape[0] / 3),
    "bits": lambda self, x: _ones((x.shape[0] & 3) + 5, x) * ((x.shape[0] | 8) << 1),
    "sum": lambda self, x: x * torch.sym_sum([x.shape[0], x.shape[0], 3]),
    "choice": lambda self, x: x * torch.sym_ite((x.shape[0] > 2) & (x.shape[0] < 5), 2.5, 3.5),
    "count": lambda self, x: x * x.numel() + torch.full((x.shape[0], 1), x.shape[0]),
    "strided": lambda self, x: torch.arange(0, x.shape[0] * 2, 2) + x.sum(),
}


@pytest.mark.parametrize("what", SIZES)
def test_arithmetic_on_sizes(what: str, tmp_path: Path) -> None:
    others = [(torch.randn(5, 4),), (torch.randn(64, 4),)]
    agrees(module(SIZES[what]), tmp_path / "model.pt", (X,), others, dynamic_shapes=({0: B},))


def test_sizes_derived_from_others(tmp_path: Path) -> None:
    d = Dim("d", min=2, max=20)
    shapes = ({0: 2 * d}, {0: d}, {0: d + 1})
    args = (torch.randn(6, 4), X, torch.randn(4, 4))

    def forward(self: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x + torch.cat([y, z[1:]])

    other = (torch.randn(10, 4), torch.randn(5, 4), torch.randn(6, 4))
    agrees(module(forward), tmp_path / "model.pt", args, [other], dynamic_shapes=shapes)
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    for wrong in ((10, 4, 6), (9, 5, 6), (10, 5, 5), (42, 21, 22), (2, 1, 2)):
        with pytest.raises(torch.jit.Error, match=r"input '[xyz]' must be f32"):
            loaded(*(torch.randn(size, 4) for size in wrong))


def test_a_size_that_is_a_multiple_of_what_nobody_knows(tmp_path: Path) -> None:
    shapes = ({0: 2 * Dim("d", min=2, max=20)},)
    model = module(lambda self, x: x.reshape(-1, 2, 4).sum(1))
    agrees(
        model,
        tmp_path / "model.pt",
        (torch.randn(6, 4),),
        [(torch.randn(40, 4),)],
        dynamic_shapes=shapes,
    )
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    for wrong in (7, 2, 42):
        with pytest.raises(torch.jit.Error, match="must be f32"):
            loaded(torch.randn(wrong, 4))


def test_a_batch_of_one_and_of_none(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    others = [(torch.randn(1, 3, 4, 4),), (torch.randn(0, 3, 4, 4),), (torch.randn(9, 3, 4, 4),)]
    shapes = ({0: Dim("b", min=0, max=9)},)
    path = tmp_path / "model.pt"
    agrees(net, path, (torch.randn(8, 3, 4, 4),), others, dynamic_shapes=shapes)


CONSTANTS = {
    "infinite": lambda self, x: x.masked_fill(x > 0, float("-inf")).softmax(-1),
    "smallest": lambda self, x: x.masked_fill(x > 0, torch.finfo(torch.float32).min),
    "large and small": lambda self, x: (x.double() * 1.7e308) + 5e-324 + 0.1,
    "widest integers": lambda self, x: (x.long() + (2**63 - 1)).clamp(-(2**63), 5),
    "tensor": lambda self, x: x + torch.tensor([1.0, float("inf"), -float("inf"), 0.0]),
    "complex": lambda self, x: (x * (1.5 + 2j)).imag,
    "scalar": lambda self, x: x + torch.tensor(2.5),
}


@pytest.mark.parametrize("what", CONSTANTS)
def test_constants(what: str, tmp_path: Path) -> None:
    agrees(module(CONSTANTS[what]), tmp_path / "model.pt", (X,))


DTYPES = (
    "float16 bfloat16 float64 int64 int32 int16 int8 uint8 uint16 bool complex64 complex128 "
    "float8_e4m3fn"
).split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_inputs_constants_and_outputs(dtype: str, tmp_path: Path) -> None:
    held = torch.ones(3, 4).to(getattr(torch, dtype))
    model = module(lambda self, x: (torch.cat([x, self.held]), x.reshape(4, 3)), held=held)
    written(model, tmp_path / "model.pt", (held,))
    found = torch.jit.load(str(tmp_path / "model.pt"))(held)
    assert [t.dtype for t in found] == [held.dtype, held.dtype]
    assert bool((found[0].to(torch.complex64) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", ["none", "exact"])
def test_models_of_other_types(dtype: torch.dtype, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16)
    )
    agrees(
        net.to(dtype).eval(),
        tmp_path / "model.pt",
        (torch.randn(16, 3, 8, 8, dtype=dtype),),
        recipe=recipe,
    )


_I = torch.tensor([0, 2])
OVERLOADS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "to": (lambda self, x: x.to(torch.float64, copy=True), (X,)),
    "like": (lambda self, x: torch.zeros_like(x, memory_format=torch.channels_last) + x,
             (torch.randn(1, 2, 3, 4),)),
    "made": (lambda self, x: torch.zeros(3, 4, dtype=torch.int32, device="cpu") + x, (X,)),
    "sum": (lambda self, x: torch.sum(x, 1, keepdim=True, dtype=torch.float64), (X,)),
    "deviation": (lambda self, x: torch.var(x, dim=1, correction=0), (X,)),
    "norm": (lambda self, x: torch.linalg.vector_norm(x, float("inf"), dim=1), (X,)),
    "divide": (lambda self, x: torch.div(x, 0.3, rounding_mode="floor"), (X,)),
    "power of a number": (lambda self, x: 2**x, (X,)),
    "index": (lambda self, x, i: x[:, None, i], (X, _I)),
    "scatter": (lambda self, x, i: x.index_put((i,), torch.ones(()), accumulate=True), (X, _I)),
    "reduce": (lambda self, x, i: x.scatter_reduce(0, i, x[:1], reduce="amax"),
               (X, torch.zeros(1, 4, dtype=torch.long))),
    "resize": (lambda self, x: F.interpolate(x, size=(7, 5), mode="bilinear"),
               (torch.randn(1, 2, 3, 4),)),
    "scale": (lambda self, x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
              (torch.randn(1, 2, 4, 4),)),
    "resize a line": (lambda self, x: F.interpolate(x[None], size=7, mode="linear"), (X,)),
    "truth of two": (lambda self, x: torch.where(x > 0, True, False), (X,)),
    "truth of one": (lambda self, x: torch.where(x > 0, x > 1, True), (X,)),
    "truths": (lambda self, x: torch.full((3, 4), True) & (x > 0), (X,)),
    "truth and number": (lambda self, x: ((x > 0) * True, (x > 0) & True, x + True), (X,)),
    "split": (lambda self, x: torch.tensor_split(x, (1, 3), 1), (X,)),
    "clamp": (lambda self, x: x.clamp(min=-x, max=x.abs()), (X,)),
    "least": (lambda self, x: x.min(1), (X,)),
    "same": (lambda self, x: F.conv1d(x, torch.ones(2, 2, 3), padding="same"),
             (torch.randn(1, 2, 9),)),
}  # fmt: skip


@pytest.mark.parametrize("what", OVERLOADS)
def test_overloads_are_those_of_the_program(what: str, tmp_path: Path) -> None:
    function, args = OVERLOADS[what]
    agrees(module(function), tmp_path / "model.pt", args)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv3d": (nn.Conv3d(3, 4, 3), (1, 3, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (1, 3, 5, 5)),
    "one picture": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8)),
    "same padding": (nn.Conv2d(3, 4, (2, 4), padding="same", dilation=2), (1, 3, 8, 8)),
    "around": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 8, 8)),
    "lstm": (nn.LSTM(4, 8, batch_first=True, bidirectional=True, num_layers=2), (2, 7, 4)),
    "gru": (nn.GRU(4, 8), (7, 2, 4)),
    "one vector": (nn.Sequential(nn.Linear(4, 4), nn.GELU()), (4,)),
    "no rows": (nn.Linear(4, 8), (16, 0, 4)),
    "no features": (nn.Linear(0, 5), (16, 0)),
}


@pytest.mark.parametrize("what", LAYERS)
def test_layers(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[what]
    agrees(layer.eval(), tmp_path / "model.pt", (torch.randn(shape),))


def test_bounds_that_cross(tmp_path: Path) -> None:
    model = module(lambda self, x: self.layer(x).clamp(0.5, 0.2), layer=nn.Linear(4, 8))
    agrees(model, tmp_path / "model.pt", (torch.randn(16, 4),))


def test_one_weight_read_in_two_ways(tmp_path: Path) -> None:
    table = nn.Embedding(50, 8)
    model = module(lambda self, i: F.linear(self.table(i), self.table.weight), table=table)
    agrees(model, tmp_path / "model.pt", (torch.arange(32).reshape(2, 16),))


# -- branches and loops -----------------------------------------------------------------------

_COND = torch.cond


def _nested(self: nn.Module, x: Tensor) -> Tensor:
    def inner(v: Tensor) -> Tensor:
        return _COND(v.max() > 2, lambda w: w + self.table, lambda w: w * 3, (v,))

    return _COND(x.sum() > 0, inner, lambda v: v - 1, (x,))


def test_branches_within_branches(tmp_path: Path) -> None:
    model = module(_nested, table=torch.arange(4.0))
    agrees(model, tmp_path / "model.pt", (X,), [(X + 3,), (X - 9,)])


def test_a_branch_by_size(tmp_path: Path) -> None:
    model = module(lambda self, x: _COND(x.shape[0] > 4, lambda v: v + 1, lambda v: v * 2, (x,)))
    shapes = ({0: Dim("b", min=2, max=30)},)
    agrees(model, tmp_path / "model.pt", (X,), [(torch.randn(9, 4),)], dynamic_shapes=shapes)


def _loop(self: nn.Module, x: Tensor) -> Any:
    from torch._higher_order_ops import while_loop

    return while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 2), (torch.tensor(0), x))


def _scan(self: nn.Module, x: Tensor) -> Any:
    from torch._higher_order_ops import scan

    return scan(lambda c, v: (c + v, c * 1), torch.zeros(4), x)[1]


def _map(self: nn.Module, x: Tensor) -> Any:
    from torch._higher_order_ops.map import map as mapped

    double: Any = torch.Tensor.double
    return mapped(double, x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_loop, r"higher_order\.while_loop has no form in TorchScript\n  at: while_loop"),
        (_scan, r"higher_order\.scan has no form in TorchScript\n  at: scan"),
        (_map, r"higher_order\.map_impl has no form in TorchScript\n  at: map_impl"),
        (
            lambda self, x: x.view(torch.int32),
            r"does not take this program(.|\n)*aten\.view\.dtype",
        ),
        (lambda self, x: torch.ops.planish_tests.twice(x), r"planish_tests\.twice is no operator"),
    ],
)
def test_refusals_name_the_operator(function: Any, message: str, tmp_path: Path) -> None:
    library = torch.library.Library("planish_tests", "FRAGMENT")
    if not hasattr(torch.ops.planish_tests, "twice"):
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library._register_fake("twice", torch.empty_like)
    with pytest.raises(UnsupportedError, match=message) as caught:
        written(module(function), tmp_path / "model.pt", (X,))
    assert caught.value.hint
    assert caught.value.where
    assert "<eval_with_key>" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# -- chance -----------------------------------------------------------------------------------

CHANCE = {
    "rand": lambda self, x: x + torch.rand(3, 4),
    "like": lambda self, x: x + torch.randn_like(x),
    "coins": lambda self, x: torch.bernoulli(x.sigmoid()),
    "dropout": lambda self, x: F.dropout(x, 0.5, True),
    "order": lambda self, x: x.sum() + torch.randperm(4),
}


@pytest.mark.parametrize("what", CHANCE)
def test_chance_is_drawn_from_the_generator_in_every_call(what: str, tmp_path: Path) -> None:
    model = module(CHANCE[what])
    result = written(model, tmp_path / "model.pt", (X,))
    assert any("draws from torch's generator" in text for text in result.report.remarks)
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    torch.manual_seed(7)
    expected = [model(X) for _ in range(3)]
    torch.manual_seed(7)
    found = [loaded(X) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(found[0], other) for other in found)
