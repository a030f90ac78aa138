"""oneDNN's integer kernels in plain torch: exact at the extremes, and only where they exist."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import planish
from planish.backends.base import KernelUse
from planish.backends.ort_race import race
from planish.backends.torch_stepwise import saturates_here
from tests.support.script_files import written

F = nn.functional
quantize = torch.ops.planish.quantize
dequantize = torch.ops.planish.dequantize
ON_X86 = platform.machine() in ("x86_64", "AMD64")
IN_32_BITS = pytest.mark.skipif(saturates_here(), reason="this processor adds pairs in 16 bits")


class Quantized(nn.Module):
    """A linear (or, with ``conv``, a convolution of pictures) between codes.

    Args:
        weight: integers, in the layout of the layer.
        zero: zero point of the activation.
        kind: integers of the activation.
        post: what follows the layer.
        out: scale and zero point of the output; None leaves it in real numbers.
        axis: of the activation's scales; None for one scale.
        conv: options of the convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        zero: int = 128,
        *,
        kind: str = "uint8",
        post: Any = None,
        out: tuple[float, int] | None = None,
        axis: int | None = None,
        conv: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.kind, self.post, self.out, self.axis, self.conv = kind, post, out, axis, conv
        outputs, features = weight.shape[0], weight.shape[1]
        count = features if axis is not None else 1
        steps = torch.linspace(0.02, 0.04, count)
        integers = getattr(torch, kind)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("weight_scale", torch.linspace(0.001, 0.01, outputs))
        self.register_buffer("weight_zero", torch.zeros(outputs, dtype=torch.int8))
        self.register_buffer("bias", torch.linspace(-1, 1, outputs))
        self.register_buffer("scale", steps if axis is not None else steps[0])
        zeros = torch.full((count,), zero, dtype=integers)
        self.register_buffer("zero", zeros if axis is not None else zeros[0])
        scale, shift = out or (1.0, 0)
        self.register_buffer("out_scale", torch.tensor(scale))
        self.register_buffer("out_zero", torch.tensor(shift, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.scale, self.zero)
        codes = quantize(x, *grid, dtype=self.kind, axis=self.axis)
        real = dequantize(codes, *grid, dtype=self.kind, axis=self.axis)
        weight = dequantize(self.weight, self.weight_scale, self.weight_zero, dtype="int8", axis=0)
        if self.conv is None:
            y = F.linear(real, weight, self.bias)  # type: ignore[arg-type] # a buffer
        else:
            y = F.conv2d(real, weight, self.bias, **self.conv)  # type: ignore[arg-type]
        y = self.post(y) if self.post is not None else y
        if self.out is None:
            return y
        grid = (self.out_scale, self.out_zero)
        made: Tensor = dequantize(quantize(y, *grid, dtype="uint8"), *grid, dtype="uint8")
        return made


def _random(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1))


def _exported(model: nn.Module, x: Tensor, path: Path, **options: Any) -> list[KernelUse]:
    """Export, hold the file to one step (or 1e-5 of the largest), and give its kernels."""
    result = planish.optimize(model.eval(), x, recipe="none", target="torchscript", **options)
    artifact = result.export(path)
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.max_steps <= 1
    assert artifact.comparison.stepwise.max_relative < 1e-5
    return list(artifact.kernels)


CASES: dict[str, tuple[Quantized, Tensor]] = {
    "all at the upper end": (Quantized(torch.full((16, 4096), 127), 0),
                             torch.full((8, 4096), 99.0)),
    "all at the lower end": (Quantized(torch.full((16, 96), -127), 255),
                             torch.full((8, 96), -99.0)),
    "the smallest integer": (Quantized(torch.full((16, 64), -128), 0), torch.full((8, 64), 99.0)),
    "in the middle": (Quantized(_random(32, 64), 128), torch.randn(16, 64)),
    "odd zero point": (Quantized(_random(32, 63), 37), torch.randn(16, 63)),
    "one row of one": (Quantized(_random(1, 1), 3), torch.randn(1, 1)),
    "no rows": (Quantized(_random(8, 64), 3), torch.randn(0, 64)),
    "vector": (Quantized(_random(8, 64), 3), torch.randn(64)),
    "infinite": (Quantized(_random(8, 64), 3), torch.full((4, 64), float("inf"))),
    "turned": (Quantized(_random(8, 64), 3), torch.randn(64, 16).t()),
    "pictures": (Quantized(_random(16, 8, 3, 3), 77, conv={"padding": 1}, out=(0.05, 9)),
                 torch.randn(2, 8, 9, 9)),
    "pictures at the end": (Quantized(torch.full((16, 32, 3, 3), 127), 0, conv={"stride": 2}),
                            torch.full((2, 32, 9, 9), 99.0)),
    "groups": (Quantized(_random(16, 4, 3, 3), 255, conv={"groups": 4, "dilation": 2}),
               torch.randn(2, 16, 9, 9)),
    "depthwise": (Quantized(_random(16, 1, 3, 3), 200, conv={"groups": 16, "padding": (2, 1)}),
                  torch.randn(2, 16, 9, 9)),
    "saturated output": (Quantized(_random(16, 64), 128, out=(1e-5, 128)), torch.randn(16, 64)),
    "wide output": (Quantized(_random(16, 64), 128, out=(1e5, 255)), torch.randn(16, 64)),
}  # fmt: skip


@IN_32_BITS
@pytest.mark.parametrize("case", CASES)
def test_integer_kernels_are_exact(case: str, tmp_path: Path) -> None:
    model, x = CASES[case]
    kernels = {use.operator: use.kernel for use in _exported(model, x, tmp_path / "model.pt")}
    operator = "aten.linear" if model.conv is None else "aten.conv2d"
    expected = "onednn::qlinear_pointwise" if model.conv is None else "onednn::qconv2d_pointwise"
    assert kernels[operator] == expected


POSTS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "leaky": lambda y: F.leaky_relu(y, 0.1),
    "open": lambda y: y.clamp(min=0.1),
    "crossed": lambda y: y.clamp(0.5, 0.2),
}


@IN_32_BITS
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize("out", [None, (0.02, 9)])
def test_activations_after_them(
    kind: str, post: str, out: tuple[float, int] | None, tmp_path: Path
) -> None:
    shape = (16, 64) if kind == "linear" else (16, 8, 3, 3)
    x = torch.randn(16, 64) if kind == "linear" else torch.randn(2, 8, 9, 9)
    conv = None if kind == "linear" else {"padding": 1}
    model = Quantized(_random(*shape), post=POSTS[post], out=out, conv=conv)
    kernels = {use.operator: use.kernel for use in _exported(model, x, tmp_path / "model.pt")}
    assert kernels["aten.linear" if kind == "linear" else "aten.conv2d"] is not None


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (Quantized(_random(8, 64), axis=1), torch.randn(4, 64), "on one scale only"),
        (Quantized(_random(8, 64), 5, kind="int8"), torch.randn(4, 64), "uint8 activations"),
        (Quantized(_random(8, 4, 3, 3), conv={}), torch.randn(4, 9, 9), "of pictures only"),
    ],
)
def test_what_no_kernel_takes_runs_in_float_and_is_told(
    model: Quantized, x: Tensor, reason: str, tmp_path: Path
) -> None:
    uses = _exported(model, x, tmp_path / "model.pt")
    assert [use.kernel for use in uses] == [None]
    assert reason in uses[0].reason


class OnCodes(nn.Module):
    """Padding, pooling and flattening between two grids that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.pad(torch.relu(self.conv(x)), (0, 1, 0, x.shape[0]))
        b = F.max_pool2d(a, 3, stride=2, padding=1)
        return (self.other(b) + b).flatten(1)


def test_padding_by_a_size_and_pools_with_options(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    result = planish.optimize(
        OnCodes().eval(),
        samples[0],
        recipe="int8-static",
        calibration=[(s,) for s in samples],
        dynamic_shapes=({0: Dim("batch", min=2, max=8)},),
        target="torchscript",
    )
    artifact = result.export(tmp_path / "model.pt")
    assert artifact.comparison is not None
    assert len(artifact.comparison.probes) >= 2


class Measured(nn.Module):
    """A linear whose activation's range is found in the run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", _random(16, 64).to(torch.int8))
        self.register_buffer("scale", torch.linspace(0.001, 0.01, 16))
        self.register_buffer("zero", torch.zeros(16, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero = torch.ops.planish.dynamic_quantize(x, dtype="uint8")
        real = dequantize(codes, scale, zero, dtype="uint8")
        return F.linear(real, dequantize(self.weight, self.scale, self.zero, dtype="int8", axis=0))


@IN_32_BITS
def test_ranges_found_in_the_run(tmp_path: Path) -> None:
    model = Measured().eval()
    shapes = ({0: Dim("b", max=99)},)
    uses = _exported(model, torch.randn(16, 64), tmp_path / "model.pt", dynamic_shapes=shapes)
    assert [use.kernel for use in uses] == ["onednn::qlinear_pointwise.tensor"]
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    values = [torch.zeros(4, 64), torch.full((3, 64), 3.0), torch.full((1, 64), -3.0)]
    for x in (*values, 1e-30 * torch.randn(5, 64), 1e30 * torch.randn(2, 64)):
        scale = max(1e-6, float(model(x).abs().max()))
        assert float((loaded(x) - model(x)).abs().max()) <= 0.01 * scale


_WITHOUT_VNNI = """
import sys
import torch
from tests.backends.test_torch_int8 import Quantized, _exported
from planish.ir.errors import ExportError
from planish.backends.torch_stepwise import saturates_here
from pathlib import Path
assert saturates_here()
x = torch.full((8, 64), 99.0)
_exported(Quantized(torch.full((16, 64), 63), 0), x, Path(sys.argv[1]))
try:
    _exported(Quantized(torch.full((16, 64), 127), 0), x, Path(sys.argv[1]))
except ExportError as error:
    assert "aten.linear" in error.where, error
    assert "saturation=reduced" in error.hint, error
else:
    raise AssertionError("it was exported")
"""


@pytest.mark.skipif(not ON_X86, reason="only oneDNN on x86 can be told to leave VNNI alone")
def test_a_processor_without_vnni_is_named_as_the_cause(tmp_path: Path) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-W", "ignore", "-c", _WITHOUT_VNNI, str(tmp_path / "model.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_of_torchscript_race_in_torch(tmp_path: Path) -> None:
    paths = []
    for width in (8, 512):
        paths.append(tmp_path / f"{width}.pt")
        net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4)).eval()
        written(net, paths[-1], (torch.randn(64, 64),))
    first, second = race(paths, [torch.randn(64, 64)], seconds=0.05, target="torchscript")
    assert first.ratio == 1.0
    assert second.ratio < 1.0
