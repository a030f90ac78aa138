"""What stands between convolutions, on integers: kernels in the file, and their numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.backends.base import Artifact
from tests.support.integer_nets import Conv, Grid, exported, program_of

MICROSOFT = "com.microsoft."


class Between(nn.Module):
    """One operator from a value on one grid (or two) to a value on another."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor], *, same: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.form = Grid(-3.0, 3.0), form
        self.conv = Conv((16, 4, 3, 3), self.source, padding=1)
        self.a, self.b = Grid(-2.0, 2.5), Grid(-1.0, 3.0)
        self.goal = self.a if same else Grid(-4.0, 4.0)
        if same:
            self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        real = self.conv(self.source(x))
        result: Tensor = self.goal(self.form(self.a(real), self.b(F.relu(x[:, :1]) + x[:, 1:2])))
        return result


def export(module: nn.Module, path: Path, **how: object) -> Artifact:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    artifact = exported(program_of(module, x), path / "net.onnx", **how)  # type: ignore[arg-type]  # the caller's options
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.max_steps <= 1
    assert artifact.comparison.fidelity.sqnr_db > 25
    return artifact


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "add": (lambda a, b: a + b, "QLinearAdd"),
    "add and clamp": (lambda a, b: F.relu(a + b), "QLinearAdd"),
    "multiply": (lambda a, b: a * b, "QLinearMul"),
    "sigmoid": (lambda a, b: torch.sigmoid(a), "QLinearSigmoid"),
    "leaky relu": (lambda a, b: F.leaky_relu(a, 0.2), "QLinearLeakyRelu"),
    "average pool": (lambda a, b: F.avg_pool2d(a, 2), "QLinearAveragePool"),
    "padded average": (lambda a, b: F.avg_pool2d(a, 3, 2, 1), "QLinearAveragePool"),
    "average without padding": (
        lambda a, b: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False),
        "QLinearAveragePool",
    ),
    "global pool": (lambda a, b: F.adaptive_avg_pool2d(a, 1), "QLinearGlobalAveragePool"),
    "mean": (lambda a, b: a.mean((2, 3)), "QLinearGlobalAveragePool"),
    "mean kept": (lambda a, b: a.mean((-1, -2), keepdim=True), "QLinearGlobalAveragePool"),
    "concatenation": (lambda a, b: torch.cat([a, b], 1), "QLinearConcat"),
}


@pytest.mark.parametrize("name", FORMS)
def test_operator_is_a_kernel_on_codes(name: str, tmp_path: Path) -> None:
    form, kernel = FORMS[name]
    operators = export(Between(form), tmp_path).operators
    assert operators[MICROSOFT + kernel] == 1
    assert operators[MICROSOFT + "QLinearConv"] == 1
    assert operators["DequantizeLinear"] == 1


MOVERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "max pool": (lambda a, b: F.max_pool2d(a, 3, 2, 1), "com.microsoft.NhwcMaxPool"),
    "dilated max pool": (lambda a, b: F.max_pool2d(a, 2, 1, 0, 2), "com.microsoft.NhwcMaxPool"),
    "hanging max pool": (
        lambda a, b: F.max_pool2d(a, 3, 2, ceil_mode=True),
        "com.microsoft.NhwcMaxPool",
    ),
    "concatenation": (lambda a, b: torch.cat([a, b], 1), "Concat"),
    "concatenation of rows": (lambda a, b: torch.cat([a, a], 2), "Concat"),
    "padding": (lambda a, b: F.pad(a, (1, 0, 2, 1)), "Pad"),
    "slice": (lambda a, b: a[:, 2:9], "Slice"),
    "part of a split": (lambda a, b: a.chunk(3, 1)[1], "Split"),
    "flatten": (lambda a, b: a.flatten(1), "Reshape"),
    "clamp of a pool": (lambda a, b: F.relu(F.max_pool2d(a, 2)), "Clip"),
}


@pytest.mark.parametrize("name", MOVERS)
def test_moving_values_moves_codes(name: str, tmp_path: Path) -> None:
    form, operator = MOVERS[name]
    operators = export(Between(form, same=True), tmp_path).operators
    assert operators[operator] == 1
    assert operators["DequantizeLinear"] == 1


def test_what_has_no_kernel_stays_real(tmp_path: Path) -> None:
    operators = export(Between(lambda a, b: torch.tanh(a)), tmp_path).operators
    assert operators["Tanh"] == 1
    assert operators["DequantizeLinear"] == 2


def test_another_grid_is_no_move(tmp_path: Path) -> None:
    operators = export(Between(lambda a, b: F.max_pool2d(a, 2)), tmp_path).operators
    assert operators["MaxPool"] == 1
    assert MICROSOFT + "NhwcMaxPool" not in operators


def test_scaled_addition_stays_real(tmp_path: Path) -> None:
    operators = export(Between(lambda a, b: torch.add(a, b, alpha=2)), tmp_path).operators
    assert MICROSOFT + "QLinearAdd" not in operators


@pytest.mark.parametrize("name", [*FORMS, *MOVERS])
def test_portable_file_has_standard_operators_only(name: str, tmp_path: Path) -> None:
    form, same = (FORMS[name][0], False) if name in FORMS else (MOVERS[name][0], True)
    operators = export(Between(form, same=same), tmp_path, target="onnx").operators
    assert not [o for o in operators if o.startswith(MICROSOFT)]
