"""The constant matrices of a program that can be written in few bits, and the rewrite itself.

A weight is found by its readers: linears, matrix products with a constant right side (GPT-2's
Conv1D), embedding tables, and convolutions where asked for. One constant read by several of them,
such as an embedding table that is also the output layer, is one weight with one set of codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.ir.errors import NothingToDoError, source_line
from planish.ir.ops import aten, is_op, op_name
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import SparseLayout
from planish.passes.quantize.weights import Codes, decibels, weight_problem
from planish.passes.quantize.where import Where

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_RULE = "round-weight"
DEQUANTIZE = torch.ops.planish.dequantize.default
QUANTIZED = "its weight is quantized already"

# Operator -> position of its weight, and the weight's axes of outputs and of inputs.
_READERS: dict[Any, tuple[int, int, int]] = {
    aten.linear.default: (1, 0, 1),
    aten.addmm.default: (2, 1, 0),
    aten.mm.default: (1, 1, 0),
    aten.matmul.default: (1, 1, 0),
    aten.embedding.default: (0, 0, 1),
    **dict.fromkeys(CONVOLUTIONS, (1, 0, 1)),
}


@dataclass(frozen=True)
class Weight:
    """A constant to be rounded.

    Attributes:
        name: of the constant.
        value: its numbers.
        sources: the nodes that name it.
        readers: the operators that multiply by it or look rows up in it, in program order.
        out_axis: the axis of outputs (of rows, for a table).
        in_axis: the axis that is summed over.
        layout: that it claims; its zeros stay exactly zero.
    """

    name: str
    value: Tensor
    sources: tuple[Node, ...]
    readers: tuple[Node, ...]
    out_axis: int
    in_axis: int
    layout: SparseLayout | None = None

    @property
    def products(self) -> tuple[Node, ...]:
        """The readers that multiply."""
        return tuple(r for r in self.readers if not is_op(r, aten.embedding.default))

    @property
    def is_convolution(self) -> bool:
        """Whether a convolution reads it."""
        return is_op(self.readers[0], *CONVOLUTIONS)

    def rows(self) -> Tensor:
        """The weight as ``[outputs, inputs]``, a convolution's window flattened."""
        return self.as_rows(self.value)

    def as_rows(self, x: Tensor) -> Tensor:
        """Anything of the weight's shape as ``[outputs, inputs]``."""
        return x.movedim(self.out_axis, 0).flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """``[outputs, inputs]`` in the shape of the weight."""
        shape = self.value.movedim(self.out_axis, 0).shape
        return rows.reshape(shape).movedim(0, self.out_axis).contiguous()

    def from_blocks(self, rows: Tensor) -> Tensor:
        """Scales or zero points ``[outputs, blocks]`` in the axes of the weight."""
        return rows.t().contiguous() if self.out_axis == 1 else rows

    def scheme(self, dtype: str, block_size: int, symmetric: bool | None) -> QuantScheme:
        """The scheme of this weight: blocks along its inputs, or one scale for each output."""
        if symmetric is None:
            symmetric = dtype.startswith("int")
        scheme = QuantScheme(
            dtype=dtype,  # type: ignore[arg-type]  # checked by the scheme itself
            granularity="channel",
            axis=self.out_axis,
            symmetric=symmetric,
            narrow=symmetric and (dtype == "int8" or (dtype == "int4" and self.layout is not None)),
        )
        if not block_size or self.is_convolution:
            return scheme
        return replace(scheme, granularity="block", axis=self.in_axis, block_size=block_size)


def row_scheme(scheme: QuantScheme) -> QuantScheme:
    """The same scheme for a weight laid out as ``[outputs, inputs]``."""
    return replace(scheme, axis=1 if scheme.granularity == "block" else 0)


def find_weights(
    program: Program,
    *,
    embeddings: bool = True,
    convolutions: bool = False,
    where: Where | None = None,
) -> tuple[list[Weight], list[Refusal]]:
    """Weights in the order of their first readers, and why others are none.

    Args:
        program: where to look.
        embeddings: whether tables that are only looked up in count.
        convolutions: whether convolutions count.
        where: a choice among the operators.
    """
    where = where or Where()
    where.check(program)
    order = {node: i for i, node in enumerate(program.nodes)}
    found: list[Weight] = []
    refusals: list[Refusal] = []
    for name, sources in _constants(program).items():
        value = program.constants[name]
        readers = sorted({u for s in sources for u in s.users}, key=order.__getitem__)
        wanted = [r for r in readers if _position(r, sources, convolutions) and where.takes(r)]
        if not wanted or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not embeddings and all(is_op(r, aten.embedding.default) for r in wanted):
            continue
        problem = _problem(value, readers, wanted, sources)
        if problem is not None:
            refusals.append(Refusal(_RULE, wanted[0].name, problem, source_line(wanted[0])))
            continue
        axes = _READERS[wanted[0].target][1:]
        layout = program.layouts.get(name)
        found.append(Weight(name, value, tuple(sources), tuple(wanted), *axes, layout))
    found.sort(key=lambda w: order[w.readers[0]])
    return found, [*refusals, *_computed(program, convolutions, where)]


def _constants(program: Program) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).append(node)
    return found


def _position(reader: Node, sources: Iterable[Node], convolutions: bool) -> bool:
    """Whether an operator reads one of these nodes as its weight."""
    entry = _READERS.get(reader.target)
    if entry is None or (reader.target in CONVOLUTIONS and not convolutions):
        return False
    return len(reader.args) > entry[0] and any(reader.args[entry[0]] is s for s in sources)


def _problem(
    value: Tensor, readers: list[Node], wanted: list[Node], sources: list[Node]
) -> str | None:
    others = [r for r in readers if r not in wanted]
    if others:
        return f"{op_name(others[0].target)} reads the same constant, which would be stored twice"
    if any(sum(a in sources for a in r.args) > 1 for r in wanted):
        return "the constant is both operands"
    if len({_READERS[r.target][1:] for r in wanted}) > 1:
        return "its readers disagree on which axis is summed over"
    if value.dim() != 2 and not is_op(wanted[0], *CONVOLUTIONS):
        return f"its weight has {value.dim()} axes"
    return weight_problem(value)


def _computed(program: Program, convolutions: bool, where: Where) -> list[Refusal]:
    """What is not rounded because its weight is no float constant."""
    found = []
    for node in program.operators:
        entry = _READERS.get(node.target)
        if entry is None or not where.takes(node):
            continue
        source = node.args[entry[0]]
        if is_op(source, DEQUANTIZE) and (convolutions or node.target not in CONVOLUTIONS):
            found.append(Refusal(_RULE, node.name, QUANTIZED, source_line(node)))
        elif is_op(node, aten.linear.default) and program.constant(source) is None:
            reason = "its weight is computed: fold-constants may help"
            found.append(Refusal(_RULE, node.name, reason, source_line(node)))
    return found


def required(weights: list[Weight], refusals: list[Refusal], pass_name: str) -> list[Weight]:
    """The weights, which may be none if all are quantized already.

    Raises:
        NothingToDoError: there are none, so that the pass would have no effect.
    """
    if not weights and not any(r.reason == QUANTIZED for r in refusals):
        raise NothingToDoError(
            f"{pass_name} found no weight to round"
            + (f": {refusals[0].node}: {refusals[0].reason}" if refusals else ""),
            hint="weights are constants read by linears, constant matrix products or embeddings",
        )
    return weights


def write_codes(rewriter: Rewriter, weight: Weight, codes: Codes, note: str = "") -> bool:
    """Replace a float weight by ``dequantize(codes)``; False where the site was denied."""
    first = weight.readers[0]
    with rewriter.site(_RULE, first) as allowed:
        if not allowed:
            return False
        scheme = codes.scheme
        stem = weight.name.removesuffix(".weight")
        like = weight.sources[0] if "stack_trace" in weight.sources[0].meta else first
        parts = [
            rewriter.constant(value.contiguous(), f"{stem}.{what}", like=like, layout=layout)
            for what, value, layout in (
                ("codes", codes.codes, weight.layout),
                ("scale", codes.scale, None),
                ("zero_point", codes.zero_point, None),
            )
        ]
        real = rewriter.call(
            DEQUANTIZE,
            parts,
            {"dtype": scheme.dtype, "axis": scheme.axis, "block_size": scheme.block_size},
            like=first,
        )
        loss = decibels(weight.value.float(), codes.real().float())
        said = (f"{weight.name} to {scheme}: {loss:.1f} dB", note, codes.coarse)
        rewriter.note("; ".join(filter(None, said)))
        for source in weight.sources:
            rewriter.replace(source, real)
    return True
