"""Turn in-place operators into functional ones.

``torch``'s own functionalization costs more than the trace itself and splits batch norms, so the
plain cases (``relu_``, ``add_`` on a value nobody else aliases) are done here. A write into a view
goes to torch; see ``capture``.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from planish.ir.ops import ASSERTIONS, functional_form, is_op, is_view, written_argument

aten = torch.ops.aten


def drop_assertions(graph: Graph) -> int:
    """Erase assertions and what only they computed; return how many there were."""
    dropped = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in ASSERTIONS:
            graph.erase_node(node)
            dropped += 1
    if dropped:
        graph.eliminate_dead_code(lambda n: n.op in ("output", "placeholder"))
    return dropped


def is_functional(graph: Graph) -> bool:
    """Whether every in-place operator (if any) can be replaced by its functional form alone."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        position = written_argument(node.target)
        if position is None:
            continue
        target = node.args[position] if position < len(node.args) else None
        if not isinstance(target, Node) or not _has_form(node):
            return False
        if any(order[a] < order[node] and a is not target for a in _aliases(target)):
            return False
    return True


def written_inputs(graph: Graph) -> dict[Node, Node]:
    """Placeholders whose memory an in-place operator writes into, with the first such operator."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        position = written_argument(node.target)
        if position is None or position >= len(node.args):
            continue
        target = node.args[position]
        for alias in _aliases(target) if isinstance(target, Node) else ():
            if alias.op == "placeholder":
                found.setdefault(alias, node)
    return found


def make_functional(graph: Graph) -> None:
    """Replace each in-place operator; later readers of the written value read the result."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        position = written_argument(node.target)
        if position is None:
            continue
        written = node.args[position]
        assert isinstance(written, Node)
        later = [u for u in written.users if order.get(u, 0) > order[node]]
        _to_functional(graph, node)
        for user in later:
            user.replace_input_with(written, node)
    _recover_batch_norm(graph)


def _has_form(node: Node) -> bool:
    return node.target is aten.copy_.default or functional_form(node.target) is not None  # type: ignore[arg-type]


def _to_functional(graph: Graph, node: Node) -> None:
    if node.target is not aten.copy_.default:
        node.target = functional_form(node.target)  # type: ignore[arg-type, assignment]
        return
    # x.copy_(y) gives x's shape and dtype the values of y.
    written, source = node.args[0], node.args[1]
    node.target = aten.copy.default
    node.args = (written, source)
    node.kwargs = {}


def _aliases(node: Node) -> set[Node]:
    """All values that may share storage with ``node``, itself included."""
    found = {node}
    pending = [node]
    while pending:
        current = pending.pop()
        near = [u for u in current.users if _aliases_first(u, current)]
        if is_view(current.target) and current.args and isinstance(current.args[0], Node):
            near.append(current.args[0])
        for other in near:
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def _aliases_first(user: Node, value: Node) -> bool:
    """Whether ``user`` returns (a view of) ``value``."""
    if not user.args or user.args[0] is not value:
        return False
    return is_view(user.target)


def _recover_batch_norm(graph: Graph) -> None:
    """Undo what torch's functionalization does to batch norm in evaluation mode."""
    split = aten._native_batch_norm_legit_no_training.default
    for node in list(graph.nodes):
        if not is_op(node, split) or any(u.args[1:] != (0,) for u in node.users):
            continue
        x, weight, bias, mean, variance, momentum, eps = node.args
        args = (x, weight, bias, mean, variance, False, momentum, eps, False)
        for item in list(node.users):
            with graph.inserting_before(item):
                whole = graph.call_function(aten.batch_norm.default, args)
            whole.meta = {**node.meta, "val": item.meta["val"]}
            item.replace_all_uses_with(whole)
            graph.erase_node(item)
        graph.erase_node(node)
