"""Products of integers in ONNX Runtime: the kernels in the file, and the numbers they give."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.backends.onnx_build import build, count_operators
from planish.backends.onnx_file import write_model
from planish.backends.onnx_translate import emit
from planish.backends.onnx_view import Style
from planish.backends.ort_run import Session
from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from tests.support.planted import planted

PRODUCT = "com.microsoft.MatMulIntegerToFloat"
STYLE = Style(integers="onnxruntime", attention="operator")
quantize = torch.ops.planish.quantize.default
dequantize = torch.ops.planish.dequantize.default
dynamic_quantize = torch.ops.planish.dynamic_quantize.default


class Ops(nn.Module):
    """A function of tensors, with constants it may use."""

    def __init__(self, function: Callable[..., Any], **constants: Tensor):
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)
        self.names = list(constants)
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *[getattr(self, n) for n in self.names])


def written(program: Program, path: Path) -> tuple[Session, Counter[str]]:
    """A file that runs exactly as it is written, and its operators."""
    model, initializers, _ = build(emit(program, 23, STYLE), {})
    write_model(model, initializers, path, external_data_bytes=2**30)
    return Session(path, threads=1, optimize=False), Counter(count_operators(model))


def agrees(program: Program, path: Path, *samples: Sequence[Tensor]) -> Counter[str]:
    """Assert that a file computes what the program does; its operators."""
    session, operators = written(program, path)
    for inputs in samples or program.samples:
        for answer, expected in zip(session.run(inputs), run(program, inputs), strict=True):
            real = torch.from_numpy(np.array(answer))
            torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-4)
    return operators


def on_grid(x: Tensor, dtype: str = "uint8") -> Tensor:
    """``x`` written in integers with one scale and read back."""
    zero = torch.tensor(130 if dtype == "uint8" else 7, dtype=getattr(torch, dtype))
    codes = quantize(x, torch.tensor(0.03), zero, dtype=dtype)
    return dequantize(codes, torch.tensor(0.03), zero, dtype=dtype)


def as_constants(weight: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    scale, zero = scheme.qparams_of(weight)
    return {"codes": scheme.quantize(weight, scale, zero), "scale": scale, "zero": zero}


WEIGHTS = [
    QuantScheme(granularity="channel", axis=0, narrow=True),
    QuantScheme(granularity="channel", axis=0, symmetric=False),
    QuantScheme(dtype="uint8", granularity="channel", axis=0, symmetric=False),
    QuantScheme(dtype="uint8", symmetric=False),
    QuantScheme(),
    QuantScheme(dtype="int4", granularity="channel", axis=0),
    QuantScheme(dtype="uint4", granularity="channel", axis=0, symmetric=False),
]


@pytest.mark.parametrize("shape", [(40,), (3, 40), (1, 3, 40), (2, 3, 5, 40)], ids=str)
@pytest.mark.parametrize("scheme", WEIGHTS, ids=str)
def test_linear_is_one_product_of_codes(
    scheme: QuantScheme, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    constants = as_constants(torch.randn(24, 40), scheme)

    def function(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor) -> Tensor:
        weight = dequantize(codes, scale, zero, dtype=scheme.dtype, axis=scheme.axis)
        return F.linear(on_grid(x), weight, bias)

    program = capture(Ops(function, **constants, bias=torch.randn(24)), (torch.randn(shape),))
    operators = agrees(program, tmp_path / "l.onnx")
    assert operators.pop("Reshape", 0) <= 2  # to rows and back
    assert operators == {"QuantizeLinear": 1, PRODUCT: 1}
    held = {tuple(i.dims): i for i in onnx.load(tmp_path / "l.onnx").graph.initializer}
    assert held[40, 24].data_type == onnx.TensorProto.INT8  # uint8 on the right is slow
    assert (24, 40) not in held


def test_the_integer_product_is_exact(tmp_path: Path) -> None:
    """With the largest codes there are, summed over 4096: no 16-bit sum saturates here."""
    x = torch.randint(0, 2, (3, 4096)) * 200.0 - 100.0
    w = torch.randint(0, 2, (8, 4096), dtype=torch.int8) * 127
    ones = torch.ones(8)

    def function(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        middle = torch.tensor(100, dtype=torch.uint8)
        q = quantize(x, torch.tensor(1.0), middle, dtype="uint8")
        a = dequantize(q, torch.tensor(1.0), middle, dtype="uint8")
        return F.linear(a, dequantize(w, scale, zero, dtype="int8", axis=0))

    zero = torch.zeros(8, dtype=torch.int8)
    program = capture(Ops(function, w=w, scale=ones, zero=zero), (x,))
    session, operators = written(program, tmp_path / "e.onnx")
    exact = x.to(torch.int64) @ w.to(torch.int64).t()
    assert torch.equal(torch.from_numpy(session.run([x])[0]), exact.to(torch.float32))
    assert operators[PRODUCT] == 1


@pytest.mark.parametrize("bias", ["none", "float", "int32", "computed"])
def test_biases(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    constants = as_constants(torch.randn(24, 40), WEIGHTS[0])
    whole = torch.randint(-9000, 9000, (24,), dtype=torch.int32)
    unit = constants["scale"] * 0.03

    def function(
        x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, b: Tensor, unit: Tensor, none: Tensor
    ) -> Tensor:
        weight = dequantize(codes, scale, zero, dtype="int8", axis=0)
        given = {
            "none": None,
            "float": unit * 3,
            "int32": dequantize(b, unit, none, dtype="int32", axis=0),
            "computed": x[0, :24] * 2,
        }[bias]
        return F.linear(on_grid(x), weight, given)

    constants |= {"b": whole, "unit": unit, "none": torch.zeros_like(whole)}
    program = capture(Ops(function, **constants), (torch.randn(3, 40),))
    operators = agrees(program, tmp_path / "b.onnx")
    assert operators[PRODUCT] == 1
    assert not {"Add", "Sum", "DequantizeLinear"} & set(operators)


def test_sizes_may_vary_and_residuals_stay_sums(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(24, 48), nn.Linear(48, 24), nn.LayerNorm(24)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
            return result

    torch.manual_seed(0)
    shapes = ({0: Dim("batch"), 1: Dim("sequence")},)
    program = planted(Block(), (torch.randn(2, 7, 24),), dynamic_shapes=shapes)
    others = [(torch.randn(b, s, 24),) for b, s in ((1, 1), (3, 11), (1, 128))]
    operators = agrees(program, tmp_path / "v.onnx", *others)
    expected = {PRODUCT: 2, "QuantizeLinear": 2, "Gelu": 1, "Sum": 1, "LayerNormalization": 1}
    assert {k: operators[k] for k in expected} == expected
    assert not {"Gemm", "MatMul", "Add", "DequantizeLinear"} & set(operators)


def test_values_with_ranges_of_run_time_are_quantized_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ("a", "b", "c")
    constants = {
        f"{n}_{k}": v
        for n in names
        for k, v in as_constants(torch.randn(8, 24), WEIGHTS[0]).items()
    }

    def function(x: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        q, scale, zero = dynamic_quantize(x)
        real = dequantize(q, scale, zero, dtype="uint8")
        return tuple(
            F.linear(real, dequantize(*constants[i : i + 3], dtype="int8", axis=0))
            for i in (0, 3, 6)
        )

    n = Dim("n")
    program = capture(
        Ops(function, **constants), (torch.randn(2, 5, 24),), dynamic_shapes=(({1: n},),)
    )
    operators = agrees(program, tmp_path / "d.onnx", (torch.randn(2, 9, 24) * 3,))
    assert operators["DynamicQuantizeLinear"] == 1
    assert operators[PRODUCT] == 3
    assert "DequantizeLinear" not in operators


def test_signed_values_stay_signed(tmp_path: Path) -> None:
    """They were asked for, so that no sum of two products saturates in 16 bits."""
    constants = as_constants(torch.randn(24, 40), WEIGHTS[0])

    def function(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        weight = dequantize(codes, scale, zero, dtype="int8", axis=0)
        return F.linear(on_grid(x, "int8"), weight)

    program = capture(Ops(function, **constants), (torch.randn(3, 40),))
    assert agrees(program, tmp_path / "s.onnx")[PRODUCT] == 1
    model = onnx.load(tmp_path / "s.onnx")
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    q = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    assert kinds[q.input[2]] == onnx.TensorProto.INT8


def test_weights_in_blocks_are_no_such_product(tmp_path: Path) -> None:
    scheme = QuantScheme(granularity="block", axis=1, block_size=16)
    constants = as_constants(torch.randn(24, 32), scheme)

    def function(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        weight = dequantize(codes, scale, zero, dtype="int8", axis=1, block_size=16)
        return F.linear(on_grid(x), weight)

    program = capture(Ops(function, **constants), (torch.randn(3, 32),))
    operators = agrees(program, tmp_path / "k.onnx")
    assert PRODUCT not in operators
    assert operators["MatMul"] == 1


def test_products_written_otherwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scheme = QuantScheme(granularity="channel", axis=1, narrow=True)
    constants = as_constants(torch.randn(40, 24), scheme)

    def function(
        x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        w, a = dequantize(codes, scale, zero, dtype="int8", axis=1), on_grid(x)
        return a @ w, torch.mm(a, w), torch.addmm(bias, a, w), torch.addmm(bias, a, w, alpha=2)

    program = capture(Ops(function, **constants, bias=torch.randn(24)), (torch.randn(5, 40),))
    operators = agrees(program, tmp_path / "m.onnx")
    assert operators[PRODUCT] == 3
    assert operators["Gemm"] == 1  # the one that scales


@pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("uint8", "int8")], ids=str)
def test_products_of_two_computed_values(dtypes: tuple[str, str], tmp_path: Path) -> None:
    """Queries by keys, through the moves between the codes and the product."""

    def function(q: Tensor, k: Tensor, step: Tensor, left: Tensor, right: Tensor) -> Tensor:
        a, b = (
            dequantize(quantize(x, step, zero, dtype=kind), step, zero, dtype=kind)
            for x, zero, kind in ((q, left, dtypes[0]), (k, right, dtypes[1]))
        )
        a = a.view(2, -1, 3, 8).transpose(1, 2)
        return torch.matmul(a, b.view(2, -1, 3, 8).permute(0, 2, 3, 1))

    zeros = [torch.tensor(9, dtype=getattr(torch, kind)) for kind in dtypes]
    constants = dict(zip(("step", "left", "right"), (torch.tensor(0.03), *zeros), strict=True))

    n = Dim("n", min=2)
    samples = (torch.randn(2, 5, 24), torch.randn(2, 5, 24))
    program = capture(Ops(function, **constants), samples, dynamic_shapes=(({1: n}, {1: n}),))
    other = (torch.randn(2, 11, 24), torch.randn(2, 11, 24))
    operators = agrees(program, tmp_path / "qk.onnx", samples, other)
    assert operators[PRODUCT] == 1
    assert operators["QuantizeLinear"] == 2
    assert not {"MatMul", "DequantizeLinear"} & set(operators)
    model = onnx.load(tmp_path / "qk.onnx")
    product = next(n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat")
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert kinds[product.input[5]] == onnx.TensorProto.INT8


def _joint(kind: str) -> Callable[[nn.Linear, Tensor], tuple[Tensor, ...]]:
    def split(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
        return layer(x).split([8, 24, 16], dim=-1)

    def chunk(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
        return layer(x).chunk(3, dim=-1)

    def unbind(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
        packed = layer(x).reshape(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return packed.unbind(0)

    return {"split": split, "chunk": chunk, "unbind": unbind}[kind]


@pytest.mark.parametrize("kind", ["split", "chunk", "unbind"])
def test_parts_of_a_product_are_products(kind: str, tmp_path: Path) -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 48)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part * 2 for part in _joint(kind)(self.layer, x))

    torch.manual_seed(0)
    shapes = ({0: Dim("batch"), 1: Dim("sequence")},)
    program = planted(Joint(), (torch.randn(2, 7, 24),), dynamic_shapes=shapes)
    operators = agrees(program, tmp_path / "p.onnx", (torch.randn(3, 5, 24),))
    assert operators[PRODUCT] == 3
    assert "Split" not in operators
    held = [i for i in onnx.load(tmp_path / "p.onnx").graph.initializer if len(i.dims) == 2]
    widths = sorted(i.dims[1] for i in held if i.dims[0] == 24)
    assert widths == ([8, 16, 24] if kind == "split" else [16, 16, 16])  # and no whole weight


def test_rows_of_a_product_are_no_parts(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 48)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part * 2 for part in self.layer(x).chunk(2, dim=1))

    program = planted(Rows(), (torch.randn(2, 8, 24),))
    operators = agrees(program, tmp_path / "r.onnx")
    assert operators[PRODUCT] == 1
    assert operators["Split"] == 1


def test_self_attention_with_padding(tmp_path: Path) -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
            self.out = nn.Linear(24, 24)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            b, s, _ = x.shape
            q, k, v = (f(x).view(b, s, 3, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            open_ = mask.to(torch.bool)[:, None, None, :]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=open_)
            result: Tensor = self.out(y.transpose(1, 2).reshape(b, s, 24))
            return result

    torch.manual_seed(0)
    b, s = Dim("batch"), Dim("sequence")
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    program = planted(
        SelfAttention(), (torch.randn(2, 7, 24), mask), dynamic_shapes=({0: b, 1: s}, {0: b, 1: s})
    )
    padded = torch.ones(3, 12, dtype=torch.int64)
    padded[0, 5:], padded[2, 1:] = 0, 0
    samples = [program.samples[0], (torch.randn(3, 12, 24), padded)]
    operators = agrees(program, tmp_path / "a.onnx", *samples)
    assert operators[PRODUCT] == 4
    assert operators["QuantizeLinear"] == 4  # as planted: one for each layer
    assert operators["Attention"] == 1
