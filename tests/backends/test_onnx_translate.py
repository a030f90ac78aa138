"""Every translation computes what torch does: program, file and ONNX Runtime agree.

One row per group of operators. Each is exported with the comparison on, so an export that returns
is an export whose file gave the program's outputs on the sample and at other sizes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.backends.base import Artifact, ExportOptions
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.errors import ExportError, UnsupportedError

BATCH = {0: Dim("batch")}


class Call(nn.Module):
    """A module that is one function of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def export(
    tmp_path: Path,
    model: nn.Module | Callable[..., Any],
    *args: Any,
    dynamic: Any = None,
    target: str = "onnx",
    **options: Any,
) -> Artifact:
    module = model if isinstance(model, nn.Module) else Call(model)
    shapes = dynamic
    if dynamic is not None and not isinstance(model, nn.Module):
        shapes = (dynamic,)
    program = capture(module.eval(), args, dynamic_shapes=shapes)
    return load_backend(target).export(program, tmp_path / "m.onnx", ExportOptions(**options))


POINTWISE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 2) * 3 - x / 4 + 1.5 * (1 - x),
    "alpha": lambda x: torch.add(x, x, alpha=3) + torch.rsub(x, x.abs(), alpha=2),
    "promotion": lambda x: x * (x > 0).to(torch.int64) + torch.arange(5) + (x > 0),
    "powers": lambda x: x**2 + x.abs() ** 0.5 + (x.abs() + 1) ** -0.5 + x**3 + 2**x,
    "roots": lambda x: x.abs().sqrt() + (x.abs() + 1).rsqrt() + (x.abs() + 1).log(),
    "rounding": lambda x: x.floor() + x.ceil() + x.round() + x.sign(),
    "integer division": lambda x: (
        torch.floor_divide((x * 9).to(torch.int64), 4),
        torch.div((x * 9).to(torch.int64), -4, rounding_mode="trunc"),
        (x * 9).to(torch.int64) % 4,
        torch.remainder(x * 9, -4.0),
        torch.div(x * 9, 4.0, rounding_mode="floor"),
        torch.div(x * 9, 4.0, rounding_mode="trunc"),
    ),
    "comparisons": lambda x: ((x > 0), (x >= 0.5), (x != x.abs()), (x == x), (x < 1), (x <= 0)),
    "logic": lambda x: (
        ((x > 0) & (x < 1)) | ~(x > 2),
        torch.logical_xor(x > 0, x < 1),
        torch.logical_not(x),
        ((x * 9).to(torch.int32) & 6) ^ 3,
    ),
    "clamps": lambda x: (
        x.clamp(-0.5, 0.5),
        x.clamp(min=0.1),
        x.clamp(max=0.2),
        F.relu6(x * 9),
        F.hardtanh(x, -0.3, 0.4),
        torch.clamp(x, x - 1, torch.zeros(5)),
    ),
    "activations": lambda x: (
        F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.hardswish(x),
        F.hardsigmoid(x), F.leaky_relu(x, 0.2), F.mish(x), F.softplus(x), F.elu(x), F.selu(x),
        F.celu(x), F.logsigmoid(x), torch.tanh(x), torch.sigmoid(x), F.softsign(x), torch.erf(x),
    ),
    "selection": lambda x: (
        torch.where(x > 0, x, 0.0),
        torch.where(x > 0, 1, 2),
        x.masked_fill(x < 0, -7.0),
        torch.maximum(x, -x),
        torch.minimum(x, x * 2),
    ),
    "trigonometry": lambda x: x.sin() + x.cos() + x.tan() + x.atan() + x.exp() + x.reciprocal(),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("opset", [18, 23])
def test_pointwise(tmp_path: Path, name: str, opset: int) -> None:
    artifact = export(tmp_path, POINTWISE[name], normal(3, 5), dynamic=(BATCH,), opset=opset)
    assert artifact.comparison is not None
    assert len(artifact.comparison.probes) == 2


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "reshapes": lambda x: (
        x.flatten(1), x.unsqueeze(1).squeeze(1), x.view(-1, 2), x.unflatten(2, (2, 2)),
        x.permute(2, 0, 1).flatten(), x.transpose(1, 2).reshape(x.shape[0], 12),
    ),
    "parts": lambda x: (
        x[:, 1:, ::2], x[0], x[:, -1], x.narrow(1, 0, 2), x[..., None], x[:, :, -2:],
    ),
    "splits": lambda x: (
        *x.chunk(2, 2), *x.split([1, 3], -1), *x.unbind(1), *x.flatten(1).split(6, -1),
    ),
    "joins": lambda x: (
        torch.cat([x, x * 2], 0), torch.stack([x, -x], 1), torch.cat([x, x.to(torch.float64)], -1),
    ),
    "copies": lambda x: (
        x[:, :1].expand(-1, 5, -1), x.repeat(1, 2, 1), x.expand(2, *x.shape), x.flip(1),
        x.roll(1, 2), torch.roll(x, (1, -1), (0, 1)), x.repeat_interleave(2, 1),
    ),
    "new tensors": lambda x: (
        torch.zeros(x.shape[0], 2) + 1, torch.full_like(x, 3.0), x.new_ones(x.shape[0]),
        torch.arange(x.shape[0]) + 1, torch.ones_like(x, dtype=torch.int64),
    ),
    "triangles": lambda x: (x.tril(), x.triu(1), (x > 0).tril()),
    "pads": lambda x: (
        F.pad(x, (1, 2)), F.pad(x, (1, 1, 0, 2), value=4.0), F.pad(x, (2, 1), mode="reflect"),
        F.pad(x, (1, 1), mode="replicate"), F.pad(x, (-1, 0)),
    ),
    "sizes": lambda x: (
        x.shape[0] * 2 + 1, x.reshape(x.shape[0] * 3, 4), x.new_zeros(x.shape[0] // 2 + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path: Path, name: str) -> None:
    export(tmp_path, SHAPES[name], normal(2, 3, 4), dynamic=(BATCH,))


REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "means": lambda x: (x.mean(), x.mean(-1), x.mean((1, 2), keepdim=True), x.sum(), x.sum(1)),
    "integers": lambda x: ((x > 0).sum(1), (x * 9).to(torch.int64).sum(), x.to(torch.int64).prod()),
    "extremes": lambda x: (
        x.amax(1), x.amin((1, 2)), *x.max(2), *x.min(1, keepdim=True), x.max(), x.argmax(1),
        x.argmin(), x.argmax(2, keepdim=True),
    ),
    "truth": lambda x: ((x > 0).any(), (x > 9).any(1), (x > -9).all(1), (x > 0).all()),
    "spread": lambda x: (x.var(1), x.std(2, unbiased=False), x.var((1, 2), correction=2)),
    "norms": lambda x: (x.norm(dim=1), torch.linalg.vector_norm(x, dim=2), x.logsumexp(1)),
    "scans": lambda x: (x.cumsum(1), (x > 0).cumsum(-1), x.diff(dim=1), (x > 0).diff(dim=2)),
    "order": lambda x: (*x.topk(2, 1), x.sort(2).values, x.argsort(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(tmp_path: Path, name: str) -> None:
    export(tmp_path, REDUCTIONS[name], normal(2, 3, 4), dynamic=(BATCH,))


INDEXING: dict[str, Callable[[Tensor], Any]] = {
    "one axis": lambda x: (x[:, torch.tensor([2, 0])], x[..., torch.tensor([[1], [-1]])]),
    "two axes": lambda x: x[:, torch.tensor([0, 2]), torch.tensor([1, -1])],
    "apart": lambda x: x[torch.tensor([0, 1, 1]), :, torch.tensor([1, 3, 0])],
    "inner": lambda x: x.unflatten(2, (2, 2))[:, :, torch.tensor([[0], [1]]), torch.tensor([1, 0])],
    "gathers": lambda x: (
        x.gather(1, torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 0]]])),
        x.index_select(2, torch.tensor([3, 1])),
        x.take_along_dim(x.argsort(1), 1),
    ),
    "scatters": lambda x: (
        torch.zeros(2, 3, 4).scatter(1, x.argsort(1), x),
        x.scatter(2, torch.zeros(2, 3, 1, dtype=torch.int64), 5.0),
        x.scatter_add(1, torch.ones(2, 3, 4, dtype=torch.int64), x),
    ),
    "masks": lambda x: x[x.abs() < 9].sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXING)
def test_indexing(tmp_path: Path, name: str) -> None:
    export(tmp_path, INDEXING[name], normal(2, 3, 4))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), (2, 3, 6)),
    "linear of one row": (nn.Linear(6, 5), (6,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4, bias=False), (2, 4, 9, 8)),
    "conv2d of an image": (nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (3, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (2, 4, 5, 6)),
    "batch norm": (nn.BatchNorm2d(4), (2, 4, 5, 6)),
    "bare batch norm": (nn.BatchNorm1d(4, affine=False), (3, 4)),
    "layer norm": (nn.LayerNorm((5, 6), bias=False), (2, 4, 5, 6)),
    "bare layer norm": (nn.LayerNorm(6, elementwise_affine=False), (2, 4, 6)),
    "rms norm": (nn.RMSNorm(6), (2, 4, 6)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 5, 6)),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), (2, 4, 5, 6)),
    "softmax": (nn.Sequential(nn.Softmax(1), nn.LogSoftmax(-1)), (2, 4, 5)),
    "max pool": (nn.MaxPool2d(3, 2, 1, dilation=1, ceil_mode=True), (2, 4, 8, 9)),
    "average pool": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 4, 8, 9)),
    "average pool of an image": (nn.AvgPool2d(2, ceil_mode=True), (4, 7, 9)),
    "adaptive pool to one": (nn.AdaptiveAvgPool2d(1), (2, 4, 7, 9)),
    "adaptive pool of an image": (nn.AdaptiveAvgPool2d(1), (4, 7, 9)),
    "adaptive pool of one axis": (nn.AdaptiveAvgPool2d((None, 1)), (2, 4, 7, 9)),
    "adaptive pool that divides": (nn.AdaptiveAvgPool2d((2, 3)), (2, 4, 8, 9)),
    "adaptive pool that does not": (nn.AdaptiveAvgPool2d((3, 2)), (2, 4, 8, 9)),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 4, 5, 6)),
    "nearest": (nn.Upsample(scale_factor=2), (2, 4, 5, 6)),
    "pixel shuffle": (nn.PixelShuffle(2), (2, 8, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("opset", [18, 23])
def test_layers(tmp_path: Path, name: str, opset: int) -> None:
    model, shape = LAYERS[name]
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    export(tmp_path, model, normal(*shape), opset=opset)


def test_products(tmp_path: Path) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        weight = torch.ones(4, 5)
        return (
            x @ weight, x @ x.transpose(1, 2), torch.bmm(x, x.mT), x[0] @ weight,
            torch.addmm(torch.ones(5), x[0], weight, beta=2.0, alpha=0.5),
            torch.baddbmm(torch.ones(1, 3, 3), x, x.mT, beta=0.5, alpha=2.0),
            torch.einsum("bij,bkj->bik", x, x), x[0, 0] @ weight,
        )  # fmt: skip

    export(tmp_path, model, normal(2, 3, 4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent(
    tmp_path: Path, kind: type[nn.RNNBase], bidirectional: bool, batch_first: bool, layers: int
) -> None:
    torch.manual_seed(0)
    model = kind(4, 3, layers, bidirectional=bidirectional, batch_first=batch_first)  # type: ignore[arg-type]
    artifact = export(tmp_path, model, normal(5, 2, 4))
    assert artifact.operators[kind.__name__] == layers


def test_recurrent_with_a_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(4, 3, 2, bias=False)
    state = (normal(2, 2, 3), normal(2, 2, 3))
    artifact = export(tmp_path, model, normal(5, 2, 4), state)
    assert artifact.input_names == ("input", "hx_0", "hx_1")


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 3, mode=mode, padding_idx=2)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        result: Tensor = self.bag(ids, offsets)
        return result


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(tmp_path: Path, mode: str) -> None:
    ids, offsets = torch.tensor([1, 2, 3, 4, 8, 2, 0]), torch.tensor([0, 3, 3, 5])
    export(tmp_path, Bags(mode), ids, offsets)


def test_a_bag_of_maxima_is_refused(tmp_path: Path) -> None:
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2])
    with pytest.raises(UnsupportedError, match="reduced by sum or mean only"):
        export(tmp_path, Bags("max"), ids, offsets)


class Branch(nn.Module):
    """Both branches read a weight and a value computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        result: Tensor = torch.cond(x.sum() > 0, lambda a: self.layer(a), lambda a: -a, (y,))
        return result + y


@pytest.mark.parametrize("sign", [1, -1])
def test_branches(tmp_path: Path, sign: int) -> None:
    artifact = export(tmp_path, Branch(), sign * normal(2, 4).abs())
    assert artifact.operators["If"] == 1


def test_a_wrong_translation_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.backends import onnx_translate

    broken = {**onnx_translate.TABLE}
    broken[torch.ops.aten.sin.default] = lambda e, node: e.op("Cos", e.value(node.args[0]))  # type: ignore[arg-type]
    monkeypatch.setattr(onnx_translate, "TABLE", broken)
    with pytest.raises(ExportError, match=r"does not compute what the program does: output 0"):
        export(tmp_path, torch.sin, normal(3))
    assert list(tmp_path.iterdir()) == []
