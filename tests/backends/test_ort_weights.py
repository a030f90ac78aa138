"""Packed weights in ONNX Runtime: layouts, known answers, one file for few and many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.backends.base import ExportOptions
from planish.backends.onnx_build import build, count_operators
from planish.backends.onnx_file import write_model
from planish.backends.onnx_translate import emit
from planish.backends.onnx_view import Style
from planish.backends.ort_run import Session
from planish.backends.ort_weights import FEW_ROWS, halves, pack
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.rounding.round_weights import RoundWeights
from tests.passes.rounding.nets import WIDTH, WORDS, ids, small_lm

NBITS, GATHER = "com.microsoft.MatMulNBits", "com.microsoft.GatherBlockQuantized"


def written(
    program: Program, path: Path, *, level: int | None = None, weights: str = "branch"
) -> tuple[Session, onnx.ModelProto]:
    """A file, with one accuracy level for all products where asked for."""
    style = Style(integers="onnxruntime", attention="operator", weights=weights)
    model, initializers, _ = build(emit(program, 23, style), {})
    if level is not None:
        for attribute in levels(model.graph):
            attribute.i = level
    write_model(model, initializers, path, external_data_bytes=2**30)
    return Session(path, threads=1), model


def levels(graph: onnx.GraphProto) -> list[onnx.AttributeProto]:
    """The accuracy levels of a graph and the graphs in it."""
    found = []
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute] if attribute.name == "accuracy_level" else []
            found += levels(attribute.g) if attribute.HasField("g") else []
    return found


def rounded(program: Program, **options: Any) -> Program:
    return RoundWeights(**options).run(program.clone(), PassContext()).program


def error(session: Session, program: Program, inputs: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    (expected,), (answer,) = run(program, inputs), session.run(inputs)
    return float((torch.from_numpy(answer) - expected).abs().max() / expected.abs().max())


# Packing -------------------------------------------------------------------------------------


def test_the_earlier_code_is_in_the_low_half() -> None:
    codes = torch.tensor([[0, 12, 6, 8, 3]], dtype=torch.uint8)
    assert halves(codes, 4).tolist() == [[192, 134, 3]]
    assert halves(torch.tensor([[5, 10]], dtype=torch.uint8), 4).tolist() == [[165]]
    assert halves(codes, 8).tolist() == codes.tolist()


def test_signed_codes_are_shifted_and_a_middle_zero_is_left_out() -> None:
    codes = torch.tensor([[-8, 7, 0, 1] * 6], dtype=torch.int8)
    zero = torch.zeros(1, 2, dtype=torch.int8)
    packed = pack(codes, torch.ones(1, 2), zero, "int4", 16)
    assert packed.codes.shape == (1, 2, 8)
    assert packed.codes[0, 0, :2].tolist() == [0 | 15 << 4, 8 | 9 << 4]
    assert packed.codes[0, 1, 4:].tolist() == [0] * 4  # beyond the 24 inputs
    assert packed.zero_point is None
    shifted = pack(codes, torch.ones(1, 2), zero + 1, "int4", 16)
    assert shifted.zero_point is not None
    assert shifted.zero_point.tolist() == [[9 | 9 << 4]]


def test_two_blocks_of_signed_scales() -> None:
    """ONNX Runtime's own rounding of [4, -2, 1, 0, ..] and [-4, 2, 0, ..]: extremes are 0."""
    unsigned = torch.tensor([[0, 12, 6] + [8] * 13 + [0, 12] + [8] * 14], dtype=torch.uint8)
    scale, zero = torch.tensor([[-0.5, 0.5]]), torch.full((1, 2), 8, dtype=torch.uint8)
    packed = pack(unsigned, scale, zero, "uint4", 16)
    assert packed.codes[0, 0].tolist() == [192, 134] + [136] * 6
    assert packed.codes[0, 1].tolist() == [192] + [136] * 7
    assert packed.zero_point is None  # the operator's own zero point is 8
    real = torch.ops.planish.dequantize(unsigned, scale, zero, dtype="uint4", axis=1, block_size=16)
    assert real[0].tolist() == [4, -2, 1] + [0] * 13 + [-4, 2] + [0] * 14


def test_one_scale_per_output_is_repeated() -> None:
    codes = torch.ones(3, 200, dtype=torch.int8)
    scale, zero = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.int8)
    packed = pack(codes, scale, zero, "int8", 128, channel=True)
    assert packed.codes.shape == (3, 2, 128)
    assert packed.scale.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert packed.zero_point is None


# Known answers -------------------------------------------------------------------------------


class Known(nn.Module):
    """K=32, N=2, blocks of 16: codes 0 to 15 twice, and the same backwards."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.arange(16, dtype=torch.uint8).repeat(2)
        self.codes = nn.Buffer(torch.stack([row, row.flip(0)]))
        self.scale = nn.Buffer(torch.tensor([[1.0, 0.5], [2.0, 0.25]]))
        self.zero = nn.Buffer(torch.full((2, 2), 8, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.planish.dequantize(
            self.codes, self.scale, self.zero, dtype="uint4", axis=1, block_size=16
        )
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnx"])
def test_two_rows_of_codes(target: str, tmp_path: Path) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    row = np.tile(np.arange(16.0), 2)
    scale = np.repeat([[1.0, 0.5], [2.0, 0.25]], 16, axis=1)
    weight = (np.stack([row, row[::-1]]) - 8) * scale
    program = capture(Known().eval(), (x,))
    artifact = load_backend(target).export(program, tmp_path / "a.onnx", ExportOptions())
    expected = x.numpy() @ weight.T.astype(np.float32)
    plain = Session(artifact.path, threads=1, optimize=False).run([x])[0]
    if target == "onnxruntime-cpu":
        plain = written(program, tmp_path / "b.onnx", level=1)[0].run([x])[0]
    assert np.abs(plain - expected).max() <= 1e-5 * np.abs(expected).max()
    fast = Session(artifact.path, threads=1).run([x])[0]  # the runtime fuses to level 4 itself
    assert np.abs(fast - expected).max() <= 0.02 * np.abs(expected).max()


# Files ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    st.sampled_from([0, 16, 32, 128]),
    st.booleans(),
    st.integers(17, 70),
)
def test_every_layout_is_what_the_program_says(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, block: int, symmetric: bool, inputs: int
) -> None:
    torch.manual_seed(inputs)
    net = nn.Linear(inputs, 9).eval()
    x = torch.randn(2, 3, inputs)
    program = rounded(capture(net, (x,)), dtype=dtype, block_size=block, symmetric=symmetric)
    session, model = written(program, tmp_path_factory.mktemp("a") / "a.onnx", level=1)
    assert count_operators(model).get(NBITS) == 1
    assert "Transpose" not in count_operators(model)
    assert error(session, program, (x,)) < 1e-5


@pytest.mark.parametrize("options", [{"dtype": "uint4"}, {"dtype": "int4", "block_size": 128}])
def test_a_tied_table_is_in_the_file_once(options: dict[str, Any], tmp_path: Path) -> None:
    program = rounded(small_lm(), **options)
    session, model = written(program, tmp_path / "a.onnx", level=1)
    counts = Counter(count_operators(model))
    assert counts[GATHER] == 1
    assert "Transpose" not in counts
    assert error(session, program, (ids(2, 3, 20),)) < 1e-5
    file = onnx.load(str(tmp_path / "a.onnx"))
    block = options.get("block_size", 32)
    blocks = -(-WIDTH // block)
    tables = [t for t in file.graph.initializer if list(t.dims)[:1] == [WORDS]]
    sizes = sorted(len(t.raw_data) for t in tables)
    packed = WORDS * blocks * block // 2
    expected = [WORDS * blocks * 4, packed]
    if options["dtype"] == "uint4":
        expected.append(WORDS * -(-blocks // 2))
    assert sizes == sorted(expected)  # codes, scales and zero points, each once


def test_the_product_takes_the_form_for_the_number_of_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 48).eval()
    x = torch.randn(4, 64)
    program = capture(net, (x,), dynamic_shapes=({0: Dim("rows", max=512)},))
    short = rounded(program, dtype="uint4")
    session, model = written(short, tmp_path / "a.onnx")
    assert count_operators(model)["If"] == 1
    assert sorted(a.i for a in levels(model.graph)) == [1, 4]
    few, many = torch.randn(FEW_ROWS, 64), torch.randn(FEW_ROWS + 1, 64)
    # Rows are rounded to int8 where there are few of them, and stay as they are otherwise.
    assert 1e-4 < error(session, short, (few,)) < 0.02
    assert error(session, short, (many,)) < 1e-5
    for weights, options in (("integers", {"dtype": "uint4"}), ("branch", {"dtype": "int8"})):
        _, plain = written(rounded(program, **options), tmp_path / "b.onnx", weights=weights)
        assert "If" not in count_operators(plain)
        assert [a.i for a in levels(plain.graph)] == [4]


def test_products_with_a_constant_and_a_fixed_number_of_rows(tmp_path: Path) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Parameter(torch.randn(32, 24))
            self.b = nn.Parameter(torch.randn(24, 40))
            self.bias = nn.Parameter(torch.randn(24))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.a) @ self.b

    x = torch.randn(5, 32)
    program = rounded(capture(Products().eval(), (x,)), dtype="int4", block_size=16)
    session, model = written(program, tmp_path / "a.onnx", level=1)
    assert count_operators(model)[NBITS] == 2
    assert "If" not in count_operators(model)
    assert error(session, program, (x,)) < 1e-5


@pytest.mark.parametrize("block", [8, 24])
def test_blocks_the_kernel_does_not_know_are_dequantized(block: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 48)
    net = capture(nn.Linear(48, 8).eval(), (x,))
    program = rounded(net, dtype="uint4", block_size=block)
    session, model = written(program, tmp_path / "a.onnx")
    assert NBITS not in count_operators(model)
    assert error(session, program, (x,)) < 1e-5


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnx"])
def test_an_export_is_proved_and_reported(target: str, tmp_path: Path) -> None:
    program = rounded(small_lm(), dtype="uint4")
    artifact = load_backend(target).export(program, tmp_path / "a.onnx", ExportOptions())
    names = {use.operator: use.kernel or "" for use in artifact.kernels}
    assert names["aten.linear"] == "MatMulNBits (4 bits, blocks of 32)"
    if target == "onnxruntime-cpu":
        assert names["aten.embedding"] == "GatherBlockQuantized (4 bits, blocks of 32)"
        assert names["aten.addmm"].startswith("MatMulNBits")
        assert artifact.choices["weights"] in ("branch", "integers")
