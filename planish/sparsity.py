"""What the report says of sparse weights: shares of zeros, packed sizes, and what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, op_name
from planish.ir.program import Program
from planish.ir.quantscheme import INTEGERS, spread
from planish.ir.tensortype import SparseLayout, dtype_name

if TYPE_CHECKING:
    from rich.console import RenderableType

CPU_NOTE = (
    "2:4 sparsity does not make this model faster on CPU runtimes: their kernels multiply zeros "
    "like any number; GPUs with sparse tensor cores skip them"
)
CPU_TARGETS = ("onnxruntime-cpu", "onnx")
_SHOWN = 12  # weights that the terminal lists; the JSON has them all


@dataclass(frozen=True)
class SparseWeight:
    """A constant that claims a layout.

    Attributes:
        name: of the constant.
        layout: that it claims.
        shape: of the constant.
        dtype: element type: "f32", "int4".
        zeros: the share of numbers that are zero.
        dense_bytes: what it takes with its zeros.
        packed_bytes: what the numbers that stay take, and the places of each in its group
            (2 bits in a group of 4); None where no hardware packs the layout.
    """

    name: str
    layout: SparseLayout
    shape: tuple[int, ...]
    dtype: str
    zeros: float
    dense_bytes: int
    packed_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "layout": str(self.layout),
            "shape": list(self.shape),
            "dtype": self.dtype,
            "zeros": round(self.zeros, 6),
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
        }


def packed_bytes(layout: SparseLayout, numel: int, bits: int) -> int | None:
    """Size of a weight of a grouped layout: values, and ``log2(m)`` bits for the place of each.

    Args:
        layout: ``n`` of ``m`` along an axis; else None is returned.
        numel: of the dense weight, whole groups.
        bits: of one number.
    """
    if layout.axis is None:
        return None
    kept = numel // layout.m * layout.n
    place = (layout.m - 1).bit_length()
    return -(-kept * (bits + place) // 8)


def sparse_weights(program: Program) -> tuple[SparseWeight, ...]:
    """The sparse weights of a program, in the order of their claims."""
    readers = {
        str(node.args[0].target): node
        for node in program.operators
        if op_name(node.target) == "planish.dequantize" and isinstance(node.args[0], Node)
    }
    found = []
    for name, layout in program.layouts.items():
        value = program.constants[name]
        if not isinstance(value, Tensor):
            continue
        dtype, bits, zero = dtype_name(value.dtype), 8 * value.element_size(), None
        if name in readers:
            node = readers[name]
            dtype = argument(node, "dtype")
            bits = (INTEGERS[dtype][1] - INTEGERS[dtype][0]).bit_length()
            point = program.constant(argument(node, "zero_point"))
            if point is not None:
                zero = spread(point, value, argument(node, "axis"), argument(node, "block_size"))
        share = float((value == (0 if zero is None else zero)).double().mean())
        found.append(
            SparseWeight(
                name,
                layout,
                tuple(value.shape),
                dtype,
                share,
                -(-value.numel() * bits // 8),
                packed_bytes(layout, value.numel(), bits),
            )
        )
    return tuple(found)


def sparsity_dict(weights: Sequence[SparseWeight], target: str) -> dict[str, Any] | None:
    """The part of the report's JSON; None where nothing is sparse."""
    if not weights:
        return None
    return {
        "weights": [weight.to_dict() for weight in weights],
        "dense_bytes": sum(w.dense_bytes for w in weights if w.packed_bytes is not None),
        "packed_bytes": sum(w.packed_bytes for w in weights if w.packed_bytes is not None),
        "note": CPU_NOTE if _pays_not(weights, target) else None,
    }


def _pays_not(weights: Sequence[SparseWeight], target: str) -> bool:
    return target in CPU_TARGETS and any(w.layout.axis is not None for w in weights)


def sparsity_lines(
    weights: Sequence[SparseWeight], target: str, runtime: Mapping[str, Any] | None
) -> list[str]:
    """Sentences on the sparse weights; none where there are none.

    Args:
        weights: see ``sparse_weights``.
        target: what the program was optimized for.
        runtime: the part of the report that an export adds.
    """
    if not weights:
        return []
    kinds = Counter(_kind(weight.layout) for weight in weights)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    lines = [f"{len(weights)} weights are sparse: {listed}"]
    facts = sparsity_dict(weights, target) or {}
    if facts["packed_bytes"]:
        lines[0] += f"; {facts['dense_bytes']} bytes dense, {facts['packed_bytes']} packed"
    kept = (runtime or {}).get("sparsity") or []
    if kept:
        lines.append(
            f"the file was read back: {len(kept)} of {len(weights)} sparse weights keep their zeros"
        )
    if facts["note"]:
        lines.append(facts["note"])
    return lines


def sparsity_parts(weights: Sequence[SparseWeight]) -> list[RenderableType]:
    """A table of the sparse weights; nothing where there are none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not weights:
        return []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("sparse weight", "layout", "dtype"):
        table.add_column(title, overflow="fold")
    for title in ("zeros", "dense bytes", "packed"):
        table.add_column(title, justify="right")
    for w in weights[:_SHOWN]:
        packed = "" if w.packed_bytes is None else str(w.packed_bytes)
        # As texts: in plain strings rich would read brackets as its own markup.
        cells = (w.name, str(w.layout), w.dtype, f"{w.zeros:.1%}", str(w.dense_bytes), packed)
        table.add_row(*map(Text, cells))
    parts: list[RenderableType] = [table]
    if len(weights) > _SHOWN:
        more = len(weights) - _SHOWN
        parts.append(Text(f"{more} more are sparse; the JSON report has all", style="dim"))
    return parts


def _kind(layout: SparseLayout) -> str:
    if layout.axis is not None:
        return f"{layout.n}:{layout.m}"
    return "unstructured" if layout.block == (1, 1) else "blocks of {}x{}".format(*layout.block)
