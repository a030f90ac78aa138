"""Take single operators of a quantized program back to floating point.

    y = op(dequantize(quantize(v)), dequantize(@w_q))    becomes    y = op(v, @w)

The values ``v`` are still there: other operators of the program compute them. The weights ``@w``
are those of the same operator in a program from before anything was quantized; the dequantized
integers would do as well, but keep the error that the operator is to be spared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir.errors import source_line
from planish.ir.ops import argument, declared_arguments, is_op, node_of
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import SparseLayout
from planish.passes.quantize.operands import DEQUANTIZE, DYNAMIC, QUANTIZE, Slot, with_operands

RULE = "keep-float"


def quantized_operators(program: Program) -> list[Node]:
    """The operators that read a dequantized value or weight, in order."""
    return [
        node
        for node in program.operators
        if not is_op(node, QUANTIZE, DEQUANTIZE, DYNAMIC)
        and any(is_op(operand, DEQUANTIZE) for operand in node.all_input_nodes)
    ]


def float_value(dequantized: Node) -> Node | None:
    """The computed value that a dequantized one stands for; None for a weight."""
    codes = dequantized.args[0]
    if is_op(codes, QUANTIZE):
        return node_of(codes.args[0])
    if isinstance(codes, Node) and codes.op == "call_function":
        pair = codes.args[0]  # codes are item 0 of what the dynamic operator gives
        if is_op(pair, DYNAMIC):
            return node_of(pair.args[0])
    return None


def restore(
    rewriter: Rewriter, floating: Program, names: Iterable[str]
) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
    """Let operators read floating point again.

    Args:
        rewriter: edits the quantized program, one site for each operator.
        floating: the program from before it was quantized; gives the weights.
        names: of operators that ``quantized_operators`` lists.

    Returns:
        The operators that now read no integers at all, and why others still do.
    """
    originals = {node.name: node for node in floating.operators}
    wanted = set(names)
    done: list[str] = []
    refusals: list[Refusal] = []
    for node in quantized_operators(rewriter.program):
        if node.name not in wanted:
            continue
        found = _operands(rewriter.program, node, floating, originals.get(node.name))
        if isinstance(found, str):
            refusals.append(Refusal(RULE, node.name, found, source_line(node)))
            continue
        with rewriter.site(RULE, node) as allowed:
            if allowed:
                _exchange(rewriter, node, found)
                done.append(node.name)
    return tuple(done), tuple(refusals)


@dataclass(frozen=True)
class _Weight:
    """A constant of the program before, and the node that stands in its place now."""

    value: Tensor
    name: str
    like: Node
    layout: SparseLayout | None


def _operands(
    program: Program, node: Node, floating: Program, original: Node | None
) -> dict[Slot, Node | _Weight | None] | str:
    """What each operand is to be exchanged for, or why it cannot be.

    Constants that are no integers belong to it: a bias may have been corrected for the error of
    the integers.
    """
    if (
        original is None
        or original.target is not node.target
        or not hasattr(node.target, "_schema")
    ):
        return "the program before has no such operator"
    if not isinstance(node.target, OpOverload):
        return "it is no operator of torch"
    before = dict(_slots(original))
    found: dict[Slot, Node | _Weight | None] = {}
    for slot, operand in _slots(node):
        integer = is_op(operand, DEQUANTIZE)
        if integer and (source := float_value(operand)) is not None:
            found[slot] = source
            continue
        constant = program.constant(operand)
        if not integer and constant is None:
            continue
        old = before.get(slot)
        weight = floating.constant(old)
        if weight is None:
            if old is not None:
                return f"its {slot.name} was computed before it was quantized"
            found[slot] = None  # a correction came to stand where nothing was
        elif list(weight.shape) != list(operand.meta["val"].shape):
            return f"its {slot.name} had the shape {list(weight.shape)} before it was quantized"
        elif weight is not constant:
            assert isinstance(old, Node)  # the program before has a constant there
            name = str(old.target)
            found[slot] = _Weight(weight, name, operand, floating.layouts.get(name))
    return found


def _exchange(rewriter: Rewriter, node: Node, operands: dict[Slot, Node | _Weight | None]) -> None:
    new: dict[Slot, Argument] = {}
    for slot, operand in operands.items():
        if isinstance(operand, _Weight):
            operand = rewriter.constant(
                operand.value, operand.name, like=operand.like, layout=operand.layout
            )
        new[slot] = operand
    args, kwargs = with_operands(node, new)
    rewriter.set_args(node, args, kwargs)


def _slots(node: Node) -> Iterator[tuple[Slot, Any]]:
    """Every argument of an operator, the entries of lists one by one."""
    for declared in declared_arguments(node):
        value = argument(node, declared.name)
        if isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                yield Slot(declared.name, index), entry
        else:
            yield Slot(declared.name), value
