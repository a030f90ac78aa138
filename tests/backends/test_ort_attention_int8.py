"""QAttention in the file where it is chosen, and the default form where it cannot say it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.backends.onnx_build import build, count_operators
from planish.backends.onnx_file import write_model
from planish.backends.onnx_translate import emit
from planish.backends.onnx_view import Style
from planish.backends.ort_legalize import CHOICES
from planish.backends.ort_run import Session
from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from tests.support.planted import dequantize, planted, quantize

PRODUCT, PACKED = "com.microsoft.MatMulIntegerToFloat", "com.microsoft.QAttention"
STYLE = Style(integers="onnxruntime", attention="operator", integer_attention="packed")
SEPARATE = replace(STYLE, integer_attention="separate")
SIZES = {0: Dim("batch"), 1: Dim("sequence", min=2)}


def agrees(
    program: Program, path: Path, *samples: tuple[Tensor, ...], style: Style = STYLE
) -> dict[str, int]:
    """Assert that the file computes what the program does, as it is written; its operators."""
    model, initializers, _ = build(emit(program, 23, style), {})
    write_model(model, initializers, path, external_data_bytes=2**30)
    session = Session(path, threads=1, optimize=False)
    for inputs in (program.samples[0], *samples):
        for answer, expected in zip(session.run(inputs), run(program, inputs), strict=True):
            real = torch.from_numpy(np.array(answer))
            torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-4)
    return count_operators(model)


class SelfAttention(nn.Module):
    """Queries, keys and values from three layers, or from one."""

    def __init__(self, attend: Callable[..., Tensor], joint: bool = False, bias: bool = True):
        super().__init__()
        widths = (72,) if joint else (24, 24, 24)
        self.layers = nn.ModuleList(nn.Linear(24, w, bias=bias) for w in widths)
        self.attend = attend

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        b, s, _ = x.shape
        parts: Any = [layer(x) for layer in self.layers]
        if len(parts) == 1:
            parts = parts[0].chunk(3, -1)
        heads = [part.view(b, s, 3, 8).transpose(1, 2) for part in parts]
        return self.attend(*heads, *mask).transpose(1, 2).reshape(b, s, 24)


def shared(program: Program) -> Program:
    """One pair of quantize and dequantize for all that read the same value."""
    r = Rewriter(program, "share")
    first: dict[Any, Any] = {}
    for node in [n for n in program.operators if n.target is torch.ops.aten.linear.default]:
        pair = node.args[0]
        source = pair.args[0].args[0]  # type: ignore[union-attr]  # by the operator's schema
        with r.site("share", node):
            r.set_args(node, (first.setdefault(source, pair), *node.args[1:]))
    return r.finish()


def program_of(attend: Callable[..., Tensor], *mask: Tensor, **options: bool) -> Program:
    torch.manual_seed(0)
    module = SelfAttention(attend, **options)
    samples = (torch.randn(2, 7, 24), *mask)
    shapes: Any = (SIZES, (SIZES,)) if mask else (SIZES,)
    return shared(planted(module, samples, dynamic_shapes=shapes))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    open_ = mask.to(torch.bool)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=open_)


def squared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Each query its own keys: those before it, and no padding."""
    open_ = mask.to(torch.bool)
    before = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=(open_[:, None, None, :] & before[None, None])
    )


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = (mask.to(torch.float32) * 0.5)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.1)


def masks(batch: int, length: int, *open_: int) -> Tensor:
    return (torch.arange(length) < torch.tensor(open_)[:, None]).to(torch.int64).view(batch, length)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attend", [plain, causal])
def test_three_products_and_their_attention_are_one_kernel(
    attend: Callable[..., Tensor], bias: bool, joint: bool, tmp_path: Path
) -> None:
    program = program_of(attend, joint=joint, bias=bias)
    others = [(torch.randn(b, s, 24),) for b, s in ((1, 2), (3, 12))]
    operators = agrees(program, tmp_path / "a.onnx", *others)
    assert operators[PACKED] == 1
    assert operators["QuantizeLinear"] == 1
    assert not {PRODUCT, "Attention", "Split", "MatMul", "Transpose"} & set(operators)


@pytest.mark.parametrize("attend", [padded, squared])
def test_masks_of_keys_that_are_open_or_closed(
    attend: Callable[..., Tensor], tmp_path: Path
) -> None:
    program = program_of(attend, masks(2, 7, 7, 4))
    others = [
        (torch.randn(3, 12, 24), masks(3, 12, 5, 12, 1)),
        (torch.randn(2, 5, 24), masks(2, 5, 0, 5)),  # a sentence of nothing attends to nothing
    ]
    assert agrees(program, tmp_path / "m.onnx", *others)[PACKED] == 1


@pytest.mark.parametrize("joint", [False, True])
def test_no_keys_and_values_are_made_of_padding_at_the_end(joint: bool, tmp_path: Path) -> None:
    program = program_of(padded, masks(2, 7, 5, 4), joint=joint)
    holes = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    others = [
        (torch.randn(3, 12, 24), masks(3, 12, 5, 2, 1)),
        (torch.randn(2, 6, 24), holes),
        (torch.randn(2, 6, 24), holes.flip(1)),  # padding in front
        (torch.randn(2, 5, 24), masks(2, 5, 5, 5)),
        (torch.randn(2, 5, 24), masks(2, 5, 0, 3)),
        (torch.randn(2, 5, 24), masks(2, 5, 0, 0)),
    ]
    operators = agrees(program, tmp_path / "e.onnx", *others, style=SEPARATE)
    assert operators["Attention"] == 1
    assert operators["Slice"] == 2  # the codes, for keys and values, and the mask
    assert operators[PRODUCT] == 3
    keys: list[int] = []
    session = _watched(tmp_path / "e.onnx")
    names = [i.name for i in session.get_inputs()]
    for inputs in others:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        keys.append(session.run(None, feeds)[-1].shape[1])
    assert keys == [5, 4, 6, 5, 3, 1]


def _watched(path: Path) -> Any:
    """A session that also gives the keys that attention reads."""
    model = onnx.load(path)
    attention = next(n for n in model.graph.node if n.op_type == "Attention")
    model.graph.output.append(onnx.ValueInfoProto(name=attention.input[1]))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("attend", [squared, plain, causal, added])
def test_keys_stay_where_the_mask_is_not_of_keys_alone(
    attend: Callable[..., Tensor], tmp_path: Path
) -> None:
    given = (masks(2, 7, 7, 4),) if attend in (squared, added) else ()
    program = program_of(attend, *given)
    operators = agrees(program, tmp_path / "s.onnx", style=SEPARATE)
    assert "Slice" not in operators
    assert operators[PRODUCT] == 3


@pytest.mark.parametrize("attend", [added, scaled])
def test_what_the_kernel_cannot_say_keeps_the_default_form(
    attend: Callable[..., Tensor], tmp_path: Path
) -> None:
    given = () if attend is scaled else (masks(2, 7, 7, 4),)
    operators = agrees(program_of(attend, *given), tmp_path / "f.onnx")
    assert PACKED not in operators
    assert operators[PRODUCT] == 3


def test_products_of_different_codes_are_not_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = planted(SelfAttention(plain), (torch.randn(2, 7, 24),))  # a pair for each layer
    assert PACKED not in agrees(program, tmp_path / "d.onnx")


def test_heads_in_float_are_not_packed(tmp_path: Path) -> None:
    program = capture(SelfAttention(plain).eval().requires_grad_(False), (torch.randn(2, 7, 24),))
    assert PACKED not in agrees(program, tmp_path / "n.onnx")


@pytest.mark.parametrize(("name", "joint"), [("integer-attention", False), ("parts", True)])
def test_the_choice_concerns_programs_whose_products_are_integers(name: str, joint: bool) -> None:
    choice = next(c for c in CHOICES if c.name == name)
    sample = (torch.randn(2, 7, 24),)
    module = SelfAttention(plain, joint=joint).eval().requires_grad_(False)
    integer, real = planted(module, sample), capture(module, sample)
    assert any(choice.meets(n) for n in integer.operators)
    assert not any(choice.meets(n) for n in real.operators)
    assert any(n.target in (quantize, dequantize) for n in integer.operators)
