"""Attention and rotary embedding: every form gives torch's numbers, in every layout of heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import planish.ir.operators  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import Artifact, ExportOptions
from planish.backends.registry import load_backend
from planish.ir.capture import capture

BATCH, LENGTH = Dim("batch"), Dim("length", max=64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class SelfAttention(nn.Module):
    """Heads packed in the last axis, as transformers have them.

    Args:
        joint: one projection for query, key and value, taken apart by ``unbind``.
        kv_heads: heads of keys and values, repeated to four.
    """

    def __init__(self, *, joint: bool = False, kv_heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joint, self.kv_heads, self.causal = joint, kv_heads, causal
        self.query = nn.Linear(16, 48 if joint else 16)
        self.key = nn.Linear(16, kv_heads * 4)
        self.value = nn.Linear(16, kv_heads * 4)
        self.out = nn.Linear(16, 16)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        if self.joint:
            q, k, v = self.query(x).reshape(b, s, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q = self.query(x).view(b, s, 4, 4).transpose(1, 2)
        k, v = (f(x).view(b, s, -1, 4).transpose(1, 2) for f in (self.key, self.value))
        times = 4 // self.kv_heads
        if times > 1:
            k, v = (
                t[:, :, None].expand(b, self.kv_heads, times, s, 4).reshape(b, 4, s, 4)
                for t in (k, v)
            )
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        result: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return result


def export(tmp_path: Path, model: nn.Module, *args: Any, opset: int, dynamic: Any) -> Artifact:
    program = capture(model.eval(), args, dynamic_shapes=dynamic)
    options = ExportOptions(opset=opset, choices={"attention": "operator", "rotary": "operator"})
    return load_backend("onnxruntime-cpu").export(program, tmp_path / "m.onnx", options)


X = {0: BATCH, 1: LENGTH}


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(
    "options", [{}, {"joint": True}, {"causal": True}, {"kv_heads": 2}, {"kv_heads": 1}], ids=str
)
def test_self_attention(tmp_path: Path, options: dict[str, Any], opset: int) -> None:
    model = SelfAttention(**options)
    artifact = export(tmp_path, model, normal(2, 5, 16), opset=opset, dynamic=(X,))
    counts = artifact.operators
    if opset == 23:
        assert counts["Attention"] == 1
        assert "Transpose" not in counts
        assert "Expand" not in counts
    else:
        assert counts["Softmax"] == 1


MASKS: dict[str, tuple[Tensor, Any]] = {
    "padding": (
        torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1]).view(2, 1, 1, 5).bool(),
        {0: BATCH, 3: LENGTH},
    ),
    "one for all": (torch.ones(5, 5).tril().bool(), {0: LENGTH, 1: LENGTH}),
    "dead rows": (torch.ones(2, 1, 5, 5).tril(-1).bool(), {0: BATCH, 2: LENGTH, 3: LENGTH}),
    "per head": (torch.ones(2, 4, 5, 5).triu().bool(), {0: BATCH, 2: LENGTH, 3: LENGTH}),
    "additive": (normal(1, 4, 5, 5), {2: LENGTH, 3: LENGTH}),
    "additive with infinities": (
        torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu().bool(), float("-inf")),
        {0: BATCH, 2: LENGTH, 3: LENGTH},
    ),
}


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("name", MASKS)
def test_masks(tmp_path: Path, name: str, opset: int) -> None:
    mask, axes = MASKS[name]
    export(tmp_path, SelfAttention(), normal(2, 5, 16), mask, opset=opset, dynamic=(X, axes))


class ConstantMask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.inner = SelfAttention()
        self.mask = nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, self.mask)
        return result


def test_a_constant_mask_without_dead_rows_needs_no_guard(tmp_path: Path) -> None:
    model = ConstantMask(torch.ones(5, 5).tril().bool())
    artifact = export(tmp_path, model, normal(2, 5, 16), opset=23, dynamic=({0: BATCH},))
    assert "Mul" not in artifact.operators
    assert "ReduceMax" not in artifact.operators


def test_a_constant_mask_with_dead_rows_is_guarded(tmp_path: Path) -> None:
    model = ConstantMask(torch.ones(5, 5).tril(-1).bool())
    artifact = export(tmp_path, model, normal(2, 5, 16), opset=23, dynamic=({0: BATCH},))
    assert artifact.operators["Mul"] == 1


class CrossAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@pytest.mark.parametrize("opset", [20, 23])
def test_causal_with_more_keys_than_queries(tmp_path: Path, opset: int) -> None:
    q, k = normal(2, 3, 4, 8), normal(2, 3, 7, 8)
    export(tmp_path, CrossAttention(), q, k, k + 1, opset=opset, dynamic=None)


class Rotary(nn.Module):
    """Heads turned by their positions, then used in packed or in split form."""

    def __init__(self, *, interleaved: bool = False, halves: bool = True, packed: bool = True):
        super().__init__()
        self.interleaved, self.halves, self.packed = interleaved, halves, packed

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        steps = torch.arange(s)[:, None] * torch.linspace(0.1, 1.0, 4)
        other = steps if self.halves else steps * 2
        angle = torch.cat([steps, other], dim=-1)[None, None]
        heads = x.view(b, s, 2, 8).transpose(1, 2)
        if not self.packed:
            heads = heads * 2.0
            heads = heads + heads.mean()
        y = torch.ops.planish.rotary_embedding(heads, angle.cos(), angle.sin(), self.interleaved)
        return y.transpose(1, 2).reshape(b, s, 16)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(
    "options", [{}, {"interleaved": True}, {"halves": False}, {"packed": False}], ids=str
)
def test_rotary(tmp_path: Path, options: dict[str, bool], opset: int) -> None:
    artifact = export(tmp_path, Rotary(**options), normal(2, 5, 16), opset=opset, dynamic=(X,))
    as_operator = opset == 23 and options.get("halves", True) and not options.get("interleaved")
    assert artifact.operators.get("RotaryEmbedding", 0) == int(as_operator)
