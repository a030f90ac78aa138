"""What the emitter and the translations talk in: views of values, and the style of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import SymBool, SymInt, Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dims
from planish.ir.ops import node_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.backends.onnx_graph import Emitter


@dataclass(frozen=True, eq=False)
class View:
    """A value seen through a reshape, then a permutation.

    Attributes:
        base: the ONNX value.
        base_dims: its sizes.
        dims: sizes after the reshape.
        perm: permutation of ``dims``; None for none.
    """

    base: ir.Value
    base_dims: Dims
    dims: Dims
    perm: tuple[int, ...] | None = None

    @property
    def shape(self) -> Dims:
        """The sizes that are seen."""
        return self.dims if self.perm is None else tuple(self.dims[p] for p in self.perm)

    @property
    def keeps_rows(self) -> bool:
        """Whether the last axis is that of the base, so that row-wise operators may use it."""
        return self.perm is None and self.base_dims[-1:] == self.dims[-1:] != ()

    def with_base(self, base: ir.Value) -> View:
        """The same view of another value of the same sizes."""
        return View(base, self.base_dims, self.dims, self.perm)


Held: TypeAlias = View | list[Any]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How operators with more than one ONNX form are written.

    Attributes:
        attention: "operator" (ONNX Attention, opset 23) or "matmul".
        residual: "sum" or "add": the addition before a layer norm. ONNX Runtime fuses Add with
            the norm into a kernel that is slower than both, and leaves Sum alone.
        linear: "gemm" or "matmul".
        rms_norm: "operator" (ONNX RMSNormalization, opset 23) or "primitives".
        rotary: "operator" (ONNX RotaryEmbedding, opset 23) or "primitives".
        integers: whose integer kernels are written out: "onnxruntime", or "standard" for
            QuantizeLinear and DequantizeLinear around operators on real numbers.
        stem: a convolution of few channels: "plain", or "merged" for neighboring pixels taken as
            channels of one, see ``ort_stem``.
        wide: a convolution with more weights than a cache holds: "whole", or "split" along its
            output channels, see ``ort_wide``.
        weights: how ONNX Runtime multiplies float values by weights in blocks: "branch" or
            "integers"; see ``ort_weights``.
        integer_attention: "separate" products of codes for queries, keys and values, or "packed"
            into QAttention; see ``ort_attention_int8``.
        parts: a product of codes that is split along its columns: one product for each part
            ("apart"), or one and a Split ("split").
    """

    attention: str = "matmul"
    residual: str = "sum"
    linear: str = "gemm"
    rms_norm: str = "primitives"
    rotary: str = "primitives"
    weights: str = "branch"
    integers: str = "standard"
    stem: str = "plain"
    wide: str = "whole"
    integer_attention: str = "separate"
    parts: str = "apart"


def dtype_of(value: Any) -> torch.dtype:  # noqa: ANN401
    """The dtype of a fake tensor or symbolic number."""
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, (bool, SymBool)):
        return torch.bool
    if isinstance(value, (int, SymInt)):
        return torch.int64
    return torch.float32


def source_of(node: Node) -> Node:
    """The first operand of an operator that reads a tensor."""
    return node_of(node.args[0])


def rank_of(node: Node) -> int:
    """The number of axes of a tensor."""
    return len(node.meta["val"].shape)


# What a translation returns: a value, a view, a list of them, or None where it declines.
Translator: TypeAlias = "Callable[[Emitter, Node], Any]"
Table: TypeAlias = Mapping[Any, Translator]
