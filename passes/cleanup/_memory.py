"""Whose memory a value is, and how it lies there: what a rewrite must not change for the caller."""

from __future__ import annotations

import torch
from torch.fx import Node

from planish.ir.ops import is_op, is_view
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.cleanup._sizes import same_sizes, tensor_of

aten = torch.ops.aten

# These demand strides that fit, where ``reshape`` copies if it has to.
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
# These read strides, and have no form that does not.
_STRIDE_READERS = frozenset(
    {
        aten.as_strided.default,
        aten.view.dtype,
        aten.view_as_real.default,
        aten.view_as_complex.default,
    }
)
# Results whose strides do not depend on those of the operands.
_FRESH = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.layer_norm.default,
        aten.embedding.default,
    }
)


def owner(node: Node) -> Node:
    """The value whose memory a node shows: itself, or what it is a view of."""
    while node.op == "call_function" and is_view(node.target):
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            break
        node = source
    return node


def escapes(node: Node) -> bool:
    """Whether the program returns this value, or a view of it."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if user.op == "output":
                return True
            is_shown = is_view(user.target) and user.args and user.args[0] is current
            if is_shown and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def memory_conflict(node: Node, new: Node) -> str | None:
    """Why a value that is returned may not become ``new``; None where nobody can tell.

    The caller may write into what he is given, so it must not be memory of somebody else.
    """
    if not escapes(node):
        return None
    held = owner(new)
    if held.op == "placeholder":
        return "an output would be the memory of an input"
    if held.op == "get_attr":
        return "an output would be the memory of a constant"
    return "two outputs would share their memory" if escapes(held) else None


def same_strides(a: Node, b: Node) -> bool:
    """Whether two values of one shape lie alike in memory."""
    x, y = tensor_of(a), tensor_of(b)
    if x is None or y is None:
        return False
    return same_sizes(tuple(x.stride()), tuple(y.stride()))


class Memory:
    """Keeps a program legal when a rewrite lets a value lie elsewhere or otherwise in memory.

    A program holds values, not memory; only ``view`` and few others look at strides, and only the
    caller can write into a result.
    """

    def __init__(self, program: Program):
        self._readers = [n for n in program.operators if n.target in _STRIDE_READERS]
        self._freed: set[Node] = set()

    def objection(self, node: Node, new: Node, *, moves: bool | None = None) -> str | None:
        """Why ``new``, or a view of it, may not take the place of ``node``; None where it may.

        Args:
            node: what would go.
            new: what would be read instead.
            moves: whether strides change, where the caller knows it.
        """
        if owner(node) is not owner(new):
            conflict = memory_conflict(node, new)
            if conflict is not None:
                return conflict
        reader = self._reader(node)
        if reader is not None and (moves or (moves is None and not same_strides(node, new))):
            return f"{reader.name} reads the strides this operator sets"
        return None

    def replace(self, node: Node, new: Node, rewriter: Rewriter) -> None:
        """Let the users of ``node`` read ``new``; part of the open rewrite site."""
        if not same_strides(node, new):
            self._free(node, rewriter)
        rewriter.replace(node, new)

    def _reader(self, node: Node) -> Node | None:
        """An operator that reads strides which follow from this value's, if there is one."""
        if not self._readers:
            return None
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                if user.target in _STRIDE_READERS:
                    return user
                if user not in seen and user.target not in _FRESH:
                    seen.add(user)
                    pending.append(user)
        return None

    def _free(self, node: Node, rewriter: Rewriter) -> None:
        """Turn the views that follow into reshapes, which can reach any strides."""
        pending, views = [node], []
        while pending:
            for user in pending.pop().users:
                if user in self._freed or user.target in _FRESH or user.op == "output":
                    continue
                self._freed.add(user)
                pending.append(user)
                if is_op(user, *_VIEWS):
                    views.append(user)
        for view in views:
            rewriter.insert_before(view)
            reshape = rewriter.call(aten.reshape.default, view.args, like=view)
            self._freed.add(reshape)
            rewriter.replace(view, reshape)
