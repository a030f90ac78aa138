"""Fuse linears that read the same input into one wide linear and a split.

Rewrite:
    y_i = x W_i^T + b_i,  i = 1..n   ->   y_1, ..., y_n = split(x W^T + b)
    W = [W_1; ...; W_n],  b = [b_1; ...; b_n], zeros where one linear of several has no bias
Shapes:       x: [..., I];  W_i: [O_i, I];  b_i: [O_i];  W: [sum O_i, I].  The O_i may differ
              (grouped-query attention).
Requires:     weights and biases constant, weights read by nothing else and sharing no memory; one
              sparse layout for all weights, or none. (A linear that reads x has the dtype of x.)
Contract:     exact: every output is the same dot product. A matrix product of another width may
              add its terms in another order, which costs the last bit.
Cost:         one copy of the weights; n products become one product and one split.
Failures:     none; what does not fit is refused.
Source:       Vaswani et al., "Attention Is All You Need", NeurIPS 2017, sec. 3.2.2 (the projections
              of one attention layer); Shazeer, "GLU Variants Improve Transformer", 2020 (gate, up).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import stacked_layout
from planish.passes.base import Contract, Pass, PassContext, PassResult


def stack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the wide linear.

    Args:
        weights: ``[O_i, I]`` each.
        biases: ``[O_i]`` each, or None for no bias.

    Returns:
        ``[sum O_i, I]`` and ``[sum O_i]``; the bias is None where no linear has one.
    """
    weight = torch.cat(list(weights))
    if all(bias is None for bias in biases):
        return weight, None
    filled = [
        w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)
    ]
    return weight, torch.cat(filled)


def joint_name(weights: Sequence[str]) -> str:
    """``attn.q_k_v`` for ``attn.q.weight``, ``attn.k.weight`` and ``attn.v.weight``."""
    layers = [name.rsplit(".", 1)[0].split(".") for name in weights]
    common = 0
    while all(len(layer) > common + 1 for layer in layers) and (
        len({layer[common] for layer in layers}) == 1
    ):
        common += 1
    own = "_".join("_".join(layer[common:]) for layer in layers)
    return ".".join([*layers[0][:common], own])


class ConstantUse:
    """Who reads which constant, counted once per run of the pass.

    Rewrites of this pass only remove readers and add constants of their own, so the counts stay
    an upper bound.
    """

    def __init__(self, program: Program):
        self.readers: Counter[str] = Counter()
        for node in program.graph.find_nodes(op="get_attr"):
            self.readers[str(node.target)] += len(node.users)
        self.owners: Counter[int] = Counter(
            value.untyped_storage().data_ptr()
            for name, value in program.constants.items()
            if isinstance(value, Tensor) and self.readers[name]
        )

    def is_shared(self, node: Node, value: Tensor) -> bool:
        """Whether something else reads this constant or another one in the same memory."""
        others = self.owners[value.untyped_storage().data_ptr()] > 1
        return self.readers[str(node.target)] > 1 or others


class WidenLinear(Rule):
    """One wide linear for all that read ``x``."""

    name = "widen-linear"
    roots = frozenset({aten.linear.default})

    def __init__(self, use: ConstantUse, min_linears: int, max_features: int):
        self.use = use
        self.min_linears = min_linears
        self.max_features = max_features

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Look at the whole group from its first linear; the others answer nothing."""
        x = node.args[0]
        if not isinstance(x, Node):
            return None
        if next(user for user in x.users if _reads(user, x)) is not node:
            return None
        readers = [user for user in x.users if _reads(user, x)]
        if len(readers) < 2:
            return None
        fitting = [linear for linear in readers if self._obstacle(linear, program) is None]
        if len(fitting) < max(2, self.min_linears):
            return self.refuse(node, self._why(readers, fitting, program))
        weights = [_weight(linear, program) for linear in fitting]
        fitting = sorted(fitting)  # the order in which they are stacked
        layouts = [program.layouts.get(str(linear.args[1].target)) for linear in fitting]  # type: ignore[union-attr]  # a get_attr
        shapes = [tuple(_weight(linear, program).shape) for linear in fitting]
        joint, problem = stacked_layout(layouts, shapes)
        if problem is not None:
            return self.refuse(node, problem)
        features = sum(weight.shape[0] for weight in weights)
        if self.max_features and features > self.max_features:
            return self.refuse(
                node, f"together they have {features} features, more than {self.max_features}"
            )
        parts = {"x": x, "linears": sorted(fitting), "layout": joint}
        return Match(min(fitting), parts)

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """Stack the constants, put the wide linear before the first one and split its output."""
        program, linears = rewriter.program, match["linears"]
        weights = [_weight(linear, program) for linear in linears]
        biases = [program.constant(argument(linear, "bias")) for linear in linears]
        weight, bias = stack(weights, biases)
        name = joint_name([str(linear.args[1].target) for linear in linears])
        layout = match["layout"]
        wide = [rewriter.constant(weight, f"{name}.weight", like=linears[0], layout=layout)]
        if bias is not None:
            wide.append(rewriter.constant(bias, f"{name}.bias", like=linears[0]))
        product = rewriter.call(aten.linear.default, [match["x"], *wide], like=linears)
        sizes = [w.shape[0] for w in weights]
        split = rewriter.call(aten.split_with_sizes.default, [product, sizes, -1], like=linears)
        for position, linear in enumerate(linears):
            part = rewriter.call(operator.getitem, [split, position], like=linear)
            rewriter.replace(linear, part)
        rewriter.note(f"{len(linears)} linears of {' + '.join(map(str, sizes))} features")

    def _obstacle(self, linear: Node, program: Program) -> str | None:
        """Why a linear cannot join, or None."""
        weight, bias = program.constant(linear.args[1]), argument(linear, "bias")
        if weight is None:
            return "the weight is not constant"
        if bias is not None and program.constant(bias) is None:
            return "the bias is not constant"
        if self.use.is_shared(linear.args[1], weight):  # type: ignore[arg-type]
            return "the weight is tied to another use, so stacking it would store it twice"
        return None

    def _why(self, readers: list[Node], fitting: list[Node], program: Program) -> str:
        obstacles = [self._obstacle(linear, program) for linear in readers]
        first = next((o for o in obstacles if o is not None), None)
        if first is None:
            return f"{len(fitting)} linears share this input; min_linears is {self.min_linears}"
        return f"of {len(readers)} linears on this input {len(fitting)} can be stacked: {first}"


def _reads(user: Node, x: Node) -> bool:
    return is_op(user, aten.linear.default) and user.args[0] is x


def _weight(linear: Node, program: Program) -> Tensor:
    weight = program.constant(linear.args[1])
    assert weight is not None  # the guards looked
    return weight


@dataclass(frozen=True, kw_only=True)
class FuseParallelLinears(Pass):
    """Fuse linears that share one input (query, key and value; gate and up) into one.

    Attributes:
        min_linears: groups of fewer linears stay as they are.
        max_features: groups with more output features in total stay as they are; 0 for no limit.
    """

    name: ClassVar[str] = "fuse-parallel-linears"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2.2",
        "Shazeer, GLU Variants Improve Transformer, 2020",
    )

    min_linears: int = 2
    max_features: int = 0

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse every group."""
        rule = WidenLinear(ConstantUse(program), self.min_linears, self.max_features)
        return self.apply_rules(program, context, [rule])
