"""Compute in float16 or bfloat16, but for named islands that stay in float32.

Rewrite:
    y = op(x, W)   ->   y = to(op(to(x, half), W_half), float32)
    and a conversion to float32 that only leads back to half is taken out.
Shapes:       all kept; inputs and outputs keep their dtype.
Requires:     float32 operators; float16 also calibration, to see what overflows.
Contract:     lossy: 11 significant bits (float16) or 8 (bfloat16) for every value outside of the
              islands.
Cost:         half the bytes of weights and values. Faster where the hardware computes in the
              format; slower on most CPUs, which convert around every operator.
Failures:     an operator stays in float32, and is named with its reason, if a value it reads or
              writes comes near the largest number of the format, if it overflows on the way, if it
              is a softmax, a norm or a long sum, or if torch does not compute it in the format.
              That nothing is left is an error.
Source:       Micikevicius et al., "Mixed Precision Training", ICLR 2018, sections 3.1 and 3.3;
              Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.errors import MisusedPassError, NothingToDoError, source_line
from planish.ir.ops import aten, is_op, op_name
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.precision.half_ranges import (
    CONVERSIONS,
    Ranges,
    is_imprecise,
    is_real,
    measure_ranges,
    moves,
    real_inputs,
    saturated,
)
from planish.passes.quantize.where import EVERYWHERE, Where

_RULE = "cast"
_FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class CastHalf(Pass):
    """Compute in 16-bit floats, with float32 islands where the format overflows or is too coarse.

    Attributes:
        dtype: the format: "fp16" holds up to 65504 with 11 bits, "bf16" what float32 holds with 8.
        headroom: an operator stays in float32 if a calibrated value of it, this many times over,
            would overflow.
        precise: keep softmax, norms and long sums in float32.
        where: which operators; the others are islands.
    """

    name: ClassVar[str] = "cast-half"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Micikevicius et al., Mixed Precision Training, ICLR 2018, sections 3.1 and 3.3",
        "Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019",
    )

    dtype: Literal["fp16", "bf16"] = "fp16"
    headroom: float = 2.0
    precise: bool = True
    where: Where = EVERYWHERE

    def needs(self) -> frozenset[Fact]:
        """Calibration for float16; bfloat16 holds whatever float32 holds."""
        return self.requires if self.dtype == "fp16" else frozenset()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Measure, decide, and cast operator by operator.

        Raises:
            MisusedPassError: an option is out of range.
            NothingToDoError: no operator can be cast.
        """
        if self.headroom < 1:
            raise MisusedPassError(
                f"headroom is {self.headroom}", hint="give a number of at least 1"
            )
        self.where.check(program)
        candidates = [n for n in program.operators if _computes(n)]
        batches = context.calibration if context.calibration is not None else program.samples
        ranges = measure_ranges(program, batches, set(candidates), _FORMATS[self.dtype])
        islands = {n: why for n in candidates if (why := self._island(n, ranges)) is not None}
        done = any(_is_half(n, _FORMATS[self.dtype]) for n in program.operators)
        if len(islands) == len(candidates) and candidates and not done:
            first = next(iter(islands.items()))
            raise NothingToDoError(
                f"no operator can compute in {_NAMES[self.dtype]}: {first[1]}",
                where=first[0],
                hint="the others are alike; try dtype=bf16, or less headroom",
            )
        if not candidates:
            context.remark("nothing was cast: no operator computes one float32 value")
        several = {n: "it gives several values at once" for n in program.operators if _several(n)}
        refusals = tuple(
            Refusal(_RULE, n.name, w, source_line(n)) for n, w in {**islands, **several}.items()
        )
        for sentence in self._remarks(islands, context):
            context.remark(sentence)
        rewriter = Rewriter(program, self.name, context.sites)
        caster = _Caster(rewriter, _FORMATS[self.dtype], ranges)
        for node in [n for n in program.operators if is_real(n.meta.get("val"))]:
            if node._erased or node in islands:
                continue
            if node in candidates or caster.moves_halves(node):
                with rewriter.site(_RULE, node) as allowed:
                    if allowed:
                        caster.cast(node)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), refusals)

    def _island(self, node: Node, ranges: Ranges) -> str | None:
        """Why an operator stays in float32; None where it does not."""
        if not self.where.takes(node):
            return "where leaves it out"
        reason = is_imprecise(node) if self.precise else None
        if reason is not None:
            return reason
        name, limit = _NAMES[self.dtype], torch.finfo(_FORMATS[self.dtype]).max
        for value in (*real_inputs(node), node):
            reach = ranges.peak.get(value, 0.0)
            if reach * self.headroom > limit:
                which = "its result" if value is node else f"its operand {value.name}"
                return f"{which} reaches {reach:.4g}; {name} ends at {limit:.4g}"
        return ranges.trouble.get(node)

    def _remarks(self, islands: dict[Node, str], context: PassContext) -> Iterator[str]:
        name = _NAMES[self.dtype]
        if islands:
            kinds = Counter(op_name(node.target) for node in islands)
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            yield f"islands in float32: {listed}"
        if context.target == "onnxruntime-cpu":
            yield (
                f"{name} is for runtimes that are fast in it: ONNX Runtime on a CPU computes in "
                "float32 between conversions, so this file is smaller and not faster"
            )


def _computes(node: Node) -> bool:
    """Whether an operator computes float32 values from float32 values, and nothing else does."""
    if moves(node) or is_op(node, *CONVERSIONS):
        return False
    if str(node.target).startswith("planish.") and "quantize" in str(node.target):
        return False
    if is_op(node, aten.clamp.default) and all(is_op(u, *CONVERSIONS) for u in node.users):
        return False  # the end of a mask that is about to be converted
    value = node.meta.get("val")
    return isinstance(value, Tensor) and is_real(value) and bool(real_inputs(node))


def _several(node: Node) -> bool:
    """Whether an operator computes several float32 values, as recurrent layers do."""
    value = node.meta.get("val")
    computed = isinstance(value, (tuple, list)) and is_real(value)
    return computed and bool(real_inputs(node)) and not moves(node)


def _is_half(node: Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is dtype


class _Caster:
    """Casts operators; conversions and constants are shared."""

    def __init__(self, rewriter: Rewriter, dtype: torch.dtype, ranges: Ranges):
        self.rewriter = rewriter
        self.dtype = dtype
        self.ranges = ranges
        self._lowered: dict[Node, Node] = {}
        self._constants: dict[str, Node] = {}

    def moves_halves(self, node: Node) -> bool:
        """Whether an operator moves around what was already computed in the format."""
        return moves(node) and bool(node.all_input_nodes) and self._is_back(node.all_input_nodes[0])

    def _is_back(self, node: Node) -> bool:
        """Whether a value is a conversion to float32 of one in the format."""
        return (
            is_op(node, aten.to.dtype)
            and node.args[1] is torch.float32
            and node.args[0].meta["val"].dtype is self.dtype  # type: ignore[union-attr]  # by the operator's schema
        )

    def cast(self, node: Node) -> None:
        """Compute a node in the format, and give its users float32 back."""
        args: Any = map_arg(node.args, lambda n: self._lower(n, node))
        kwargs: Any = map_arg(node.kwargs, lambda n: self._lower(n, node))
        made = self.rewriter.call(node.target, args, kwargs, like=node)
        if isinstance(node.meta["val"], (tuple, list)):
            for user in list(node.users):
                part = self.rewriter.call(user.target, (made, user.args[1]), like=user)
                self.rewriter.replace(user, self._back(part, user))
            return
        self.rewriter.replace(node, self._back(made, node))

    def _back(self, made: Node, like: Node) -> Node:
        back = self.rewriter.call(aten.to.dtype, (made, torch.float32), like=like)
        self._lowered[back] = made
        return back

    def _lower(self, node: Node, reader: Node) -> Node:
        """A value in the format."""
        if not is_real(node.meta.get("val")):
            return node
        known = self.rewriter.program.constant(node)
        if known is not None:
            name = str(node.target)
            if name not in self._constants:  # later readers come later in the graph, too
                lowered = saturated(known, self.dtype)
                layout = self.rewriter.program.layouts.get(name)  # a zero stays one
                self._constants[name] = self.rewriter.constant(
                    lowered, name, like=reader, layout=layout
                )
            return self._constants[name]
        if node not in self._lowered:
            self._lowered[node] = self._to_half(node, reader)
        return self._lowered[node]

    def _to_half(self, node: Node, reader: Node) -> Node:
        if self._is_back(node):
            return node.args[0]  # type: ignore[return-value]  # by the operator's schema
        value = node
        if node in self.ranges.edge:
            limit = torch.finfo(self.dtype).max
            value = self.rewriter.call(aten.clamp.default, (value, -limit, limit), like=reader)
        return self.rewriter.call(aten.to.dtype, (value, self.dtype), like=reader)
