"""What people call a group: its kind, and its name."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from planish.ir.ops import aten, is_op
from planish.passes.prune.groups import Kind
from planish.passes.prune.labels import Axis, Indices
from planish.passes.prune.rules_contract import CONVOLUTIONS, PRODUCTS, TRANSPOSED
from planish.passes.prune.rules_pointwise import rank

_ATTENTION = aten.scaled_dot_product_attention.default
_NOUNS = {
    "neurons": "neurons",
    "channels": "channels",
    "heads": "heads",
    "head-dims": "numbers of each head",
    "other": "features",
}


def kind_of(axes: Mapping[Axis, Indices]) -> Kind:
    """What the units of these axes are."""
    at = _at_attention(axes)
    if at is not None:
        return at
    makers = [n for n, _ in axes if n.op == "call_function"]
    if any(is_op(n, *CONVOLUTIONS, *TRANSPOSED) for n in makers):
        return "channels"
    if any(is_op(n, aten.embedding.default) or _adds(n, axes) for n in makers):
        return "other"
    return "neurons"


def _adds(node: Node, axes: Mapping[Axis, Indices]) -> bool:
    """Whether a node adds two values that both depend on the inputs: a residual stream."""
    held = {n for n, _ in axes if n.op != "get_attr"}
    return is_op(node, aten.add.Tensor) and sum(n in held for n in node.all_input_nodes) > 1


def _at_attention(axes: Mapping[Axis, Indices]) -> Kind | None:
    """Heads lie along an axis in front of a product of two computed values."""
    for value, axis in axes:
        for user in value.users:
            if not is_op(user, _ATTENTION, *PRODUCTS) or user.args.index(value) > 2:
                continue
            if any(n.op == "get_attr" for n in user.args[:2] if isinstance(n, Node)):
                continue
            if rank(value) < 3:
                continue
            return "head-dims" if axis >= rank(value) - 2 else "heads"
    return None


def name_of(first: Node, kind: Kind, size: int, axes: Mapping[Axis, Indices]) -> str:
    """Where a group is made, and how many units of what it has."""
    paths = [path for path, _ in (first.meta.get("nn_module_stack") or {}).values() if path]
    path = paths[-1] if paths else first.name
    if kind in ("heads", "head-dims") and "." in path:
        path = path.rpartition(".")[0]
    noun = _NOUNS[kind]
    if kind == "head-dims":
        noun += f" ({_operands(axes)})"
    return f"{path}: {size} {noun}"


def _operands(axes: Mapping[Axis, Indices]) -> str:
    """Which operands of the attentions hold the units."""
    for value, axis in axes:
        for user in value.users:
            if is_op(user, _ATTENTION):
                return "value" if user.args.index(value) == 2 else "query, key"
            if is_op(user, *PRODUCTS) and user.args[1] is value:
                return "value" if axis == rank(value) - 1 else "query, key"
    return "query, key"
