"""Turn in-place operators into functional ones.

``torch``'s own functionalization costs more than the trace itself and splits batch norms, so the
plain cases (``relu_``, ``add_`` on a value nobody else aliases) are done here. A write into a view
goes to torch; see ``capture``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from planish.ir.ops import (
    ASSERTIONS,
    ELEMENTWISE_UNARY,
    functional_form,
    is_op,
    is_view,
    written_argument,
)

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
        whole = _origin(target)
        if any(order[a] < order[node] and _origin(a) is not whole for a in _aliases(target)):
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
        result = _to_functional(graph, node)
        for user in later:
            user.replace_input_with(written, result)
    _recover_batch_norm(graph)


def _has_form(node: Node) -> bool:
    return node.target is aten.copy_.default or functional_form(node.target) is not None


def _to_functional(graph: Graph, node: Node) -> Node:
    """Make a call functional; returns the node that holds the new value of what was written."""
    if node.target is aten.copy_.default:
        # x.copy_(y) gives x's shape and dtype the values of y.
        node.target = aten.copy.default
        node.args = (node.args[0], node.args[1])
        node.kwargs = {}
        return node
    node.target = functional_form(node.target)  # type: ignore[assignment]
    if node.target in ELEMENTWISE_UNARY and node.target is not aten.logical_not.default:
        return node
    # x.add_(y) keeps x's dtype, whatever x + y would be.
    wanted, found = node.meta["val"], _result(node)
    if found.dtype == wanted.dtype:
        return node
    node.meta["val"] = found
    with graph.inserting_after(node):
        cast = graph.call_function(aten.to.dtype, (node, wanted.dtype))
    cast.meta = {**node.meta, "val": wanted}
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return cast


def _result(node: Node) -> Tensor:
    """The type of a functional call, derived from its operands' types."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = node.meta["val"].fake_mode
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


def _aliases(node: Node) -> set[Node]:
    """All values that may share storage with ``node``, itself included."""
    found = {node}
    pending = [node]
    while pending:
        current = pending.pop()
        near = [user for user in current.users if _shared(user) is current]
        source = _shared(current)
        if source is not None:
            near.append(source)
        for other in near:
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def _shared(node: Node) -> Node | None:
    """The operand that a node returns, or returns a view of."""
    position = written_argument(node.target)
    if position is None and is_view(node.target):
        position = 0
    if position is None or position >= len(node.args):
        return None
    source = node.args[position]
    return source if isinstance(source, Node) else None


def _origin(node: Node) -> Node:
    """The value an in-place operator was first applied to: ``y`` for ``y.relu_().add_(1)``."""
    while written_argument(node.target) is not None and (source := _shared(node)) is not None:
        node = source
    return node


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
