"""What a program costs: parameters, bytes, and multiply-accumulates by operator.

Symbolic sizes count as the sample has them. One multiply-accumulate is one MAC; pointwise
operators, norms and softmax count none, as everywhere in the literature.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from planish.ir.ops import argument, op_name
from planish.ir.program import Program

aten = torch.ops.aten


Sizes = dict[Any, sympy.Integer]  # symbol -> size in the sample


@dataclass(frozen=True)
class Cost:
    """Cost of one program on its sample.

    Attributes:
        parameters: elements of all floating-point and quantized constants, tied ones once; scales
            and zero points are none.
        bytes: size of all constants as a file packs them, 4-bit integers two to a byte.
        macs: multiply-accumulates of one run.
    """

    parameters: int
    bytes: int
    macs: int

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def cost(program: Program) -> Cost:
    """The cost of a program."""
    roles = _roles(program)
    tensors = {
        id(t): (t, roles[name])
        for name in sorted(roles)
        if isinstance(t := program.constants.get(name), Tensor)
    }
    return Cost(
        parameters=sum(t.numel() for t, role in tensors.values() if _is_parameter(t, role)),
        bytes=sum(_packed_bytes(t, role) for t, role in tensors.values()),
        macs=sum(macs_by_operator(program).values()),
    )


_SCHEME = "scale or zero point"


def _roles(program: Program) -> dict[str, str]:
    """Live constant -> the integers it holds ("int4"), ``_SCHEME``, or "" for any other."""
    roles: dict[str, str] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        for user in node.users:
            role = ""
            if op_name(user.target) in ("planish.quantize", "planish.dequantize"):
                is_code = user.args[0] is node
                role = str(argument(user, "dtype")) if is_code else _SCHEME
            name = str(node.target)
            # What something else reads as well is a plain constant.
            roles[name] = role if roles.setdefault(name, role) == role else ""
    return roles


def _is_parameter(tensor: Tensor, role: str) -> bool:
    if role:
        return role != _SCHEME
    plain = tensor.is_floating_point() or tensor.is_complex()
    return plain or tensor.dtype in (torch.int8, torch.uint8)


def _packed_bytes(tensor: Tensor, role: str) -> int:
    if role in ("int4", "uint4"):
        return (tensor.numel() + 1) // 2
    return tensor.numel() * tensor.element_size()


def macs_by_operator(program: Program) -> dict[str, int]:
    """Multiply-accumulates per operator name, largest first; operators without any are left out.

    Of the branches of a ``torch.cond`` the more expensive one counts.
    """
    counts = _count(program.graph, program.constants, _sample_sizes(program))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def macs_of(program: Program, node: Node) -> int:
    """Multiply-accumulates of one operator on the sample."""
    count = _MACS.get(node.target)
    return 0 if count is None else count(node, _sample_sizes(program))


def sample_shape(program: Program, node: Node) -> tuple[int, ...]:
    """A value's sizes on the sample."""
    return tuple(_shape(node, _sample_sizes(program)))


def _count(graph: Graph, bodies: Mapping[str, object], sizes: Sizes) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if (count := _MACS.get(node.target)) is not None:
            counts[op_name(node.target)] += count(node, sizes)
        read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        branches = [body for name in read if isinstance(body := bodies.get(name), GraphModule)]
        costs = [_count(b.graph, dict(b.named_children()), sizes) for b in branches]
        counts.update(max(costs, key=lambda c: sum(c.values()), default={}))
    return {name: count for name, count in counts.items() if count}


def _sample_sizes(program: Program) -> Sizes:
    """Symbol -> its size in the first sample; a size like ``2*n + 1`` is solved for ``n``."""
    sizes: Sizes = {}
    if not program.samples:
        return sizes
    for node, value in zip(program.placeholders, program.samples[0], strict=True):
        declared = node.meta.get("val")
        if isinstance(declared, SymInt):
            sizes[declared.node.expr] = sympy.Integer(int(value))
        if not isinstance(declared, Tensor) or not isinstance(value, Tensor):
            continue
        for symbolic, size in zip(declared.shape, value.shape, strict=True):
            if isinstance(symbolic, SymInt) and len(symbolic.node.expr.free_symbols) == 1:
                (symbol,) = symbolic.node.expr.free_symbols
                slope, rest = symbolic.node.expr.coeff(symbol), symbolic.node.expr.coeff(symbol, 0)
                if slope.is_Integer and rest.is_Integer and slope != 0:
                    sizes.setdefault(symbol, sympy.Integer((int(size) - rest) // slope))
    return sizes


def _shape(value: object, sizes: Sizes) -> list[int]:
    """A node's sizes as numbers; a size that only the data decides counts as its hint, else 1."""
    tensor = value.meta.get("val") if isinstance(value, Node) else value
    if not isinstance(tensor, Tensor):
        return []
    return [_number(size, sizes) for size in tensor.shape]


def _number(size: int | SymInt, sizes: Sizes) -> int:
    if isinstance(size, int):
        return size
    found = size.node.expr.xreplace(sizes)
    return int(found) if found.is_Integer else int(size.node.hint or 1)


def _linear(node: Node, sizes: Sizes) -> int:
    weight = _shape(node.args[1], sizes)
    return math.prod(_shape(node.args[0], sizes)) * (weight[0] if len(weight) == 2 else 1)


def _convolution(node: Node, sizes: Sizes) -> int:
    weight, out = _shape(node.args[1], sizes), _shape(node, sizes)
    if _is_transposed(node):
        # Each input element meets every tap of every output channel of its group.
        return math.prod(_shape(node.args[0], sizes)) * math.prod(weight[1:])
    return math.prod(out) * math.prod(weight[1:])


def _is_transposed(node: Node) -> bool:
    if node.target is aten.convolution.default:
        return bool(argument(node, "transposed"))
    return "transpose" in op_name(node.target)


def _matmul(node: Node, sizes: Sizes) -> int:
    left = _shape(node.args[0], sizes)
    return math.prod(_shape(node, sizes)) * (left[-1] if left else 1)


def _addmm(node: Node, sizes: Sizes) -> int:
    return math.prod(_shape(node, sizes)) * _shape(node.args[1], sizes)[-1]


def _attention(node: Node, sizes: Sizes) -> int:
    query, key, value = (_shape(a, sizes) for a in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(node: Node, sizes: Sizes) -> int:
    """Every weight matrix is used once per step and batch element."""
    steps_and_batch = math.prod(_shape(node.args[0], sizes)[:-1])
    weights = [_shape(w, sizes) for w in argument(node, "params")]
    return steps_and_batch * sum(math.prod(w) for w in weights if len(w) == 2)


def _cell(node: Node, sizes: Sizes) -> int:
    batch = math.prod(_shape(node.args[0], sizes)[:-1])
    weights = [_shape(argument(node, name), sizes) for name in ("w_ih", "w_hh")]
    return batch * sum(map(math.prod, weights))


def _bilinear(node: Node, sizes: Sizes) -> int:
    """Each output is a sum over pairs, and each pair takes the product of three numbers."""
    outputs, left, right = _shape(node.args[2], sizes)
    rows = math.prod(_shape(node.args[0], sizes)[:-1])
    return rows * outputs * (left * right + right)


def _addbmm(node: Node, sizes: Sizes) -> int:
    left, right = _shape(node.args[1], sizes), _shape(node.args[2], sizes)
    return math.prod(left) * right[-1]


def _tensordot(node: Node, sizes: Sizes) -> int:
    left = _shape(node.args[0], sizes)
    contracted: int = math.prod(left[dim] for dim in argument(node, "dims_self"))
    return math.prod(_shape(node, sizes)) * contracted


def _einsum(node: Node, sizes: Sizes) -> int:
    """Operands are contracted in pairs from the left; each pair costs its index space."""
    equation = str(node.args[0]).replace(" ", "")
    left, arrow, out = equation.partition("->")
    extents: dict[str, int] = {}
    operands = []
    for term, operand in zip(left.split(","), node.args[1], strict=True):  # type: ignore[arg-type]
        shape = _shape(operand, sizes)
        indices = _indices(term, len(shape))
        operands.append(set(indices))
        for index, size in zip(indices, shape, strict=True):
            extents[index] = max(extents.get(index, 1), size)
    ellipsis = {index for index in extents if index.startswith(".")}
    letters = left.replace("...", "").replace(",", "")
    kept = set(out) if arrow else {c for c in letters if letters.count(c) == 1}
    kept |= ellipsis if not arrow or "..." in out else set()
    total, current = 0, operands[0]
    for position, operand in enumerate(operands[1:], start=2):
        space = current | operand
        total += math.prod(extents[index] for index in space)
        current = space & kept.union(*operands[position:])
    return total


def _indices(term: str, rank: int) -> list[str]:
    """The index of every axis; those of an ellipsis are ``.1``, ``.2``, ... from the right."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]


_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
_CELLS = (
    aten.lstm_cell.default,
    aten.gru_cell.default,
    aten.rnn_tanh_cell.default,
    aten.rnn_relu_cell.default,
)
_MACS: dict[Any, Callable[[Node, Sizes], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _matmul,
    aten.vdot.default: _matmul,
    aten.inner.default: _matmul,
    aten._int_mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.addmv.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.addbmm.default: _addbmm,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
    aten.bilinear.default: _bilinear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
    **dict.fromkeys(_CELLS, _cell),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}
