"""Write the operands of products, and what lies between them, as small integers.

Rewrite:
    y = op(v, W, b)   ->   y = op(dq(q(v, s, z)), dq(@Q, s_w, 0), dq(@B, s s_w, 0))
    static: s and z from calibration;  dynamic: dq(*dynamic_quantize(v));  weight: only W
Shapes:       v: any; s, z: []; W: as torch lays it out; s_w: [C] per output channel, or in blocks
              along the axis that is summed over.
Requires:     float32; constant, finite weights; calibration for static ranges.
Contract:     lossy: each operand is off by at most half a step inside of its range.
Cost:         weights of a quarter of the size (an eighth in 4 bits); static adds one quantize per
              value, shared by all that read it.
Failures:     operators that cannot compute on integers stay in float and are refused one by one;
              that nothing could be quantized is an error.
Source:       Jacob et al., "Quantization and Training of Neural Networks for Efficient
              Integer-Arithmetic-Only Inference", CVPR 2018; Nagel et al., "A White Paper on Neural
              Network Quantization", 2021, sections 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import Node

from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.observe import RangeMethod
from planish.passes.quantize.attention import decompose, is_attention
from planish.passes.quantize.insert import Inserter
from planish.passes.quantize.operands import Operands, is_written
from planish.passes.quantize.plan import Plan, is_attention_product, make_plan, nothing
from planish.passes.quantize.ranges import AUTO, Grid, find_grids
from planish.passes.quantize.regions import Between
from planish.passes.quantize.saturation import portability
from planish.passes.quantize.where import DECOMPOSE, EVERYWHERE, Where

_STATIC = ("range", "between", "padding_mask")  # options that only static ranges have


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Write values and weights as integers, with explicit quantize and dequantize operators.

    Attributes:
        mode: ranges of values "static" from calibration, "dynamic" at run time, or only weights
            ("weight"). The state of an LSTM gets its range at run time in any of them.
        activations: integers of values; "none" is mode "weight".
        weights: integers of weights.
        granularity: what shares a scale in a weight: an output "channel", a "block" of
            ``block_size`` along the axis that is summed over, or the whole "tensor".
        block_size: of blocks.
        symmetric: whether weights have no zero point of their own.
        weight_range: of weights; "mse" cuts the largest where that lowers the squared error.
        range: of values, see ``planish.passes.observe``. The whole range is the default: it is the
            nearest once outliers were smoothed (MiniLM: 25.9 dB, "mse" 24.0; without smoothing
            17.7 and 18.1).
        per_token: dynamic ranges of each row along the last axis, instead of the whole value.
        attention: also the products of attention.
        embedding: also tables of embeddings; None: only in mode "weight".
        between: also operators between: in regions of "convolutions", of "all" products, "none".
        saturation: portable answers on CPUs without VNNI: "reduced" uses 7 bits of weights,
            "signed" int8 values; "none" leaves sums of u8*s8 pairs to saturate there.
        padding_mask: the input that is 0 at padding, which ranges leave out; "auto" takes one
            called attention_mask, null none.
        where: which operators.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Jacob et al., Quantization and Training of Neural Networks for Efficient "
        "Integer-Arithmetic-Only Inference, CVPR 2018",
        "Nagel et al., A White Paper on Neural Network Quantization, 2021, sections 2 and 3",
    )

    mode: Literal["static", "dynamic", "weight"] = "static"
    activations: Literal["uint8", "int8", "none"] = "uint8"
    weights: Literal["int8", "uint8", "int4", "uint4"] = "int8"
    granularity: Literal["tensor", "channel", "block"] = "channel"
    block_size: int = 0
    symmetric: bool = True
    weight_range: Literal["minmax", "mse"] = "minmax"
    range: RangeMethod = "minmax"
    per_token: bool = False
    attention: bool = False
    embedding: bool | None = None
    between: Between = "convolutions"
    saturation: Literal["none", "reduced", "signed"] = "none"
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.activations == "none" and self.mode == "dynamic":
            raise ValueError("mode=dynamic with activations=none quantizes weights: mode=weight")
        if (self.block_size > 0) != (self.granularity == "block"):
            raise ValueError(
                f"granularity={self.granularity} with block_size={self.block_size}: blocks, and "
                "nothing else, have a size"
            )
        if self.granularity == "block" and self.kind != "weight":
            raise ValueError("weights in blocks have no integer kernels: use mode=weight")
        if self.per_token and self.kind != "dynamic":
            raise ValueError("per_token is for mode=dynamic")
        if self.saturation == "reduced" and self.weights != "int8":
            raise ValueError(
                f"saturation=reduced is for weights=int8: {self.weights} fits as it is"
            )
        if self.kind == "weight" and (self.attention or self.saturation != "none"):
            raise ValueError("mode=weight multiplies no integers: no attention, no saturation")
        idle = [name for name in _STATIC if getattr(self, name) != getattr(type(self), name)]
        if idle and self.kind != "static":
            raise ValueError(f"{' and '.join(idle)} is for mode=static")

    def needs(self) -> frozenset[Fact]:
        """Calibration, for static ranges."""
        return self.requires if self.kind == "static" else frozenset()

    @property
    def kind(self) -> Literal["static", "dynamic", "weight"]:
        """The mode; "weight" where values are not quantized at all."""
        return "weight" if self.activations == "none" else self.mode

    @property
    def weight_scheme(self) -> QuantScheme:
        """How weights are written; the axis is each weight's own."""
        return QuantScheme(
            dtype=self.weights,
            granularity=self.granularity,
            symmetric=self.symmetric,
            axis=None if self.granularity == "tensor" else 0,
            block_size=self.block_size,
            narrow=self.symmetric and self.weights == "int8",
            bits=7 if self.saturation == "reduced" else None,
        )

    @property
    def value_scheme(self) -> QuantScheme:
        """How values are written."""
        signed = self.activations == "int8" or self.saturation == "signed"
        return QuantScheme(dtype="int8" if signed else "uint8", symmetric=False)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Decide, find the ranges, and write the operands one operator after the other."""
        self.where.check(program)
        rewriter = Rewriter(program, self.name, context.sites)
        if self.attention and self.kind != "weight":
            self._open_attention(program, rewriter)
        between: Between = self.between if self.kind == "static" else "none"
        plan = make_plan(program, self.where, between, self._declines, values=self.kind != "weight")
        if not plan.operators:
            raise nothing(plan)
        inserter = Inserter(
            rewriter,
            self.weight_scheme,
            search=self.weight_range == "mse",
            grids=self._grids(program, plan, context) if self.kind == "static" else None,
            dynamic=(self.value_scheme.dtype, self.per_token),
        )
        for node, operands in plan.operators.items():
            if is_written(node, operands, bias=self.kind == "static"):
                continue
            with rewriter.site(f"quantize-{operands.kind}", node) as allowed:
                if allowed:
                    inserter.write(node, operands)
        inserter.finish()
        result = PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(plan.refusals))
        for sentence in (*inserter.remarks, *portability(result.program)):
            context.remark(sentence)
        return result

    def _open_attention(self, program: Program, rewriter: Rewriter) -> None:
        """Write the chosen attentions as products."""
        for node in program.operators:
            if is_attention(node) and self.where.takes(node):
                with rewriter.site(DECOMPOSE, node) as allowed:
                    if allowed:
                        decompose(node, rewriter)

    def _declines(self, node: Node, operands: Operands) -> str | None:
        """Why an operator stays in float though it could compute on integers."""
        kind, mode = operands.kind, self.kind
        if kind == "attention" or (not self.attention and is_attention_product(node, operands)):
            return "the products of attention stay in float without attention=true"
        embedding = mode == "weight" if self.embedding is None else self.embedding
        if kind == "embedding" and not embedding:
            return "tables of embeddings stay in float without embedding=true"
        if is_op(node, aten.gru.input) and mode != "weight":
            return "runtimes have no integer kernel for GRUs: only mode=weight makes them small"
        if kind == "convolution" and mode == "dynamic":
            return "convolutions gain nothing by ranges found at run time: use mode=static"
        if self.per_token and any(not _has_rows(slot.read(node)) for slot in operands.values):
            return "the size of its rows is not known, as per_token needs it"
        return None

    def _grids(self, program: Program, plan: Plan, context: PassContext) -> dict[str, Grid]:
        """How each value is written, from what calibration saw."""
        return find_grids(
            program,
            plan.missing_values(),
            plan.agree,
            self.value_scheme,
            self.range,
            context,
            self.padding_mask,
        )


def _has_rows(value: Node) -> bool:
    """Whether the last axis of an operand has a fixed size."""
    return isinstance(value.meta["val"].shape[-1], int)
