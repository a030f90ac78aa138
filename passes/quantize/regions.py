"""Which operators between the products stay in integers, and whose scales must agree.

An operator between is worth integers where nothing has to be converted for it: all it reads comes
from integer convolutions (or from such operators), and one of its readers is integer. Three kinds:

    clamps    relu and its like right behind a product: no integers in between, so that a backend
              can make one operator of both, and a zero point of 0 is the clamp
    movers    max pooling, views, concatenation: they choose among values, so what they read and
              what they give share one scale
    others    sums, averages, sigmoids: each value has its own scale

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-
        Arithmetic-Only Inference", CVPR 2018, appendix A (addition and concatenation).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, declared_arguments, is_op
from planish.ir.program import Program
from planish.passes.quantize.between import CLAMPS, LISTS, MOVERS, OTHERS, obstacle
from planish.passes.quantize.operands import QUANTIZE, Operands, Slot, source_of

Between = Literal["none", "convolutions", "all"]


@dataclass
class Region:
    """What stays in integers between the products.

    Attributes:
        operators: the operators between and their operands, in program order.
        agree: pairs of values whose scales must be the same.
        refused: operators that could not be, and why.
    """

    operators: dict[Node, Operands] = field(default_factory=dict)
    agree: list[tuple[Node, Node]] = field(default_factory=list)
    refused: dict[Node, str] = field(default_factory=dict)


def find_regions(
    program: Program,
    products: dict[Node, Operands],
    between: Between,
    allowed: Callable[[Node], bool],
) -> Region:
    """Find the operators between that stay in integers.

    Args:
        program: which.
        products: the integer operators that multiply.
        between: "convolutions" as the module says, "all" for regions that begin at any product,
            "none" for no operators between.
        allowed: whether an operator is chosen.
    """
    region = Region()
    if between == "none":
        return region
    inside = {node for node, o in products.items() if o.kind == "convolution" or between == "all"}
    candidates: dict[Node, tuple[Node, ...]] = {}
    for node in program.operators:
        if node in products or not allowed(node):
            continue
        operands = _operands(node, inside)
        if isinstance(operands, str):
            region.refused[node] = operands
        elif operands:
            candidates[node] = operands
            inside.add(node)
    kept = _with_integer_readers(candidates, products)
    for node in program.operators:
        if node in kept:
            _add(node, candidates[node], kept, products, region)
    region.refused = {
        node: why for node, why in region.refused.items() if _is_read(node, kept, products)
    }
    return region


def _operands(node: Node, inside: set[Node]) -> tuple[Node, ...] | str | None:
    """What an operator reads, if all of it lies inside."""
    if node.target not in CLAMPS | MOVERS | OTHERS:
        return None
    read = [source_of(value) for value in node.all_input_nodes]
    tensors = [v for v in read if not _is_number(v)]
    if not tensors or not any(v in inside for v in tensors):
        return None
    if any(v not in inside for v in tensors):
        return "it also reads a value that is not written in integers"
    return obstacle(node) or tuple(tensors)


def _is_number(value: Node) -> bool:
    """Whether a node is a size or the like."""
    return not isinstance(value.meta.get("val"), (Tensor, tuple, list))


def _with_integer_readers(
    candidates: dict[Node, tuple[Node, ...]], products: dict[Node, Operands]
) -> set[Node]:
    kept: set[Node] = set()
    for node in reversed(candidates):
        if _is_read(node, kept, products):
            kept.add(node)
    return kept


def _is_read(node: Node, kept: Iterable[Node], products: dict[Node, Operands]) -> bool:
    """Whether an integer operator reads a value, directly or as written in integers already."""
    for user in readers_of(node):
        if user in kept:
            return True
        operands = products.get(user)
        if operands is not None and any(
            isinstance(slot.read(user), Node) and source_of(slot.read(user)) is node
            for slot in operands.values
        ):
            return True
    return False


def readers_of(value: Node) -> list[Node]:
    """The operators that read a value, looking through the pairs that write it in integers."""
    found: list[Node] = []
    for user in value.users:
        for pair in user.users:
            if source_of(pair) is value and pair is not value:
                found.extend(pair.users)
        if not is_op(user, QUANTIZE):
            found.append(user)
    return found


def _add(
    node: Node,
    tensors: tuple[Node, ...],
    kept: set[Node],
    products: dict[Node, Operands],
    region: Region,
) -> None:
    moved = tensors[0].target in MOVERS
    if node.target in CLAMPS and not moved and set(readers_of(tensors[0])) == {node}:
        return  # one operator with what it reads
    if node.target is operator.getitem:
        region.agree.append((_list_source(node), node))
        return
    region.operators[node] = Operands("between", _slots(node))
    if (node.target in MOVERS and node.target not in LISTS) or (node.target in CLAMPS and moved):
        region.agree.extend((tensor, node) for tensor in tensors)


def _list_source(item: Node) -> Node:
    """What was split into the list that an item comes from."""
    split: Any = item.args[0]
    return source_of(split.args[0])


def _slots(node: Node) -> tuple[Slot, ...]:
    """Where an operator reads tensors."""
    found = []
    for declared in declared_arguments(node):
        value = argument(node, declared.name)
        if isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor):
            found.append(Slot(declared.name))
        elif isinstance(value, (list, tuple)):
            found += [
                Slot(declared.name, index)
                for index, entry in enumerate(value)
                if isinstance(entry, Node) and isinstance(entry.meta.get("val"), Tensor)
            ]
    return tuple(found)
