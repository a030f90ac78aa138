"""ONNX forms of operators that hold graphs of their own.

``torch.cond`` becomes If, with one subgraph per branch.

Both branches read the values around them directly, as ONNX allows, so the operands that
torch hands in need no inputs of their own.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.backends.onnx_dims import dims_of
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, dtype_of
from planish.ir.errors import UnsupportedError
from planish.ir.ops import ASSERTIONS

if TYPE_CHECKING:
    import onnx_ir as ir


def _cond(e: Emitter, node: Node) -> list[Any]:
    predicate, if_true, if_false, operands = node.args
    assert isinstance(predicate, Node)
    condition = e.operand(predicate, torch.bool)
    if len(dims_of(predicate.meta["val"]) if isinstance(predicate.meta["val"], Tensor) else ()):
        condition = e.op("Squeeze", condition)
    bodies = [_body(e, node, branch, tuple(operands)) for branch in (if_true, if_false)]  # type: ignore[arg-type]
    count = len(bodies[0].outputs)
    outputs = e.ops(count, "If", condition, then_branch=bodies[0], else_branch=bodies[1])
    return outputs


def _without_autocast(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    """A block under ``torch.autocast(enabled=False)`` is the block itself."""
    _, _, enabled, _, body, *operands = node.args
    if enabled:
        raise UnsupportedError(
            "a block under torch.autocast has no ONNX form",
            where=node,
            hint="convert the tensors inside the block yourself, or turn autocast off",
        )
    assert isinstance(body, Node)
    outputs = _emit_branch(e, _graph_of(e, node, body), tuple(operands))
    values = [e.view(o) if isinstance(o, Node) else o for o in outputs]
    return values if isinstance(node.meta.get("val"), (list, tuple)) else values[0]


def _graph_of(e: Emitter, node: Node, body: Node) -> GraphModule:
    module = e.program.constants.get(str(body.target))
    if not isinstance(module, GraphModule):
        raise UnsupportedError("the body of this operator is not a graph", where=node)
    return module


def _body(e: Emitter, node: Node, branch: Any, operands: tuple[Any, ...]) -> ir.Graph:  # noqa: ANN401
    """One branch as an ONNX graph."""
    from planish.backends.onnx_build import alive

    assert isinstance(branch, Node)
    module = _graph_of(e, node, branch)
    with e.scope() as nodes:
        outputs = [_own(e, result) for result in _emit_branch(e, module, operands)]
    kept, _ = alive(nodes, outputs)
    import onnx_ir as ir

    return ir.Graph((), outputs, nodes=kept, name=e.unique(f"{node.name}.{branch.target}"))


def _emit_branch(e: Emitter, module: GraphModule, operands: tuple[Any, ...]) -> list[Any]:
    """Emit a body in place; returns its results, nodes of its own graph."""
    from planish.backends.onnx_translate import emit_operator

    rest = iter(operands)
    for inner in module.graph.nodes:
        e.at(inner)
        if inner.op == "placeholder":
            operand = next(rest)
            if isinstance(operand, Node):
                e.hold(inner, e.view(operand))
            else:
                e.hold(inner, e.constant(operand, dtype_of(operand)))
        elif inner.op == "get_attr":
            tensor = operator.attrgetter(str(inner.target))(module)
            if isinstance(tensor, Tensor):
                e.hold(inner, e.tensor(tensor, str(inner.target)))
        elif inner.op == "call_function":
            if inner.users and inner.target not in ASSERTIONS:
                emit_operator(e, inner)
        else:
            results = inner.args[0]
            return list(results) if isinstance(results, (list, tuple)) else [results]
    raise AssertionError("a graph always ends in its output node")


def _own(e: Emitter, result: Any) -> ir.Value:  # noqa: ANN401
    """A result as a value that the subgraph itself computes."""
    if not isinstance(result, Node):
        raise UnsupportedError("a branch of torch.cond returns something that is no tensor")
    like = result.meta["val"]
    value: ir.Value = e.op("Identity", e.value(result))
    e.describe(value, like, dims_of(like) if isinstance(like, Tensor) else ())
    return value


BRANCHES: Table = {
    torch.ops.higher_order.cond: _cond,
    torch.ops.higher_order.wrap_with_autocast: _without_autocast,
}
