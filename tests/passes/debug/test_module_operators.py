"""planish's own operators are written out: a module that uses them runs where planish is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from planish.ir import Program, capture, text
from planish.ir.execute import run
from planish.passes.debug.module_operators import operators_source
from planish.passes.debug.module_source import write_module
from planish.passes.debug.reduce_check import build

ops = torch.ops.planish


class AllOperators(nn.Module):
    """Every operator of planish's own, in the granularities that differ in their arithmetic."""

    scale: Tensor
    zero: Tensor
    scales: Tensor
    zeros: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))
        self.register_buffer("scales", torch.rand(4, 2) + 0.1)
        self.register_buffer("zeros", torch.zeros(4, 2, dtype=torch.int8))
        self.register_buffer("cos", torch.rand(4, 8))
        self.register_buffer("sin", torch.rand(4, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = ops.quantize(x, self.scale, self.zero, dtype="uint8")
        d = ops.dequantize(q, self.scale, self.zero, dtype="uint8")
        blocked = {"dtype": "int4", "axis": 1, "block_size": 5}
        b = ops.quantize(d, self.scales, self.zeros, **blocked)
        e = ops.dequantize(b, self.scales, self.zeros, **blocked)
        codes, scale, zero = ops.dynamic_quantize(e)
        turned = ops.rotary_embedding(e, self.cos, self.sin)
        return ops.dequantize(codes, scale, zero, dtype="uint8"), turned


def program() -> Program:
    torch.manual_seed(3)
    return capture(AllOperators().eval(), (torch.randn(4, 8),))


def test_it_runs_without_planish_and_gives_the_same_bits(tmp_path: Path) -> None:
    written = program()
    write_module(written, tmp_path)
    code = (
        "import sys, torch, module\n"
        "model, inputs, _ = module.build()\n"
        "torch.save(list(model(*inputs)), 'out.pt')\n"
        "assert 'planish' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = run(written, written.samples[0])
    assert len(found) == len(expected) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_captured_again_beside_planish_it_is_the_same_program(tmp_path: Path) -> None:
    written = program()
    path = write_module(written, tmp_path)
    model, inputs, _ = build(path)
    again = text(capture(model, inputs))
    for name in ("quantize", "dequantize", "dynamic_quantize", "rotary_embedding"):
        assert again.count(f"planish.{name}(") == text(written).count(f"planish.{name}(") > 0


def test_a_module_without_them_holds_nothing_of_them() -> None:
    assert operators_source([torch.ops.aten.relu.default, max]) == ""
