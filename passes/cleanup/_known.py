"""Values that are known before a program runs, computed by the real operators."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planish.ir.errors import PassError
from planish.ir.ops import is_pure_call, is_view, op_name
from planish.ir.program import Program
from planish.passes.cleanup._sizes import static

aten = torch.ops.aten

# What an evaluation may take for values that are not stored in the end.
_SCRATCH_BYTES = 256 << 20
# Of their tensor operand they read the element type and the device, and some the shape.
_TYPE_READERS = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
    }
)
_UNDEFINED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Known:
    """A value known before the program runs, and the constants it was made from."""

    value: Any
    leaves: frozenset[str] = frozenset()


def size_bytes(tensor: Tensor) -> int:
    """Bytes a tensor's elements take when stored."""
    return tensor.numel() * tensor.element_size()


def as_number(value: object) -> int | float | None:
    """A scalar that is the same for every input; None for anything else."""
    if isinstance(value, SymInt):
        return static(value)
    return value if isinstance(value, (bool, int, float)) else None


def _is_static(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_static, value))
    return isinstance(value, Tensor) and all(static(size) is not None for size in value.shape)


def _objection(node: Node) -> str | None:
    """Why an operator on constants is not computed early."""
    if node.target is operator.getitem:
        return None
    name = op_name(node.target)
    if "dequantize" in name:
        return "folding it would undo the quantization"
    if name.split(".")[1] in _UNDEFINED:
        return "its value is undefined memory"
    return None if is_pure_call(node) else "it draws another value at every call"


def _stand_in(operand: Node) -> Tensor:
    """A tensor of the operand's type without its memory, for operators that read only the type."""
    fake = operand.meta["val"]
    sizes = [static(size) for size in fake.shape]
    # The new_* factories do not read the shape, so a symbolic one does not matter.
    shape = () if None in sizes else tuple(int(size or 0) for size in sizes)
    return torch.empty((), dtype=fake.dtype, device=fake.device).expand(shape)


def _evaluate(node: Node, known: dict[Node, Known]) -> Any:  # noqa: ANN401 - tensors or a tuple
    def value(operand: Node) -> Any:  # noqa: ANN401
        return known[operand].value if operand in known else _stand_in(operand)

    try:
        with torch.no_grad():
            args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # operators fail in their own ways; each fails at run time too
        raise PassError(
            f"operator fails on constant operands: {error}",
            where=node,
            hint="the model cannot run as it is; look at this line of it",
        ) from error


def known_values(program: Program, refusals: dict[Node, str]) -> dict[Node, Known]:
    """Every value that does not depend on the inputs, in one walk."""
    known: dict[Node, Known] = {}
    for node in program.graph.nodes:
        constant = program.constant(node)
        if constant is not None:
            known[node] = Known(constant, frozenset({str(node.target)}))
        if node.op != "call_function":
            continue
        number = as_number(node.meta.get("val"))
        if number is not None:
            known[node] = Known(number)
            continue
        operands = node.all_input_nodes
        if node.target in _TYPE_READERS:
            operands = [n for n in operands if n is not node.args[0]]
        if not all(n in known for n in operands) or not _is_static(node.meta.get("val")):
            continue
        objection = _objection(node)
        if objection is not None:
            refusals[node] = objection
            continue
        leaves = frozenset().union(*(known[n].leaves for n in operands))
        held = sum(
            size_bytes(t) for name in leaves if isinstance(t := program.constants[name], Tensor)
        )
        results = pytree.tree_leaves(node.meta["val"])
        if not is_view(node.target) and sum(map(size_bytes, results)) > held + _SCRATCH_BYTES:
            refusals[node] = f"computing it takes more than {_SCRATCH_BYTES >> 20} MiB"
            continue
        known[node] = Known(_evaluate(node, known), leaves)
    return known
