"""Programs of the quantize pass whose files a runtime refused, or read as other numbers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.backends.base import Artifact, ExportOptions
from planish.backends.ort_run import Session
from planish.backends.registry import load_backend
from planish.ir.compare import sqnr_db
from planish.ir.errors import UnsupportedError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.quantize.quantize import Quantize
from tests.passes.quantize.nets import captured, conv, linear, normal

TARGETS = ("onnx", "onnxruntime-cpu")
CHOICES = {"linear": "gemm", "stem": "plain", "attention": "operator", "weights": "branch"}


def quantized(f: Callable[..., Any], x: Tensor, parts: dict[str, Any], **options: Any) -> Program:
    program = captured(f, x, **parts)
    spooled = spool([(x,), (normal(*x.shape, seed=1),)], program)
    return Quantize(**options).run(program, PassContext(calibration=spooled)).program


def exported(program: Program, folder: Path, target: str) -> Artifact:
    """Write and verify a file; its outputs under full optimization are the program's."""
    choices = CHOICES if target == "onnxruntime-cpu" else None
    options = ExportOptions(choices=choices)
    artifact = load_backend(target).export(program, folder / "m.onnx", options)
    got = Session(artifact.path, threads=1).run(program.samples[0])
    expected = run(program, program.samples[0])
    assert sqnr_db(expected[0], torch.from_numpy(np.array(got[0]))) > 25
    return artifact


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{}, {"weights": "uint8", "symmetric": False}], ids=str)
def test_stack_of_weights(options: dict[str, Any], target: str, tmp_path: Path) -> None:
    weight = normal(3, 32, 16, seed=2)
    program = quantized(lambda m, x: x @ m.w, normal(3, 5, 32), {"w": weight}, **options)
    (use,) = exported(program, tmp_path, target).kernels
    assert use.kernel is None
    assert "in float" in use.reason


@pytest.mark.parametrize("target", TARGETS)
def test_weight_on_the_left(target: str, tmp_path: Path) -> None:
    options = {"weights": "uint8", "symmetric": False}
    parts = {"w": normal(24, 32, seed=2)}
    program = quantized(lambda m, x: m.w @ x, normal(3, 32, 6), parts, **options)
    exported(program, tmp_path, target)


def between(f: Callable[[Tensor], Tensor], channels: int = 8, **options: Any) -> Program:
    """Something between two convolutions."""
    parts = {"a": conv(4, 8), "b": conv(channels, 4)}
    return quantized(lambda m, x: m.b(f(m.a(x))), normal(2, 4, 7, 7), parts, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_operator_that_is_taken_apart_stays_real(target: str, tmp_path: Path) -> None:
    exported(between(lambda y: F.pixel_shuffle(y, 2), channels=2), tmp_path, target)


@pytest.mark.parametrize("target", TARGETS)
def test_views_of_what_lies_otherwise(target: str, tmp_path: Path) -> None:
    exported(between(lambda y: F.channel_shuffle(y, 2)), tmp_path, target)


def test_codes_that_nothing_else_declares(tmp_path: Path) -> None:
    """A zero point for each channel: no QLinearConv, so QuantizeLinear makes the codes."""
    program = between(
        lambda y: torch.cat([y[:, :3], y[:, 5:]], 1), channels=6, weights="uint8", symmetric=False
    )
    operators = exported(program, tmp_path, "onnxruntime-cpu").operators
    assert operators["Slice"] == 2
    assert "com.microsoft.QLinearConv" not in operators


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("padding", [0, 1])
def test_sums_of_windows_by_a_number(padding: int, target: str, tmp_path: Path) -> None:
    program = between(lambda y: F.avg_pool2d(y, 3, 2, padding, divisor_override=4))
    exported(program, tmp_path, target)


def test_number_for_windows_over_the_edge_is_refused(tmp_path: Path) -> None:
    program = between(lambda y: F.avg_pool2d(y, 2, ceil_mode=True, divisor_override=3))
    with pytest.raises(UnsupportedError, match="beyond the edge"):
        load_backend("onnx").export(program, tmp_path / "m.onnx")


def test_padding_that_counts_is_no_code(tmp_path: Path) -> None:
    """No operator on integers pads where the code of zero is not 0."""
    pool = exported(between(lambda y: F.avg_pool2d(y, 3, 2, 1)), tmp_path, "onnx")
    nodes = [n for n in onnx.load(str(pool.path)).graph.node if n.op_type == "AveragePool"]
    flags = {a.name: a.i for n in nodes for a in n.attribute if n.input[0].startswith("_deq")}
    assert len(nodes) == 2
    assert flags["count_include_pad"] == 0
    after = exported(between(lambda y: F.avg_pool2d(F.relu(y), 3, 2, 1)), tmp_path, "onnx")
    assert after.operators["AveragePool"] == 1


@pytest.mark.parametrize("size", [33, 32])
@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"weights": "int4"}, 33),
        ({"weights": "int4", "granularity": "block", "block_size": 16}, 48),
        ({"weights": "uint4", "symmetric": False, "granularity": "block", "block_size": 64}, 33),
    ],
    ids=str,
)
def test_half_bytes_lie_in_even_rows_and_whole_blocks(
    options: dict[str, Any], whole: int, size: int, tmp_path: Path
) -> None:
    parts = {"fc": linear(size, 6)}
    program = quantized(lambda m, x: m.fc(x), normal(5, size), parts, mode="weight", **options)
    artifact = exported(program, tmp_path, "onnx")
    stored = onnx.load(str(artifact.path)).graph.initializer
    rows = whole if size == 33 else 32
    (kind,) = {t.data_type for t in stored if list(t.dims) == [rows, 6]}
    name = onnx.TensorProto.DataType.Name(kind).lower()
    assert name == (options["weights"] if rows % 2 == 0 else f"{options['weights'][:-1]}8")
    assert Counter(artifact.operators)["Pad"] == (rows == 48)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [False, True])
def test_keys_at_the_lowest_number_weigh_alike(known: bool, target: str, tmp_path: Path) -> None:
    """A sentence of padding alone, in a mask that is added: no key is nearer than another."""
    bias = torch.zeros(2, 1, 1, 6)
    bias[0] = torch.finfo(torch.float32).min
    x = normal(2, 3, 6, 8)

    def attend(m: Any, x: Tensor, *mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask[0] if mask else m.bias)

    program = captured(attend, x, bias=bias) if known else captured(attend, x, bias)
    exported(program, tmp_path, target)


@pytest.mark.parametrize("target", TARGETS)
def test_projected_lstm_is_refused(target: str, tmp_path: Path) -> None:
    layer = nn.LSTM(5, 4, proj_size=2)
    program = captured(lambda m, x: m.layer(x)[0], normal(3, 2, 5), layer=layer)
    with pytest.raises(UnsupportedError, match="projection"):
        load_backend(target).export(program, tmp_path / "m.onnx")
