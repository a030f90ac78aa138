"""Facts about operators: purity, views, in-place forms, names for printing.

The facts come from the operators' own schemas, so they hold for every operator torch has.
The few tables here say what a schema does not.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import SymBool, SymFloat, SymInt
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

aten = torch.ops.aten

# In evaluation mode these return their argument itself, though the schema does not say so.
ALIAS_IN_EVAL = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
    }
)

# Checks that a traced program carries along; they compute nothing.
ASSERTIONS = frozenset(
    {
        aten._assert_async.msg,
        aten._assert_async.default,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        aten._functional_assert_async.msg,
        torch._check,
        torch.sym_constrain_range if hasattr(torch, "sym_constrain_range") else torch._check,
    }
)

# One tensor in, same shape out, each element on its own.
ELEMENTWISE_UNARY = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.gelu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.softplus.default,
        aten.mish.default,
        aten.exp.default,
        aten.log.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.neg.default,
        aten.abs.default,
        aten.erf.default,
        aten.sin.default,
        aten.cos.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.reciprocal.default,
        aten.pow.Tensor_Scalar,
        aten.logical_not.default,
    }
)

# Two broadcast operands, each element on its own.
ELEMENTWISE_BINARY = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.pow.Tensor_Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.eq.Tensor,
        aten.ne.Tensor,
        aten.lt.Tensor,
        aten.le.Tensor,
        aten.gt.Tensor,
        aten.ge.Tensor,
    }
)

COMMUTATIVE = frozenset(
    {
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        operator.add,
        operator.mul,
    }
)


def is_op(node: object, *targets: Any) -> TypeGuard[Node]:  # noqa: ANN401 - overloads have no common type
    """Whether a value is a node that calls one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


@cache
def is_pure(target: Any) -> bool:  # noqa: ANN401
    """Whether equal arguments always give equal results and nothing else happens."""
    if isinstance(target, OpOverload):
        return not (
            target._schema.is_mutable
            or torch.Tag.nondeterministic_seeded in target.tags
            or target in ASSERTIONS
        )
    if isinstance(target, HigherOrderOperator):
        return True  # functional bodies only: capture refuses others
    return target not in ASSERTIONS


def is_pure_call(node: Node) -> bool:
    """Like ``is_pure``, for one call.

    Dropout, attention and recurrent layers are declared random; in evaluation mode they draw
    nothing.
    """
    if is_pure(node.target):
        return True
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    declared = {a.name for a in node.target._schema.arguments}
    for switch in ("train", "training"):
        if switch in declared:
            never = "p" in declared and argument(node, "p") == 0
            return argument(node, switch) is False or never
    return "dropout_p" in declared and argument(node, "dropout_p") == 0


@cache
def is_view(target: Any) -> bool:  # noqa: ANN401
    """Whether the result may share storage with the first argument."""
    if target is operator.getitem or target in ALIAS_IN_EVAL:
        return True
    if not isinstance(target, OpOverload):
        return False
    return any(r.alias_info is not None for r in target._schema.returns) and not (
        target._schema.is_mutable
    )


@cache
def written_argument(target: Any) -> int | None:  # noqa: ANN401
    """Position of the argument an in-place operator writes into; None for a functional one."""
    if not isinstance(target, OpOverload):
        return None
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return position
    return None


@cache
def functional_form(target: OpOverload) -> OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None where there is no such operator."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    names = packet.overloads() if packet is not None else []
    # The overload of the same name first; `pow_.Scalar` is called `pow.Tensor_Scalar`, though.
    for overload in sorted(names, key=lambda n: n != (target._overloadname or "default")):
        candidate = getattr(packet, overload)
        if _argument_types(candidate) == _argument_types(target):
            return candidate  # type: ignore[no-any-return]
    return None


def _argument_types(target: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments]


@cache
def op_name(target: Any) -> str:  # noqa: ANN401
    """``aten.conv2d``, ``aten.add.Tensor``, ``sym.add``: how an operator is printed."""
    if isinstance(target, OpOverload):
        name = target._schema.name.replace("::", ".")
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    module = (getattr(target, "__module__", "") or "").removeprefix("_")
    prefix = "sym" if module in ("operator", "math") else module
    return f"{prefix}.{getattr(target, '__name__', str(target))}"


def node_of(value: object) -> Node:
    """An argument that has to be a node, as one."""
    assert isinstance(value, Node)
    return value


def declared_arguments(node: Node) -> list[torch.Argument]:
    """What the schema of an ATen call declares, in order."""
    assert isinstance(node.target, OpOverload)
    return node.target._schema.arguments


def argument(node: Node, name: str) -> Any:  # noqa: ANN401
    """An argument of an ATen call by its schema name, with the schema's default filled in.

    Raises:
        KeyError: the operator has no such argument.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    for position, declared in enumerate(schema.arguments):
        if declared.name == name:
            if not declared.kwarg_only and position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{op_name(node.target)} has no argument {name!r}")


def is_symbolic(value: object) -> bool:
    """Whether a number is symbolic."""
    return isinstance(value, (SymInt, SymFloat, SymBool))
