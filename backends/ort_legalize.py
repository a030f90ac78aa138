"""Choose between equal forms of an operator for ONNX Runtime, by measurement.

Which form is faster is a fact of the runtime and the machine, and folklore about it is often
wrong: ONNX Runtime 1.32 fuses Add and LayerNormalization into a kernel that takes four times as
long as both. So each choice that a program meets is measured once per machine and runtime, and
kept in the user's cache. An alternative must win by a margin; within it the default stays, so
that noise does not change files. The choices made are recorded in the artifact and the recipe,
and replayed from there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

import planish.ir.operators  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import ExportOptions
from planish.backends.ort_stem import CHANNEL_STEP
from planish.backends.ort_weights import LONG_BLOCK
from planish.backends.ort_wide import is_wide_convolution
from planish.ir.errors import RecipeError
from planish.ir.ops import argument, is_op, is_view
from planish.ir.program import Program

if TYPE_CHECKING:
    from planish.backends.onnx_view import Style

aten = torch.ops.aten


@dataclass(frozen=True)
class Choice:
    """A decision between two forms.

    Attributes:
        name: as recipes write it.
        default: taken where neither wins.
        alternative: taken where it is faster by the margin.
        operators: the choice matters to programs that have one of these.
        opset: the default needs this operator set version; below, the alternative is taken.
        where: whether it matters to a node of these operators.
    """

    name: str
    default: str
    alternative: str
    operators: tuple[Any, ...]
    opset: int = 0
    where: Callable[[Node], bool] = lambda node: True

    def meets(self, node: Node) -> bool:
        """Whether the choice matters to a node."""
        return is_op(node, *self.operators) and self.where(node)


def _is_integer_stem(node: Node) -> bool:
    """Whether a convolution of integers has so few channels that pixels can be merged."""
    x = node.args[0]
    if not is_op(x, torch.ops.planish.dequantize.default):
        return False
    channels = x.meta["val"].shape[1]
    return isinstance(channels, int) and channels % CHANNEL_STEP != 0


def _is_of_integer_product(node: Node) -> bool:
    """Whether what a node takes first is a product of integers, perhaps shown in another form."""
    source = node.args[0]
    while isinstance(source, Node) and source.args and not is_op(source, *_PRODUCTS):
        if not (is_view(source.target) or is_op(source, *_PARTS, operator.getitem)):
            return False
        source = source.args[0]
    if not isinstance(source, Node) or not is_op(source, *_PRODUCTS):
        return False
    factors = source.args[1:3] if is_op(source, aten.addmm.default) else source.args[:2]
    return all(is_op(n, torch.ops.planish.dequantize.default) for n in factors)


def _is_weight_in_blocks(node: Node) -> bool:
    """Whether a dequantized constant is a weight of 4 bits in blocks."""
    bits, block = str(argument(node, "dtype"))[-1], argument(node, "block_size")
    return bits == "4" and 0 < block < LONG_BLOCK and _is_constant(node.args[0])


def _is_constant(value: object) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"


_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_PARTS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
)  # fmt: skip
_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
)

CHOICES: tuple[Choice, ...] = (
    Choice("residual", "sum", "add", (aten.layer_norm.default, aten.rms_norm.default)),
    Choice("linear", "gemm", "matmul", (aten.linear.default,)),
    Choice(
        "attention", "operator", "matmul", (aten.scaled_dot_product_attention.default,), opset=23
    ),
    Choice("rms-norm", "operator", "primitives", (aten.rms_norm.default,), opset=23),
    Choice(
        "rotary", "operator", "primitives", (torch.ops.planish.rotary_embedding.default,), opset=23
    ),
    Choice("stem", "plain", "merged", _CONVOLUTIONS, where=_is_integer_stem),
    Choice("wide", "whole", "split", _CONVOLUTIONS, where=is_wide_convolution),
    Choice(
        "integer-attention",
        "separate",
        "packed",
        (aten.scaled_dot_product_attention.default,),
        where=_is_of_integer_product,
    ),
    Choice("parts", "apart", "split", _PARTS, where=_is_of_integer_product),
    Choice(
        "weights",
        "branch",
        "integers",
        (torch.ops.planish.dequantize.default,),
        where=_is_weight_in_blocks,
    ),
)


def choose(program: Program, opset: int, options: ExportOptions) -> tuple[Style, Mapping[str, str]]:
    """The forms to emit a program in.

    Args:
        program: which operators it has decides which choices are to be made.
        opset: what the file may contain.
        options: ``choices`` to replay, and ``remark``.

    Returns:
        The style, and the choices to record.

    Raises:
        RecipeError: a choice to be replayed does not exist.
    """
    from planish.backends.onnx_view import Style

    replayed = _validated(options.choices or {})
    met = [c for c in CHOICES if any(c.meets(n) for n in program.graph.nodes)]
    taken: dict[str, str] = {}
    for choice in met:
        wanted = replayed.get(choice.name)
        if opset < choice.opset:
            if wanted == choice.default:
                options.remark(
                    f"choice {choice.name}={wanted} needs opset {choice.opset}; "
                    f"{choice.alternative} is used with opset {opset}"
                )
            taken[choice.name] = choice.alternative
        elif wanted is not None:
            taken[choice.name] = wanted
        else:
            taken[choice.name] = _measured(choice, options)
    fields = {name.replace("-", "_"): value for name, value in taken.items()}
    return Style(**fields, integers="onnxruntime"), taken


def _measured(choice: Choice, options: ExportOptions) -> str:
    from planish.backends.ort_measure import speed_of_alternative, wins

    ratio = speed_of_alternative(choice.name, options.remark)
    return choice.alternative if wins(ratio) else choice.default


def _validated(choices: Mapping[str, str]) -> Mapping[str, str]:
    known = {c.name: (c.default, c.alternative) for c in CHOICES}
    for name, value in choices.items():
        if name not in known:
            raise RecipeError(
                f"there is no lowering choice {name!r} for onnxruntime-cpu",
                hint="known: " + ", ".join(known),
            )
        if value not in known[name]:
            raise RecipeError(
                f"lowering choice {name!r} cannot be {value!r}",
                hint="use " + " or ".join(known[name]),
            )
    return choices
