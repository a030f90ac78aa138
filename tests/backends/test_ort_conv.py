"""Convolutions on integers: which kernels the file has, and that they are the program."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from planish.backends.base import Artifact
from planish.backends.ort_stem import merge_filter, pixels_to_merge
from tests.support.integer_nets import Conv, Grid, exported, program_of

QCONV = "com.microsoft.QLinearConv"


class Net(nn.Module):
    """One convolution between two grids, and what stands between it and the second."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        clamp: nn.Module | None = None,
        high: float = 3.0,
        low: float = -3.0,
        pad: tuple[int, ...] = (),
        dtype: str = "uint8",
        bias: bool = True,
        **how: object,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = Grid(-2.5, 3.0, dtype), Grid(low, high, dtype)
        self.conv = Conv(shape, self.before, bias=bias, **how)
        self.clamp, self.pad = clamp or nn.Identity(), pad

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad)
        result: Tensor = self.after(self.clamp(self.conv(self.before(x))))
        return result


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def is_the_program(artifact: Artifact) -> None:
    """Every operator within one step, and the whole file far above any other convolution."""
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.max_steps <= 1
    assert artifact.comparison.fidelity.sqnr_db > 35


FORMS = {
    "plain": (Net((16, 8, 3, 3)), (1, 8, 9, 9)),
    "no bias": (Net((16, 8, 3, 3), bias=False), (1, 8, 9, 9)),
    "pointwise": (Net((20, 16, 1, 1)), (1, 16, 5, 6)),
    "strided": (Net((16, 8, 3, 3), stride=2, padding=1), (2, 8, 10, 9)),
    "uneven": (Net((16, 8, 3, 2), stride=(2, 1), padding=(1, 0)), (1, 8, 10, 9)),
    "dilated": (Net((16, 4, 3, 3), dilation=2, padding=2), (1, 4, 9, 9)),
    "depthwise": (Net((32, 1, 3, 3), groups=32, padding=1), (1, 32, 8, 8)),
    "depthwise 5x5": (Net((16, 1, 5, 5), groups=16, stride=2, padding=2), (1, 16, 9, 9)),
    "few depthwise": (Net((6, 1, 3, 3), groups=6, padding=1), (1, 6, 8, 8)),
    "grouped": (Net((16, 4, 3, 3), groups=2, padding=1), (1, 8, 8, 8)),
    "same": (Net((16, 8, 4, 4), padding="same"), (1, 8, 9, 9)),
    "padded unevenly": (Net((16, 8, 3, 3), pad=(0, 1, 0, 1), stride=2), (1, 8, 8, 8)),
    "padded twice": (Net((16, 8, 3, 3), pad=(1, 0, 2, 1), padding=1), (1, 8, 8, 8)),
    "one-dimensional": (Net((16, 8, 3), padding=1), (2, 8, 11)),
    "signed": (Net((16, 8, 3, 3), dtype="int8"), (1, 8, 9, 9)),
    "few channels": (Net((16, 3, 3, 3), padding=1), (1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", FORMS)
def test_convolution_is_one_kernel(name: str, tmp_path: Path) -> None:
    net, shape = FORMS[name]
    artifact = exported(program_of(net, picture(*shape)), tmp_path / "net.onnx")
    assert artifact.operators[QCONV] == 1
    assert not {"Conv", "Pad", "Clip"} & set(artifact.operators)
    assert artifact.operators["QuantizeLinear"] == artifact.operators["DequantizeLinear"] == 1
    is_the_program(artifact)


CLAMPS = {
    "relu": (nn.ReLU(), 0.0, 3.0, 0),
    "relu6 within the grid": (nn.ReLU6(), 0.0, 6.0, 0),
    "relu6 cut by the grid": (nn.ReLU6(), 0.0, 1.5, 0),
    "relu6 in a wider grid": (nn.ReLU6(), -1.0, 9.0, 1),
    "relu below zero": (nn.ReLU(), -3.0, 3.0, 1),
    "hardtanh": (nn.Hardtanh(-0.5, 0.75), -2.0, 2.0, 1),
    "hardtanh beyond the grid": (nn.Hardtanh(-1.2, 1.2), -1.0, 1.0, 0),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamp_is_the_grid_or_a_clip_of_codes(name: str, tmp_path: Path) -> None:
    clamp, low, high, clips = CLAMPS[name]
    net = Net((16, 8, 3, 3), clamp=clamp, low=low, high=high)
    artifact = exported(program_of(net, 2 * picture(1, 8, 9, 9)), tmp_path / "net.onnx")
    assert artifact.operators.get("Clip", 0) == clips
    assert artifact.operators[QCONV] == 1
    is_the_program(artifact)


def test_batch_may_be_dynamic(tmp_path: Path) -> None:
    net = Net((16, 3, 3, 3), padding=1, stride=2, clamp=nn.ReLU(), low=0.0)
    program = program_of(net, picture(2, 3, 8, 8), dynamic=True)
    artifact = exported(program, tmp_path / "net.onnx", stem="merged")
    assert artifact.comparison is not None
    assert any("batch" in probe for probe in artifact.comparison.probes)
    is_the_program(artifact)


class Chain(nn.Module):
    """Two convolutions; the second's result is read as real numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grids = nn.ModuleList([Grid(-2.5, 3.0), Grid(0.0, 2.0)])
        self.first = Conv((16, 4, 3, 3), self.grids[0])  # type: ignore[arg-type]  # a tensor or a number
        self.second = Conv((8, 16, 3, 3), self.grids[1])  # type: ignore[arg-type]  # a tensor or a number

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.grids[1](F.relu(self.first(self.grids[0](x)))))
        return result


def test_real_results_come_from_a_real_convolution(tmp_path: Path) -> None:
    artifact = exported(program_of(Chain(), picture(1, 4, 9, 9)), tmp_path / "net.onnx")
    assert artifact.operators[QCONV] == 1
    assert artifact.operators["Conv"] == 1
    kernels = {use.kernel for use in artifact.kernels}
    assert kernels == {"QLinearConv", None}
    is_the_program(artifact)


def test_channels_stay_last_from_one_kernel_to_the_next(tmp_path: Path) -> None:
    net = nn.Sequential(Net((16, 4, 3, 3)), Net((16, 16, 1, 1)), Net((16, 16, 3, 3)))
    for earlier, later in zip(net, list(net)[1:], strict=False):
        earlier.after = later.before
    artifact = exported(program_of(net, picture(1, 4, 12, 12)), tmp_path / "net.onnx")
    assert artifact.operators[QCONV] == 3
    assert artifact.operators["Transpose"] == 2
    is_the_program(artifact)


# -- what is left to the standard operators ---------------------------------------------------


def test_a_second_reader_of_real_numbers_keeps_the_convolution_real(tmp_path: Path) -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            real = self.conv(self.before(x))
            return self.after(real) + real

    artifact = exported(program_of(Both((16, 4, 3, 3)), picture(1, 4, 8, 8)), tmp_path / "n.onnx")
    assert QCONV not in artifact.operators
    assert artifact.operators["Conv"] == 1
    is_the_program(artifact)


def test_a_bias_in_another_unit_keeps_the_convolution_real(tmp_path: Path) -> None:
    net = Net((16, 4, 3, 3))
    net.conv.unit.mul_(1.5)
    artifact = exported(program_of(net, picture(1, 4, 8, 8)), tmp_path / "net.onnx")
    assert QCONV not in artifact.operators
    is_the_program(artifact)


def test_different_zero_points_of_channels_keep_the_convolution_real(tmp_path: Path) -> None:
    net = Net((16, 4, 3, 3))
    net.conv.zero[3] = 2
    artifact = exported(program_of(net, picture(1, 4, 8, 8)), tmp_path / "net.onnx")
    assert QCONV not in artifact.operators
    is_the_program(artifact)


# -- merged pixels ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 7),
    outputs=st.integers(1, 5),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    stride=st.sampled_from([1, 2, 4]),
    before=st.integers(0, 3),
    columns=st.integers(1, 4),
    plane_major=st.booleans(),
)
def test_merged_pixels_are_the_same_convolution(
    channels: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: int,
    before: int,
    columns: int,
    plane_major: bool,
) -> None:
    width, results = 8 * columns, 8 * columns // stride
    count = pixels_to_merge(channels, width, results, stride)
    if count is None:
        assert channels % 4 == 0
        return
    x = torch.randint(-9, 9, (2, channels, 5, width)).double()
    weight = torch.randint(-9, 9, (outputs, channels, *kernel)).double()
    after = (results - 1) * stride + kernel[1] - before - width
    if after < 0:
        after = 0  # the last pixels are read by no result
    expected = F.conv2d(F.pad(x, (before, after)), weight, stride=(1, stride))[..., :results]
    merged, left, right = merge_filter(weight, stride, before, count, plane_major)
    order = (0, 1, 4, 2, 3) if plane_major else (0, 4, 1, 2, 3)
    packed = x.unflatten(-1, (-1, count)).permute(order).flatten(1, 2)
    if left + right - merged.shape[-1] + 1 != 0:
        raise AssertionError("padding does not keep the number of merged pixels")
    y = F.conv2d(F.pad(packed, (left, right)), merged)
    y = y.unflatten(1, (count // stride, outputs)).permute(0, 2, 3, 4, 1).flatten(-2)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_merged_file_is_the_plain_file(channels: int, stride: int, tmp_path: Path) -> None:
    net = Net((16, channels, 3, 3), stride=stride, padding=1)
    if stride == 2:
        net.pad, net.conv.how["padding"] = (0, 1, 0, 1), 0
    program = program_of(net, picture(1, channels, 16, 16))
    plain = exported(program, tmp_path / "plain.onnx")
    merged = exported(program, tmp_path / "merged.onnx", stem="merged")
    assert merged.operators[QCONV] == 1
    assert merged.operators["Reshape"] >= 2
    assert "Reshape" not in plain.operators
    assert merged.choices["stem"] == "merged"
    is_the_program(merged)
    assert plain.comparison == merged.comparison


def test_merging_declines_what_it_cannot_do() -> None:
    assert pixels_to_merge(3, 224, 112, 2) == 4
    assert pixels_to_merge(2, 224, 112, 2) == 2
    assert pixels_to_merge(4, 224, 112, 2) is None  # channels in fours already
    assert pixels_to_merge(3, 223, 112, 2) is None  # does not divide
    assert pixels_to_merge(3, 224, 111, 2) is None  # not one result for each stride
    assert pixels_to_merge(3, "width", "width", 1) is None


# -- the portable file ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["padded unevenly", "padded twice", "depthwise"])
def test_portable_file_pads_in_the_convolution(name: str, tmp_path: Path) -> None:
    net, shape = FORMS[name]
    artifact = exported(program_of(net, picture(*shape)), tmp_path / "net.onnx", target="onnx")
    assert "Pad" not in artifact.operators
    assert artifact.operators["Conv"] == 1
    assert artifact.operators["QuantizeLinear"] == 2
    is_the_program(artifact)


@pytest.mark.parametrize("name", CLAMPS)
def test_portable_file_clamps_where_the_grid_does_not(name: str, tmp_path: Path) -> None:
    clamp, low, high, clips = CLAMPS[name]
    net = Net((16, 8, 3, 3), clamp=clamp, low=low, high=high)
    program = program_of(net, 2 * picture(1, 8, 9, 9))
    artifact = exported(program, tmp_path / "net.onnx", target="onnx")
    assert artifact.operators.get("Clip", 0) + artifact.operators.get("Relu", 0) == clips
    is_the_program(artifact)
