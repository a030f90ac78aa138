"""Convolutions of integers on patches: products in the file, and the numbers they give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.backends.onnx_build import build, count_operators
from planish.backends.onnx_file import write_model
from planish.backends.onnx_translate import emit
from planish.backends.onnx_view import Style
from planish.backends.ort_run import Session
from planish.ir.execute import run
from planish.ir.program import Program
from tests.support.planted import planted

PRODUCT = "com.microsoft.MatMulIntegerToFloat"


def agrees(program: Program, path: Path, *samples: tuple[Tensor, ...]) -> dict[str, int]:
    """Assert that the file computes what the program does, as it is written; its operators."""
    model, initializers, _ = build(emit(program, 23, Style(integers="onnxruntime")), {})
    write_model(model, initializers, path, external_data_bytes=2**30)
    session = Session(path, threads=1, optimize=False)
    for inputs in (program.samples[0], *samples):
        for answer, expected in zip(session.run(inputs), run(program, inputs), strict=True):
            real = torch.from_numpy(np.array(answer))
            torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-4)
    return count_operators(model)


class Patches(nn.Module):
    """The first layer of a vision transformer."""

    def __init__(self, kernel: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, kernel, stride=kernel, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y * 2, y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [(4, 4), (2, 3)], ids=str)
def test_patches_are_rows_of_a_product(kernel: tuple[int, int], bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch")},)
    sample = (torch.randn(2, 3, 8, 12),)
    program = planted(Patches(kernel, bias), sample, dynamic_shapes=shapes)
    operators = agrees(program, tmp_path / "p.onnx", (torch.randn(5, 3, 8, 12),))
    assert operators[PRODUCT] == 1
    assert not {"Conv", "DequantizeLinear", "Add"} & set(operators)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=2),
        nn.Conv2d(3, 6, 4, stride=4, groups=3),
        nn.Conv2d(3, 8, 5, stride=5),  # the image is no multiple of it
    ],
    ids=["overlap", "padding", "groups", "rest"],
)
def test_other_convolutions_are_no_products(layer: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = planted(nn.Sequential(layer), (torch.randn(2, 3, 12, 12),))
    assert PRODUCT not in agrees(program, tmp_path / "o.onnx")
