"""Which operators return one of their operands, and when: a table of one short test each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.tensortype import type_text
from planish.passes.cleanup._sizes import bound, same_dtype, same_type, shape_of, static
from planish.passes.cleanup._uniform import uniform

aten = torch.ops.aten


class Call(NamedTuple):
    """An operator call with its arguments in the order of the schema."""

    node: Node
    args: list[Any]
    program: Program


# A node the result equals or broadcasts; why it does not; None where nothing looked like it.
Verdict = Node | str | None
Look = Callable[[Call], Verdict]


def is_whole_range(index: Tensor, size: int) -> bool:
    """Whether an index reads every entry of an axis once and in order."""
    return index.shape == (size,) and torch.equal(index, torch.arange(size, dtype=index.dtype))


def _same(call: Call, value: object) -> Node | None:
    return value if isinstance(value, Node) and same_type(call.node, value) else None


def _kept(call: Call) -> Verdict:
    """For operators that return the first operand whenever they keep its type and shape."""
    return _same(call, call.args[0])


def _dropout(call: Call) -> Verdict:
    source, probability, train = call.args[:3]
    if train and probability != 0:
        return "it is in training mode, where it draws random numbers"
    return _same(call, source)


def _neutral(value: float, *, swapped: bool = True) -> Look:
    """For ``x op value``, and ``value op x`` if ``swapped``."""

    def look(call: Call) -> Verdict:
        left, right, *_ = call.args
        # One is neutral for "and" only where it is all the bits there are.
        if value is True and call.node.meta["val"].dtype is not torch.bool:
            return None
        for operand, other in [(left, right), (right, left)][: 1 + swapped]:
            if isinstance(operand, Node) and uniform(other, call.program) == value:
                return operand if same_dtype(call.node, operand) else _differs(call, operand)
        return None

    return look


def _differs(call: Call, operand: Node) -> str:
    symbols = call.program.signature.symbols
    result, own = (type_text(n.meta.get("val"), symbols) for n in (call.node, operand))
    return f"the other operand is neutral, but the result is {result} and this one is {own}"


def _twice(call: Call) -> Verdict:
    """``f(f(x))`` with f its own inverse."""
    inner = call.args[0]
    return _same(call, inner.args[0]) if is_op(inner, call.node.target) else None


def _again(call: Call) -> Verdict:
    """``f(f(x))`` where the second f finds nothing left to do."""
    inner = call.args[0]
    is_same = is_op(inner, call.node.target) and bound(inner)[1:] == call.args[1:]
    return inner if is_same else None


def _permute(call: Call) -> Verdict:
    source, dims = call.args
    rank = len(dims)
    return source if [d % rank for d in dims] == list(range(rank)) else None


def _transpose(call: Call) -> Verdict:
    source, first, second = call.args
    rank = max(1, len(shape_of(source)))
    return source if first % rank == second % rank else None


def _cat(call: Call) -> Verdict:
    return _same(call, call.args[0][0]) if len(call.args[0]) == 1 else None


def _pad(call: Call) -> Verdict:
    is_empty = all(isinstance(p, int) and p == 0 for p in call.args[1])
    return _same(call, call.args[0]) if is_empty else None


def _pool(call: Call) -> Verdict:
    return _same(call, call.args[0]) if all(k == 1 for k in call.args[1]) else None


def _copy(call: Call) -> Verdict:
    return _same(call, call.args[1])


def _where(call: Call) -> Verdict:
    chosen = uniform(call.args[0], call.program)
    return None if chosen is None else _same(call, call.args[1 if chosen else 2])


def _masked_fill(call: Call) -> Verdict:
    is_kept = uniform(call.args[1], call.program) is False
    return _same(call, call.args[0]) if is_kept else None


def _index_select(call: Call) -> Verdict:
    source, dim, index = call.args
    held = call.program.constant(index)
    shape = shape_of(source)
    size = static(shape[dim]) if shape else None
    is_all = held is not None and size is not None and is_whole_range(held, size)
    return _same(call, source) if is_all else None


_KEPT = (
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.positive.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.view.default,
    aten.view.dtype,
    aten.view_as.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.ravel.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.repeat.default,
    aten.tile.default,
    aten.slice.Tensor,
    aten.narrow.default,
    # Over axes of size 1, with keepdim.
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    # To the size there is: every window holds one element.
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)

IDENTITIES: dict[Any, Look] = dict.fromkeys(_KEPT, _kept) | {
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.feature_alpha_dropout.default: _dropout,
    aten.add.Tensor: _neutral(0),
    aten.add.Scalar: _neutral(0, swapped=False),
    aten.sub.Tensor: _neutral(0, swapped=False),
    aten.sub.Scalar: _neutral(0, swapped=False),
    aten.mul.Tensor: _neutral(1),
    aten.mul.Scalar: _neutral(1, swapped=False),
    aten.div.Tensor: _neutral(1, swapped=False),
    aten.div.Scalar: _neutral(1, swapped=False),
    aten.pow.Tensor_Scalar: _neutral(1, swapped=False),
    aten.pow.Tensor_Tensor: _neutral(1, swapped=False),
    aten.__and__.Tensor: _neutral(True),
    aten.bitwise_and.Tensor: _neutral(True),
    aten.logical_and.default: _neutral(True),
    aten.__or__.Tensor: _neutral(False),
    aten.bitwise_or.Tensor: _neutral(False),
    aten.logical_or.default: _neutral(False),
    aten.neg.default: _twice,
    aten.bitwise_not.default: _twice,
    aten.logical_not.default: _twice,
    aten.relu.default: _again,
    aten.relu6.default: _again,
    aten.hardtanh.default: _again,
    aten.clamp.default: _again,
    aten.abs.default: _again,
    aten.floor.default: _again,
    aten.ceil.default: _again,
    aten.round.default: _again,
    aten.trunc.default: _again,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.avg_pool2d.default: _pool,
    aten.max_pool2d.default: _pool,
    aten.copy.default: _copy,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.index_select.default: _index_select,
}
