"""Integer tensors that are straight lines over their coordinates, found without computing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.passes.cleanup._affine import Affine, combine, decide
from planish.passes.cleanup._reshapes import COPIES, PERMUTES, RESHAPES, permutation
from planish.passes.cleanup._sizes import bound, same_size, shape_of, static, tensor_of
from planish.passes.cleanup._uniform import FILLS, uniform

aten = torch.ops.aten

# Narrower ones wrap at sizes that tensors do have; floats round.
_INTEGERS = (torch.int64, torch.int32)
# Lines that stay inside keep within 32 bits for every axis a tensor can have in practice.
_LARGEST_START, _LARGEST_STEP = 1 << 30, 1 << 10


Known = dict[Node, Affine]
Transfer = Callable[[Node, list[Any], Known], Affine | None]


def affine_values(program: Program) -> Known:
    """Every tensor of the program that is such a line, in one walk."""
    known: Known = {}
    for node in program.graph.nodes:
        tensor = tensor_of(node)
        if tensor is None or node.op not in ("get_attr", "call_function"):
            continue
        if tensor.dtype not in (*_INTEGERS, torch.bool):
            continue
        found: Affine | None = None
        if node.op == "get_attr" or node.target in FILLS:
            number = uniform(node, program)
            found = None if number is None else Affine(int(number), (0,) * tensor.dim())
        elif node.target in _TRANSFERS:
            found = _TRANSFERS[node.target](node, bound(node), known)
        if found is not None and _is_small(found) and (found.is_uniform or not _is_bool(tensor)):
            known[node] = _settled(found, tensor)
    return known


def _is_bool(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bool


def _is_small(line: Affine) -> bool:
    steps = all(abs(step) <= _LARGEST_STEP for step in line.steps)
    return steps and abs(line.start) <= _LARGEST_START


def _settled(found: Affine, tensor: Tensor) -> Affine:
    """Without steps along axes of size 1, which no coordinate but 0 ever takes."""
    sizes = zip(found.steps, tensor.shape, strict=True)
    return Affine(found.start, tuple(0 if static(size) == 1 else step for step, size in sizes))


def _operand(value: object, known: Known) -> Affine | None:
    if isinstance(value, Node):
        return known.get(value)
    return Affine(int(value)) if isinstance(value, (bool, int)) else None


def _arange(node: Node, args: list[Any], known: Known) -> Affine | None:
    has_start = node.target is not aten.arange.default
    start = args[0] if has_start else 0
    step = args[2] if node.target is aten.arange.start_step else 1
    return Affine(start, (step,)) if isinstance(start, int) and isinstance(step, int) else None


def _reshaped(node: Node, args: list[Any], known: Known) -> Affine | None:
    """Axes of size 1 come and go; a uniform tensor takes any shape."""
    line = known.get(args[0])
    if line is None:
        return None
    after = shape_of(node)
    if line.is_uniform:
        return Affine(line.start, (0,) * len(after))
    before = shape_of(args[0])
    long = [(n, step) for n, step in zip(before, line.steps, strict=True) if static(n) != 1]
    kept = [n for n in after if static(n) != 1]
    if len(kept) != len(long) or not all(map(same_size, kept, [n for n, _ in long])):
        return None
    steps = iter(step for _, step in long)
    return Affine(line.start, tuple(0 if static(n) == 1 else next(steps) for n in after))


def _expanded(node: Node, args: list[Any], known: Known) -> Affine | None:
    line = known.get(args[0])
    if line is None:
        return None
    return Affine(line.start, (0,) * (len(shape_of(node)) - len(line.steps)) + line.steps)


def _permuted(node: Node, args: list[Any], known: Known) -> Affine | None:
    line = known.get(args[0])
    return line and Affine(line.start, tuple(line.steps[axis] for axis in permutation(node)))


def _same(node: Node, args: list[Any], known: Known) -> Affine | None:
    line = known.get(args[0])
    if line is None or not _is_bool(node.meta["val"]):
        return line
    return Affine(int(line.start != 0), line.steps)


def _sliced(node: Node, args: list[Any], known: Known) -> Affine | None:
    source, dim, start, _, step = args
    line = known.get(source)
    if line is None or line.is_uniform:
        return line
    first = 0 if start is None else start
    if not isinstance(first, int) or first < 0 or not isinstance(step, int):
        return None
    # A slice past the end is empty, and every line is true of nothing.
    steps = list(line.steps)
    steps[dim] *= step
    return Affine(line.start + first * line.steps[dim], tuple(steps))


def _sum(sign: int) -> Transfer:
    def transfer(node: Node, args: list[Any], known: Known) -> Affine | None:
        a, b = _operand(args[0], known), _operand(args[1], known)
        if a is None or b is None or args[2] != 1 or _is_bool(node.meta["val"]):
            return None
        return combine(a, b, sign)

    return transfer


def _compared(node: Node, args: list[Any], known: Known) -> Affine | None:
    a, b = _operand(args[0], known), _operand(args[1], known)
    if a is None or b is None:
        return None
    answer = decide(op_name(node.target).split(".")[1], a, b)
    return None if answer is None else Affine(int(answer), (0,) * len(shape_of(node)))


def _logic(node: Node, args: list[Any], known: Known) -> Affine | None:
    a, b = _operand(args[0], known), _operand(args[1], known)
    if a is None or b is None or not _is_bool(node.meta["val"]):
        return None
    both = "and" in op_name(node.target)
    value = (a.start and b.start) if both else (a.start or b.start)
    return Affine(int(bool(value)), (0,) * len(shape_of(node)))


def _difference(node: Node, args: list[Any], known: Known) -> Affine | None:
    """``x[1:] - x[:-1]`` of a line is its step; what is prepended must continue it backwards."""
    source, times, dim, before, after = args
    line = known.get(source)
    if line is None or times != 1 or after is not None or _is_bool(node.meta["val"]):
        return None
    step = line.steps[dim]
    if before is not None:
        earlier = known.get(before)
        if earlier is None or static(shape_of(before)[dim]) != 1:
            return None
        others = [list(v.steps) for v in (line, earlier)]
        for steps in others:
            steps[dim] = 0
        if others[0] != others[1] or earlier.start != line.start - step:
            return None
    return Affine(step, (0,) * len(line.steps))


def _picked(node: Node, args: list[Any], known: Known) -> Affine | None:
    """Elements of a uniform tensor, whichever they are."""
    line = known.get(args[0])
    is_one = line is not None and line.is_uniform
    return Affine(line.start, (0,) * len(shape_of(node))) if line and is_one else None


def _accumulated(node: Node, args: list[Any], known: Known) -> Affine | None:
    line = known.get(args[0])
    is_zero = line is not None and line.is_uniform and line.start == 0
    return Affine(0, (0,) * len(shape_of(node))) if is_zero else None


_COMPARISONS = [
    getattr(getattr(aten, name), kind)
    for name in ("lt", "le", "gt", "ge", "eq", "ne")
    for kind in ("Scalar", "Tensor")
]
_TRANSFERS: dict[Any, Transfer] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys(PERMUTES, _permuted),
    **dict.fromkeys((*COPIES, aten.to.dtype, aten.to.device, aten.to.dtype_layout), _same),
    **dict.fromkeys(_COMPARISONS, _compared),
    **dict.fromkeys((aten.index.Tensor, aten.gather.default, aten.index_select.default), _picked),
    **dict.fromkeys((aten.__and__.Tensor, aten.bitwise_and.Tensor), _logic),
    **dict.fromkeys((aten.logical_and.default, aten.logical_or.default), _logic),
    **dict.fromkeys((aten.__or__.Tensor, aten.bitwise_or.Tensor), _logic),
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.add.Tensor: _sum(1),
    aten.sub.Tensor: _sum(-1),
    aten.diff.default: _difference,
    aten.cumsum.default: _accumulated,
}
