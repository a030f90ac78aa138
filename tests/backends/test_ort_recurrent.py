"""Recurrent layers with int8 weights: the kernel, its layout, and what stays in float."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planish.backends.base import Artifact, ExportOptions
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter

KERNEL = "com.microsoft.DynamicQuantizeLSTM"
WEIGHT = QuantScheme(granularity="channel", axis=0, narrow=True)


class Last(nn.Module):
    """A recurrent layer; its outputs, and the state it ends in."""

    def __init__(self, kind: type[nn.RNNBase], given: bool, **how: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(12, 16, **how)  # type: ignore[arg-type]  # the caller's options
        self.start = nn.Buffer(
            torch.randn(self.rnn.num_layers * (1 + self.rnn.bidirectional), 3, 16)
        )
        self.given = given

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start: object = None
        if self.given:
            start = (self.start, -self.start) if isinstance(self.rnn, nn.LSTM) else self.start
        y, last = self.rnn(x, start)
        return y, last[0] if isinstance(self.rnn, nn.LSTM) else last


def with_codes(module: nn.Module, x: Tensor, only: int | None = None) -> Program:
    """The program with its recurrent matrices written as int8 codes; or only one of them."""
    program = capture(module.eval().requires_grad_(False), (x,))
    rewriter = Rewriter(program, "codes")
    for node in [n for n in program.operators if is_op(n, aten.lstm.input, aten.gru.input)]:
        position = 2
        params = list(node.args[position])  # type: ignore[arg-type]  # by the operator's schema
        with rewriter.site("codes", node):
            for index, param in enumerate(params):
                weight = program.constant(param)
                if weight is None or weight.dim() != 2 or only not in (None, index):
                    continue
                scale, zero = WEIGHT.qparams_of(weight)
                parts = [
                    rewriter.constant(t, f"w{index}.{n}")
                    for t, n in (
                        (WEIGHT.quantize(weight, scale, zero), "q"),
                        (scale, "s"),
                        (zero, "z"),
                    )
                ]
                params[index] = rewriter.call(
                    torch.ops.planish.dequantize.default,
                    tuple(parts), {"dtype": "int8", "axis": 0}, like=node,
                )  # fmt: skip
            args = [params if i == position else a for i, a in enumerate(node.args)]
            rewriter.set_args(node, tuple(args))
    return rewriter.finish()


def export(program: Program, path: Path, target: str = "onnxruntime-cpu") -> Artifact:
    return load_backend(target).export(program, path / "net.onnx", ExportOptions())


def differences(artifact: Artifact, program: Program, x: Tensor) -> list[float]:
    """Largest difference of each output, relative to the largest value."""
    got = load_backend(artifact.target).run(artifact.path, [x])
    expected = [t.numpy() for t in run(program, (x,))]
    return [
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected, strict=True)
    ]


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "both directions": {"bidirectional": True},
    "batch first": {"bidirectional": True, "batch_first": True},
    "two layers": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
}


def sample(batch_first: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((3, 7, 12) if batch_first else (7, 3, 12), generator=generator)


@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("how", HOW)
def test_lstm_is_the_integer_kernel(how: str, given: bool, tmp_path: Path) -> None:
    net, x = Last(nn.LSTM, given, **HOW[how]), sample("batch_first" in HOW[how])
    program = with_codes(net, x)
    artifact = export(program, tmp_path)
    assert artifact.operators[KERNEL] == net.rnn.num_layers
    assert "LSTM" not in artifact.operators
    assert [use.kernel for use in artifact.kernels] == ["DynamicQuantizeLSTM"]
    # Input and state have 8 bits inside of the kernel; a wrong gate or direction is off by 1.
    assert max(differences(artifact, program, x)) < 0.05


@pytest.mark.parametrize("how", HOW)
def test_portable_lstm_reads_the_numbers_of_the_codes(how: str, tmp_path: Path) -> None:
    net, x = Last(nn.LSTM, True, **HOW[how]), sample("batch_first" in HOW[how])
    program = with_codes(net, x)
    artifact = export(program, tmp_path, "onnx")
    assert artifact.operators["LSTM"] == net.rnn.num_layers
    assert artifact.operators["Cast"] == 2 * net.rnn.num_layers
    assert max(differences(artifact, program, x)) < 1e-4


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnx"])
def test_gru_stays_real(target: str, tmp_path: Path) -> None:
    net, x = Last(nn.GRU, True, bidirectional=True), sample(False)
    program = with_codes(net, x)
    artifact = export(program, tmp_path, target)
    assert artifact.operators["GRU"] == 1
    assert [use.kernel for use in artifact.kernels] == [None]
    assert max(differences(artifact, program, x)) < 1e-4


def test_one_real_matrix_keeps_the_layer_real(tmp_path: Path) -> None:
    net, x = Last(nn.LSTM, False), sample(False)
    program = with_codes(net, x, only=0)
    artifact = export(program, tmp_path)
    assert artifact.operators["LSTM"] == 1
    assert KERNEL not in artifact.operators
    assert max(differences(artifact, program, x)) < 1e-4
