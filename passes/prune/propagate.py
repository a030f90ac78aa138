"""The group of a seed: ties carried through every operator until nothing more follows."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch.fx import Node

from planish.ir.ops import ASSERTIONS, argument, aten, op_name
from planish.ir.program import Program
from planish.passes.prune import reshape, rules_contract
from planish.passes.prune.labels import Indices, Labels
from planish.passes.prune.rules_pointwise import RULES, is_pointwise, pointwise, tensors, unknown
from planish.passes.prune.rules_shape import getitem

__all__ = ["Seed", "grow", "reshape", "rules_contract"]

Seed = tuple[Node, int, Indices]  # a value, its axis, and the units (from 1) of its indices or -1


def peers(program: Program) -> dict[str, list[Node]]:
    """The nodes of every constant that has several."""
    found: dict[str, list[Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).append(node)
    return {name: nodes for name, nodes in found.items() if len(nodes) > 1}


def grow(
    program: Program,
    seeds: list[Seed],
    units: int,
    choices: Mapping[tuple[Node, int], tuple[int, int]],
) -> Labels:
    """Everything that leaves together with the units of some seeds.

    Raises:
        AmbiguousReshapeError: the units may lie along several axes, and no choice was given.
        AllPinnedError: none of them can be cut.
    """
    labels = Labels(units, choices)
    shared = peers(program)
    for node, axis, unit in seeds:
        index = (unit >= 0).nonzero()[0]
        labels.assign(node, axis, index, unit[index])
    while (found := labels.next()) is not None:
        _look(found, shared, labels)
    return labels


def _look(node: Node, shared: Mapping[str, list[Node]], labels: Labels) -> None:
    if node.op == "get_attr":
        for other in shared.get(str(node.target), ()):
            for axis in {*labels.labelled(node), *labels.labelled(other)}:
                labels.same((node, axis), (other, axis))
    elif node.op == "placeholder":
        labels.pin_value(node, node, "it is an input of the program")
    elif node.op == "output":
        for value in node.all_input_nodes:
            labels.pin_value(value, node, "it is an output of the program")
    elif node.op != "call_function":
        unknown(node, labels)
    elif node.target is operator.getitem:
        getitem(node, labels)
    elif node.target is aten.sym_size.int:
        value = tensors(node)[0]
        axis = argument(node, "dim") % value.meta["val"].dim()
        labels.pin(value, axis, node, "its size is computed with")
    elif node.target in ASSERTIONS:
        _assertion(node, labels)
    elif node.target in RULES:
        RULES[node.target](node, labels)
    elif is_pointwise(node.target):
        pointwise(node, labels)
    else:
        unknown(node, labels)


def _assertion(node: Node, labels: Labels) -> None:
    sizes = node.target is aten._assert_tensor_metadata.default and argument(node, "size")
    if sizes:
        for value in tensors(node):
            labels.pin_value(value, node, f"{op_name(node.target)} holds its size")
