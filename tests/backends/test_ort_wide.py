"""Convolutions in pieces of their output channels: the same numbers from more kernels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from planish.backends import ort_wide
from planish.backends.base import Artifact, ExportOptions
from planish.backends.onnx_view import Style
from planish.backends.ort_legalize import choose
from planish.backends.ort_measure import measure
from planish.backends.ort_run import Session
from planish.backends.ort_wide import CHANNEL_BLOCK, pieces
from planish.ir.program import Program
from tests.support.integer_nets import Conv, Grid, exported, program_of

QCONV = "com.microsoft.QLinearConv"


class Net(nn.Module):
    """Two convolutions, of which the first may have a large filter."""

    def __init__(self, shape: tuple[int, ...], *, bias: bool = True, **how: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.between, self.after = (Grid(-3.0, 3.0) for _ in range(3))
        self.first = Conv(shape, self.before, bias=bias, **how)
        kernel = (1,) * (len(shape) - 2)
        self.second = Conv((16, shape[0], *kernel), self.between)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(self.before(x)).relu())
        result: Tensor = self.after(self.second(y))
        return result


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 4 KiB, so that small filters have several."""
    monkeypatch.setattr(ort_wide, "PIECE_BYTES", 4096)


def outputs(artifact: Artifact, x: Tensor) -> np.ndarray:
    return Session(artifact.path, threads=1).run([x])[0]


def is_wide(program: Program) -> bool:
    replayed = {"wide": "split", "stem": "plain", "linear": "gemm"}
    return "wide" in choose(program, 23, ExportOptions(choices=replayed))[1]


# -- structure --------------------------------------------------------------------------------

FORMS = {
    "square": (Net((192, 8, 3, 3), padding=1), (1, 8, 9, 9), 3),
    "uneven": (Net((100, 16, 3, 3)), (1, 16, 8, 9), 2),
    "strided, no bias": (Net((128, 16, 3, 3), stride=2, bias=False), (2, 16, 9, 9), 2),
    "pointwise": (Net((128, 64, 1, 1)), (1, 64, 5, 5), 2),
    "one-dimensional": (Net((192, 16, 3), padding=1), (2, 16, 11), 3),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FORMS)
def test_wide_convolution_is_several_kernels_and_the_same_numbers(
    name: str, tmp_path: Path
) -> None:
    net, shape, count = FORMS[name]
    x = picture(*shape)
    program = program_of(net, x)
    whole = exported(program, tmp_path / "whole.onnx")
    split = exported(program, tmp_path / "split.onnx", wide="split")
    assert (whole.operators[QCONV], split.operators[QCONV]) == (2, count + 1)
    assert split.operators["Concat"] == 1
    assert "Concat" not in whole.operators
    assert split.choices["wide"] == "split"
    np.testing.assert_array_equal(outputs(split, x), outputs(whole, x))


@pytest.mark.usefixtures("small")
def test_batch_may_be_dynamic(tmp_path: Path) -> None:
    program = program_of(Net((192, 8, 3, 3)), picture(2, 8, 9, 9), dynamic=True)
    artifact = exported(program, tmp_path / "net.onnx", wide="split")
    assert artifact.operators[QCONV] == 4
    assert artifact.comparison is not None
    assert any("batch" in probe for probe in artifact.comparison.probes)


# -- what it declines -------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Net((16, 8, 3, 3)), (1, 8, 9, 9)),  # small enough
        (Net((64, 16, 3, 3)), (1, 16, 9, 9)),  # one block of channels
        (Net((512, 1, 3, 3), groups=512), (1, 512, 5, 5)),  # a filter for each channel
    ],
)
def test_others_stay_whole(net: Net, shape: tuple[int, ...], tmp_path: Path) -> None:
    program = program_of(net, picture(*shape))
    artifact = exported(program, tmp_path / "net.onnx", wide="split")
    assert artifact.operators[QCONV] == 2
    assert "Concat" not in artifact.operators


def test_choice_is_made_only_where_a_filter_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(Net((192, 8, 3, 3)), picture(1, 8, 9, 9))
    assert not is_wide(program)
    monkeypatch.setattr(ort_wide, "PIECE_BYTES", 4096)
    assert is_wide(program)
    real = nn.Sequential(nn.Conv2d(8, 192, 3), nn.ReLU())
    assert not is_wide(program_of(real, picture(1, 8, 9, 9)))


# -- pieces -----------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 40))
def test_pieces_are_all_channels_in_blocks(channels: int, each: int) -> None:
    held = ort_wide.PIECE_BYTES
    ort_wide.PIECE_BYTES = 4096
    try:
        parts = pieces(torch.zeros(channels, each, 1, 1, dtype=torch.int8))
    finally:
        ort_wide.PIECE_BYTES = held
    assert [c for part in parts for c in range(part.start, part.stop)] == list(range(channels))
    assert all((part.stop - part.start) % CHANNEL_BLOCK == 0 for part in parts[:-1])
    rounded = 4096 + CHANNEL_BLOCK * each  # the last block of a piece may go over
    assert all((part.stop - part.start) * each < rounded for part in parts)


def test_both_forms_are_measured() -> None:
    assert measure("wide") > 0
    assert Style().wide == "whole"
