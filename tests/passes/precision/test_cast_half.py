"""Programs in 16-bit floats, with float32 islands where the format overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import planish
from planish.backends.base import ExportOptions
from planish.backends.registry import load_backend
from planish.ir.capture import capture
from planish.ir.compare import measure
from planish.ir.errors import PassError, RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.precision.cast_half import CastHalf
from planish.passes.quantize.where import Where
from tests.support.check import check, refuses, run_checked

HALF, BRAIN = torch.float16, torch.bfloat16


class Block(nn.Module):
    """A little transformer."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 32)
        self.gain = gain

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.norm(x)).split(16, -1))
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.squeeze(1))
        wide = self.up(x) * self.gain
        z: Tensor = wide.square().sum(-1) / self.gain**2
        return z


def block_inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(0, 11, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])


def context(program: Program, *batches: tuple[Any, ...], **fields: Any) -> PassContext:
    return PassContext(calibration=spool(list(batches or program.samples), program), **fields)


def dtypes(program: Program) -> dict[str, torch.dtype]:
    return {n.name: v.dtype for n in program.nodes if isinstance(v := n.meta.get("val"), Tensor)}


class Two(nn.Module):
    """Two linears and what moves values between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)).view(-1, 3))
        return y


def test_no_conversion_stands_between_operators_in_the_format() -> None:
    program = capture(Two().eval(), (torch.randn(2, 4),))
    check(
        program,
        (),
        CastHalf(),
        """
        program(%x: f32[2, 4])
          const @a.bias: f16[6]
          const @a.weight: f16[6, 4]
          const @b.bias: f16[2]
          const @b.weight: f16[2, 3]
          %0: f16[2, 4] = aten.to.dtype(%x, dtype=f16)
          %1: f16[2, 6] = aten.linear(%0, @a.weight, @a.bias)
          %2: f16[2, 6] = aten.relu(%1)
          %3: f16[4, 3] = aten.view(%2, size=[-1, 3])
          %4: f16[4, 2] = aten.linear(%3, @b.weight, @b.bias)
          %5: f32[4, 2] = aten.to.dtype(%4, dtype=f32)
          return %5
        """,
        changes=4,
        context=context(program),
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_inputs_and_outputs_keep_their_types(dtype: Any) -> None:
    program = capture(Block().eval(), block_inputs())
    result = check(program, (), CastHalf(dtype=dtype), context=context(program)).program
    half = HALF if dtype == "fp16" else BRAIN
    found = dtypes(result)
    assert {found[n.name] for n in result.placeholders} == {torch.int64, torch.bool}
    assert [n.meta["val"].dtype for n in result.results] == [torch.float32]
    assert half in found.values()
    # Weights of half the size; the norm is an island and keeps its own.
    kept = {k for k, t in result.constants.items() if t.dtype is torch.float32}
    assert kept == {"norm.weight", "norm.bias"}
    reference, outputs = (run(p, program.samples[0]) for p in (program, result))
    least = 50 if dtype == "fp16" else 30
    assert least < measure(reference, outputs).sqnr_db < 100


def test_softmax_norms_and_long_sums_are_islands() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x * 2.0
            return y.softmax(-1), y.sum(-1), y[:, :8].sum(-1), nn.functional.layer_norm(y, (2000,))

    program = capture(Net().eval(), (torch.randn(2, 2000),))
    result = run_checked(program, CastHalf(), context(program))
    reasons = {r.node: r.reason for r in result.refusals}
    assert set(reasons) == {"softmax", "sum_1", "layer_norm"}
    assert "2000 elements" in reasons["sum_1"]
    loose = run_checked(program, CastHalf(precise=False), context(program))
    assert {r.node for r in loose.refusals} == set()


def test_what_overflows_float16_becomes_a_named_island() -> None:
    """The sum of squares of values near 1000 does not fit; without islands it is infinite."""
    program = capture(Block(gain=1000.0).eval(), block_inputs())
    reference = run(program, program.samples[0])
    result = run_checked(program, CastHalf(), context(program))
    outputs = run(result.program, program.samples[0])
    assert measure(reference, outputs).sqnr_db > 45
    reasons = {r.node: r.reason for r in result.refusals}
    assert "65504" in reasons["square"] or "6.55e+04" in reasons["square"]
    assert "square" in reasons
    source = {r.node: str(r.source) for r in result.refusals}["square"]
    assert "wide.square()" in source
    # The same model cast without a look at what it holds gives nothing finite.
    blind = capture(_blind(Block(gain=1000.0)), block_inputs())
    assert not run(blind, program.samples[0])[0].isfinite().any()
    # bfloat16 has the range of float32.
    brain = run_checked(program, CastHalf(dtype="bf16"), PassContext())
    assert not any("reaches" in r.reason for r in brain.refusals)
    assert run(brain.program, program.samples[0])[0].isfinite().all()


def _blind(block: Block) -> nn.Module:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block.half()

        def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
            x = self.block.embed(ids)
            wide = self.block.up(x) * self.block.gain
            z: Tensor = wide.square().sum(-1) / self.block.gain**2
            return z.float()

    return Blind().eval()


def test_the_headroom_counts_and_the_largest_batch_decides() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(x * 100.0) * 0.01, x + 1.0

    program = capture(Scale().eval(), (torch.ones(4),))
    large = torch.full((4,), 300.0)

    def islands(headroom: float, *batches: Tensor) -> set[str]:
        held = context(program, *((b,) for b in batches))
        result = run_checked(program, CastHalf(headroom=headroom), held)
        return {r.node for r in result.refusals}

    assert islands(1.0, torch.ones(4)) == set()
    assert islands(1.0, torch.ones(4), large) == set()  # 30000 fit
    assert islands(3.0, torch.ones(4), large) == {"mul", "relu", "mul_1"}


def test_an_overflow_on_the_way_is_found_by_the_trial() -> None:
    class Distance(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.linalg.vector_norm(x, dim=-1) + x.std(-1))

    program = capture(Distance().eval(), (torch.full((2, 64), 200.0),))
    result = run_checked(program, CastHalf(precise=False), context(program))
    values = run(result.program, program.samples[0])[0]
    assert values.isfinite().all()


def test_masks_end_at_the_largest_number_and_not_in_infinity() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + mask

    lowest = torch.finfo(torch.float32).min
    sample = (torch.randn(2, 3), torch.tensor([0.0, lowest, 0.0]))
    program = capture(Masked().eval(), sample)
    result = run_checked(program, CastHalf(), context(program))
    assert not result.refusals
    assert run(result.program, sample)[0].isfinite().all()


def test_float16_wants_calibration_and_bfloat16_does_not() -> None:
    model = Two().eval()
    with pytest.raises(RequirementError, match="calibration"):
        planish.optimize(model, torch.randn(2, 4), recipe="cast-half", target="onnx")
    made = planish.optimize(model, torch.randn(2, 4), recipe="cast-half{dtype=bf16}", target="onnx")
    assert BRAIN in dtypes(made.program).values()


def test_where_leaves_operators_in_float32() -> None:
    program = capture(Two().eval(), (torch.randn(2, 4),))
    result = refuses(
        program,
        (),
        CastHalf(where=Where(exclude=("b",))),
        "where leaves it out",
        changes=3,
        context=context(program),
    )
    assert result.program.constants["b.weight"].dtype is torch.float32
    assert result.program.constants["a.weight"].dtype is HALF


def test_a_program_of_islands_is_an_error() -> None:
    class Soft(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    program = capture(Soft().eval(), (torch.randn(2, 3),))
    with pytest.raises(PassError, match="no operator can compute in float16"):
        CastHalf().run(program, context(program))
    with pytest.raises(PassError, match=r"headroom is 0\.5"):
        CastHalf(headroom=0.5).run(program, context(program))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
def test_files_of_both_targets_agree_with_the_program(
    dtype: Any, target: str, tmp_path: Path
) -> None:
    program = capture(Block().eval(), block_inputs())
    said: list[str] = []
    cast = run_checked(program, CastHalf(dtype=dtype), context(program)).program
    artifact = load_backend(target).export(
        cast, tmp_path / "m.onnx", ExportOptions(remark=said.append)
    )
    assert artifact.comparison is not None
    assert artifact.comparison.fidelity.sqnr_db > 30
    whole = load_backend(target).export(program, tmp_path / "whole.onnx")
    assert weights(artifact.path) < 0.7 * weights(whole.path)
    if dtype == "bf16":
        assert any("not faster" in sentence for sentence in said)


def weights(path: Path) -> int:
    """Bytes of a file's constants."""
    model = onnx.load(str(path))
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def test_a_recurrent_layer_stays_and_is_named() -> None:
    torch.manual_seed(0)
    program = capture(nn.LSTM(4, 6).eval(), (torch.randn(5, 2, 4),))
    remarks: list[str] = []
    result = CastHalf(dtype="bf16").run(program, PassContext(remark=remarks.append))
    assert not result.changes
    assert [r.reason for r in result.refusals] == ["it gives several values at once"]
    assert remarks == ["nothing was cast: no operator computes one float32 value"]
