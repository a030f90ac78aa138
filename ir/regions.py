"""Take apart the regions that ``torch.no_grad``, ``torch.autocast`` and dropout leave in a trace.

``torch.export`` wraps what ran under another grad mode or autocast in an operator with a body,
which hides it from every analysis. A graph computes no gradients, so the former is only its body;
so is a region with autocast off, as rotary embeddings of transformers have them. A region with
autocast on needs casts, and torch's own decomposition puts them in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from planish.ir.ops import ALIAS_IN_EVAL

_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
# Operator -> where its body is among the arguments; what follows are the body's inputs.
_BODY: dict[Any, int] = {_GRAD_MODE: 1, _AUTOCAST: 4}


def has_autocast(module: GraphModule) -> bool:
    """Whether a region runs with autocast on, at any depth."""
    on = any(n.target is _AUTOCAST and n.args[2] for n in module.graph.nodes)
    return on or any(has_autocast(body) for _, body in _bodies(module))


def _bodies(module: GraphModule) -> list[tuple[Node, GraphModule]]:
    """The regions of a graph, and what is in them."""
    return [(node, _body(module, node)) for node in module.graph.nodes if node.target in _BODY]


def _body(module: GraphModule, node: Node) -> GraphModule:
    region: Any = node.args[_BODY[node.target]]
    found: GraphModule = getattr(module, str(region.target))
    return found


def inline_regions(exported: ExportedProgram) -> ExportedProgram:
    """The program with its regions replaced by their bodies; the program itself if it has none."""
    if not _bodies(exported.graph_module):
        return exported

    def edit(graph: Graph, module: GraphModule) -> None:
        for node, body in _bodies(module):
            _inline(graph, module, node, body)

    return _edited(exported, edit)


def _inline(graph: Graph, module: GraphModule, node: Node, body: GraphModule) -> None:
    """Replace one region by its body, and the regions in there by theirs."""
    inputs = node.args[_BODY[node.target] + 1 :]
    placeholders = body.graph.find_nodes(op="placeholder")
    values: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    inner = []
    with graph.inserting_before(node):
        for old in body.graph.nodes:
            if old.op in ("placeholder", "output"):
                continue
            values[old] = graph.node_copy(old, lambda n: values[n])
            if old.op == "get_attr":
                values[old].target = _adopt(module, body, str(old.target))
            elif old.target in _BODY:
                inner.append(values[old])
    results: Any = torch.fx.node.map_arg(body.graph.output_node().args[0], lambda n: values[n])
    for item in list(node.users):
        position: Any = item.args[1]
        item.replace_all_uses_with(results[position], propagate_meta=False)
        graph.erase_node(item)
    region = node.args[_BODY[node.target]]
    graph.erase_node(node)
    if isinstance(region, Node) and not region.users:
        graph.erase_node(region)
    for nested in inner:
        _inline(graph, module, nested, _body(module, nested))


def _adopt(module: GraphModule, body: GraphModule, name: str) -> str:
    """Give a module what one of its bodies holds; returns under which name."""
    unique, count = name, 0
    while hasattr(module, unique) and getattr(module, unique) is not getattr(body, name):
        count += 1
        unique = f"{name}_{count}"
    setattr(module, unique, getattr(body, name))
    return unique


def drop_aliases(exported: ExportedProgram) -> ExportedProgram:
    """The program without dropouts, which in evaluation mode return their argument itself.

    Torch's functionalization takes them for copies, so a write into the result would not reach the
    argument. Active dropouts are left.
    """

    def edit(graph: Graph, _module: GraphModule) -> None:
        for node in list(graph.nodes):
            if node.target in ALIAS_IN_EVAL and not node.args[2]:
                node.replace_all_uses_with(node.args[0], propagate_meta=False)
                graph.erase_node(node)

    return _edited(exported, edit)


def _edited(
    exported: ExportedProgram, edit: Callable[[Graph, GraphModule], None]
) -> ExportedProgram:
    """A copy of a program with an edited graph; the signature follows its outputs."""
    module = GraphModule(exported.graph_module, copy.deepcopy(exported.graph))
    module.meta.update(exported.graph_module.meta)
    edit(module.graph, module)
    module.recompile()
    signature = copy.deepcopy(exported.graph_signature)
    results: Any = module.graph.output_node().args[0]
    for spec, value in zip(signature.output_specs, results, strict=True):
        if isinstance(value, Node):
            spec.arg = replace(spec.arg, name=value.name)
    return exported._update(module, signature)
