"""Adaptive pools whose bins are uneven or overlap."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from planish.backends.base import ExportOptions
from planish.backends.onnx_bins import bin_weights
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.errors import UnsupportedError


def test_weights_of_three_elements_in_two_bins() -> None:
    # By hand: the bins are elements 0 and 1, and elements 1 and 2.
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.0, 0.5]], dtype=torch.float64)
    assert torch.equal(bin_weights(3, 2), expected)


@pytest.mark.parametrize(("size", "bins"), [(2, 7), (7, 2), (5, 5), (13, 4), (1, 3)])
def test_weights_are_torchs(size: int, bins: int) -> None:
    x = torch.arange(1.0, size + 1, dtype=torch.float64).pow(2)
    expected = nn.functional.adaptive_avg_pool1d(x[None], bins)[0]
    torch.testing.assert_close(x @ bin_weights(size, bins), expected)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AdaptiveAvgPool2d(7), (2, 3, 2, 2)),
        (nn.AdaptiveAvgPool2d((2, 3)), (2, 3, 5, 9)),
        (nn.AdaptiveAvgPool2d((None, 4)), (2, 3, 5, 6)),
        (nn.AdaptiveAvgPool1d(4), (2, 3, 10)),
    ],
)
def test_exported_pool_is_torchs(pool: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    program = capture(
        pool.eval(), (torch.randn(shape),), dynamic_shapes=({0: Dim("batch", max=8)},)
    )
    # An export that returns is one whose file gave the program's outputs, at two batch sizes.
    artifact = load_backend("onnx").export(program, tmp_path / "m.onnx", ExportOptions())
    assert set(artifact.operators) == {"MatMul"}


def test_three_uneven_axes_are_refused(tmp_path: Path) -> None:
    program = capture(nn.AdaptiveAvgPool3d(2).eval(), (torch.randn(1, 2, 3, 5, 5),))
    with pytest.raises(UnsupportedError, match="adaptive_avg_pool3d"):
        load_backend("onnx").export(program, tmp_path / "m.onnx", ExportOptions())
