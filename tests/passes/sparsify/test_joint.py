"""Sparse weights through every pass behind: the claim is carried, zeros stay, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.ops import argument, is_op, op_name
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme, spread
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.checking import VerifyEach
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.passes.rounding.adaround import adaround
from planish.passes.rounding.gptq import gptq
from planish.passes.rounding.learned import Learning
from planish.passes.rounding.round_weights import round_to_nearest
from planish.passes.steps import Run
from tests.passes.rounding.nets import calibrated, small_lm

aten = torch.ops.aten
DEQUANTIZE = torch.ops.planish.dequantize.default


class Net(nn.Module):
    """Convolution, batch norm, a norm before linears, and two linears with a clamp between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.norm = nn.LayerNorm(16)
        self.q = nn.Linear(16, 16)
        self.k = nn.Linear(16, 32)
        self.up = nn.Linear(48, 32)
        self.down = nn.Linear(32, 8)
        self.bn.running_mean = torch.randn(16)
        self.bn.weight = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).mean((2, 3))
        x = self.norm(x)
        both = torch.cat([self.q(x), self.k(x)], 1)
        y: Tensor = self.down(self.up(both).relu())
        return y


def net() -> tuple[Program, PassContext]:
    program = capture(Net().eval(), (torch.randn(4, 8, 6, 6),))
    batches = [torch.randn(4, 8, 6, 6) for _ in range(6)]
    return program, PassContext(calibration=spool(batches, program))


def optimized(text: str, made: tuple[Program, PassContext] | None = None) -> Run:
    program, context = made or net()
    return run_pipeline(program, Recipe.parse(text), context, [VerifyEach()])


def zeros_of(program: Program) -> dict[str, Tensor]:
    """Claimed constants, and where each means zero."""
    found = {}
    for name in program.layouts:
        value = program.constants[name]
        assert isinstance(value, Tensor)
        zero: Any = 0
        for node in program.operators:
            if is_op(node, DEQUANTIZE) and getattr(node.args[0], "target", "") == name:
                point = program.constant(argument(node, "zero_point"))
                assert point is not None
                zero = spread(point, value, argument(node, "axis"), argument(node, "block_size"))
        found[name] = value == zero
    return found


def readers(program: Program) -> dict[str, str | None]:
    """Products -> the layout of the constant behind their weight."""
    found: dict[str, str | None] = {}
    for node in program.operators:
        position = {"aten.linear": 1, "aten.conv2d": 1, "aten.addmm": 2}.get(op_name(node.target))
        if position is None:
            continue
        weight: Any = node.args[position]
        while weight.op == "call_function":
            weight = weight.args[0]
        layout = program.layouts.get(weight.target)
        found[node.name] = None if layout is None else str(layout)
    return found


SPARSE = "sparsify{score=magnitude}"


# Carried along ----------------------------------------------------------------------------------

SCALING = [
    "fold-batch-norm",
    "fold-scale-shift",
    "equalize-layers",
    "smooth-quant",
    "migrate-gamma",
    "fuse-parallel-linears",
    "cast-half",
    "merge-duplicate-constants",
    "fold-constants",
]


@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "4x4"])
def test_a_pass_that_scales_carries_the_claim(name: str, pattern: str) -> None:
    sparse = f"sparsify{{score=magnitude,pattern={pattern}}}"
    before = optimized(sparse).program
    run = optimized(f"{sparse}, {name}")
    assert all(readers(before).values())
    assert all(readers(run.program).values()), name
    if name in ("fold-batch-norm", "equalize-layers", "fuse-parallel-linears", "cast-half"):
        assert run.steps[-1].record.changed
    masks, now = zeros_of(before), zeros_of(run.program)
    for weight in masks.keys() & now.keys():
        if masks[weight].shape == now[weight].shape:
            assert bool((now[weight] | ~masks[weight]).all())


def test_split_outliers_leaves_a_sparse_weight_and_a_side_branch() -> None:
    run = optimized(f"{SPARSE}, split-outliers{{threshold=0.5,max_features=8}}")
    assert run.steps[-1].record.changed
    assert all(readers(run.program).values())


def test_parallel_linears_of_different_counts_claim_their_sum() -> None:
    run = optimized(
        "sparsify{score=magnitude,pattern=unstructured,ratio=0.75}, fuse-parallel-linears"
    )
    wide = next(n for n in run.program.operators if is_op(n, aten.split_with_sizes.default))
    linear: Any = wide.args[0]
    layout = run.program.layouts[str(linear.args[1].target)]
    assert (layout.n, layout.m) == ((16 * 16 + 16 * 32) // 4, 16 * 48)


def test_layers_of_sparse_weights_are_not_merged() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    program = capture(Chain().eval(), (torch.randn(2, 8),))
    run = optimized(f"{SPARSE}, merge-linears", (program, PassContext()))
    (refusal,) = run.steps[-1].record.refusals
    assert "is sparse<2:4, axis=1>, which the merged weight would not be" in refusal.reason
    dense = optimized("merge-linears", (program, PassContext()))
    assert dense.steps[-1].record.changed


# A pass that lets go ---------------------------------------------------------------------------

LOST = "tests.support.sparsity_losers"


@pytest.mark.parametrize("loser", ["DropsClaim", "WritesDense", "ComputesDense", "DropsCodes"])
def test_a_pass_that_lets_go_is_named(loser: str) -> None:
    text = f"{SPARSE}, " + ("round-weights, " if loser == "DropsCodes" else "")
    with pytest.raises(VerificationError) as caught:
        optimized(f"{text}{LOST}:{loser}")
    message = str(caught.value)
    assert "let go of a sparse weight" in message
    assert "sparse<2:4, axis=1>" in message
    names = {
        "DropsClaim": "drops-claim",
        "WritesDense": "writes-dense",
        "ComputesDense": "computes-dense",
    }
    assert names.get(loser, "drops-codes") in message
    assert ("@q.codes" if loser == "DropsCodes" else "@q.weight") in message


def test_a_pass_that_declares_it_may_let_go() -> None:
    run = optimized(f"{SPARSE}, {LOST}:Declares")
    assert run.steps[-1].record.changed


# Rounded ---------------------------------------------------------------------------------------

ROUNDING = [
    "round-weights{dtype=int8,convolutions=true}",
    "round-weights{dtype=uint4,block_size=8,search=true}",
    "round-weights{dtype=int4,block_size=8}",
    "round-weights{dtype=uint8,block_size=0,convolutions=true}",
    "hqq{dtype=uint4,block_size=16}",
    "hqq{dtype=int4,block_size=16}",
    "gptq{dtype=uint4,block_size=16,convolutions=true}",
    "gptq{dtype=int4,block_size=16}",
    "gptq{dtype=int8,block_size=0,convolutions=true}",
    "adaround{dtype=int4,iterations=20}",
    "adaround{dtype=uint4,block_size=16,iterations=20}",
    "awq{dtype=uint4,block_size=16}",
    "awq{dtype=int4,block_size=16,rounding=gptq}",
    "quantize",
    "quantize{mode=weight}",
    "round-weights, quantize",
    "gptq{dtype=int8,block_size=0,convolutions=true}, quantize",
    "quantize, correct-bias",
    "quantize, learn-ranges",
    "choose-bits{mean_bits=9}, hqq{dtype=uint4}",
]


@pytest.mark.parametrize("text", ROUNDING)
def test_rounding_keeps_the_pattern_bit_exactly(text: str) -> None:
    before = optimized(SPARSE).program
    run = optimized(f"{SPARSE}, {text}")
    codes = {
        name: value
        for name, value in run.program.constants.items()
        if isinstance(value, Tensor) and name in run.program.layouts
    }
    rounded = [name for name, value in codes.items() if not value.is_floating_point()]
    assert rounded
    assert all(readers(run.program).values())
    masks, now = zeros_of(before), zeros_of(run.program)
    for name in rounded:
        (mask,) = (m for n, m in masks.items() if name.startswith(n.removesuffix(".weight") + "."))
        assert torch.equal(now[name] & mask, mask), name
    narrow = "dtype=int" in text or text.startswith("quantize")
    for name in rounded if narrow else ():
        assert int(codes[name].min()) > (-8 if "int4" in text else -128)


def test_a_weight_that_is_float_again_is_sparse_again() -> None:
    before = optimized(SPARSE).program
    run = optimized(f"{SPARSE}, quantize, keep-float{{operators=[linear]}}")
    assert run.steps[-1].record.changed
    assert all(readers(run.program).values())
    floats = set(before.layouts) & set(run.program.layouts)
    assert floats  # the others are integers still
    for name in floats:
        assert run.program.layouts[name] == before.layouts[name]


def test_language_models_with_products_the_other_way_round() -> None:
    for text in ("gptq{dtype=int4}", "awq{dtype=uint4}", "hqq", "adaround{iterations=10}"):
        program = small_lm(tied=False)
        run = optimized(f"{SPARSE}, {text}", (program, calibrated(program)))
        layouts = {str(layout) for layout in run.program.layouts.values()}
        assert layouts == {"sparse<2:4, axis=0>", "sparse<2:4, axis=1>"}  # Conv1D: inputs first
        assert all(readers(run.program).values())


# The numbers of it ---------------------------------------------------------------------------


def problem(outputs: int = 24, inputs: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a 2:4 mask, H of correlated inputs, and the mask."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, inputs, generator=generator)
    x = x + 0.3 * torch.randn(200, inputs, generator=generator)
    rows = torch.randn(outputs, inputs, generator=generator)
    order = rows.abs().unflatten(1, (-1, 4)).argsort(-1)
    kept = torch.ones_like(rows, dtype=torch.bool).unflatten(1, (-1, 4))
    kept = kept.scatter(-1, order[..., :2], False).flatten(1)
    return torch.where(kept, rows, 0), (2 / 200) * (x.T @ x).double(), kept


INT4 = QuantScheme(dtype="int4", granularity="channel", axis=0, narrow=True)
BLOCKS = QuantScheme(
    dtype="uint4", granularity="block", axis=1, block_size=16, symmetric=False
)  # fmt: skip


@pytest.mark.parametrize("scheme", [INT4, BLOCKS])
@pytest.mark.parametrize("reorder", [True, False])
def test_gptq_in_a_mask_is_better_than_rounding_and_revives_nothing(
    scheme: QuantScheme, reorder: bool
) -> None:
    rows, h, kept = problem()
    codes, loss = gptq(rows, h, scheme, reorder=reorder, fit=False, kept=kept)
    assert bool((codes.real()[~kept] == 0).all())
    free, _ = gptq(rows, h, scheme, reorder=reorder, fit=False)
    assert bool((free.real()[~kept] != 0).any())  # without the mask it would
    errors = []
    for real in (codes.real(), round_to_nearest(rows, scheme, search=True).real()):
        d = (real - rows).double()
        errors.append(float(((d @ h) * d).sum()))
    assert errors[0] < errors[1]
    d = (codes.real() - rows).double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    assert loss == pytest.approx(float(((d @ damped) * d).sum()) / 2, rel=1e-3)


def test_a_masked_weight_takes_an_error_on_to_the_rest() -> None:
    """H=[[2,1,1],[1,2,1],[1,1,2]], w=[.4,0,.4], integers: the error of w0 reaches w2 alone."""
    h = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    rows = torch.tensor([[0.4, 0.0, 0.4, 7.0]])
    h = torch.block_diag(h, torch.ones(1, 1, dtype=torch.float64))
    scheme = QuantScheme(dtype="int4", granularity="channel", axis=0, narrow=True)
    kept = rows != 0
    codes, _ = gptq(rows, h, scheme, damping=0.0, reorder=False, clip=False, kept=kept)
    # w0 -> 0. The best w2 with w1 = 0 is .4 + .4 H02 / H22 = .6, which is rounded to 1.
    assert codes.codes.tolist() == [[0, 0, 1, 7]]


def test_adaround_leaves_masked_weights_alone() -> None:
    rows, h, kept = problem()
    learning = Learning(iterations=40)
    codes, gain = adaround(rows, h[None], INT4, learning, kept=kept)
    assert bool((codes.codes[~kept] == 0).all())
    free, _ = adaround(rows, h[None], INT4, learning)
    assert bool((free.codes[~kept] != 0).any())
    assert gain > 0
