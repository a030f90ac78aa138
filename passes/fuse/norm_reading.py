"""Read a norm that was written out: the quotient inwards, then the affine part outwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.passes.fuse.matching import (
    CASTS,
    dtype_of,
    is_widening,
    last_identity,
    normal_dims,
    only_user,
    origin,
    path,
    plain_sum,
    power_of,
    scalar_of,
    shape_of,
    sides,
    skip,
)

_VARIANCES = frozenset({aten.var.correction, aten.var.dim})


@dataclass
class Norm:
    """What was read so far, from the quotient inwards and then outwards to the affine part.

    ``dims``, ``keepdim`` and ``dtype`` are those of the mean square.
    """

    x: Node
    dims: Any
    keepdim: bool
    dtype: torch.dtype | None
    eps: float
    centered: bool
    seen: list[Node] = field(default_factory=list)
    weight: Node | None = None
    bias: Node | None = None


def quotients(node: Node) -> Iterator[tuple[Any, Any, float, list[Node]]]:
    """Ways to read ``numerator * root``: numerator, root, the root's power, nodes between."""
    if is_op(node, aten.div.Tensor):
        seen: list[Node] = []
        yield node.args[0], skip(argument(node, "other"), seen), 0.5, seen
        return
    for numerator, factor in sides(node):
        seen = []
        factor = skip(factor, seen)
        if power_of(factor) == -1.0:
            seen.append(factor)
            yield numerator, skip(factor.args[0], seen), 0.5, seen
        else:
            yield numerator, factor, -0.5, seen


def read(
    numerator: Any,  # noqa: ANN401 - a node, or a number
    root: Any,  # noqa: ANN401
    power: float,
    seen: list[Node],
    program: Program,
) -> Norm | str | None:
    """The norm, why it is none of ours, or None where it looks like none at all."""
    if plain_sum(root) and power == 0.5:
        inner = skip(root.args[0])
        deviation = is_op(inner, aten.std.correction, aten.std.dim) or power_of(inner) == 0.5
        if deviation and _mean_taken_off(numerator) is not None:
            return "eps is added to the standard deviation, outside of the root"
    if power_of(root) != power:
        return None
    seen.append(root)
    radicand, eps = skip(root.args[0], seen), 0.0
    if plain_sum(radicand):
        for value, number in sides(radicand):
            found = scalar_of(number, program)
            if found is not None:
                seen.append(radicand)
                radicand, eps = skip(value, seen), found
                break
    return _statistics(numerator, radicand, eps, seen)


def _statistics(numerator: Any, spread: Any, eps: float, seen: list[Node]) -> Norm | str | None:  # noqa: ANN401
    if is_op(spread, *_VARIANCES):
        mean = _mean_taken_off(numerator)
        if mean is None or origin(spread.args[0]) is not origin(mean.args[0]):
            return None
        biased = "unbiased" if spread.target is aten.var.dim else "correction"
        if argument(spread, biased) not in (0, False):
            return "the variance is unbiased (divided by n - 1)"
    elif is_op(spread, aten.mean.dim) and argument(spread, "dtype") is None:
        square = skip(spread.args[0], seen)
        if power_of(square) != 2.0 or origin(square.args[0]) is not origin(numerator):
            return None
        seen.append(square)
        mean = _mean_taken_off(numerator)
    else:
        return None
    seen.append(spread)
    keepdim, dtype = bool(argument(spread, "keepdim")), dtype_of(spread)
    if mean is None:
        return Norm(numerator, argument(spread, "dim"), keepdim, dtype, eps, False, seen)
    rank = len(shape_of(numerator) or ())
    if normal_dims(argument(mean, "dim"), rank) != normal_dims(argument(spread, "dim"), rank):
        return "mean and variance are taken over different dimensions"
    difference = skip(numerator, seen)
    seen.extend([difference, mean])
    keepdim = keepdim and bool(argument(mean, "keepdim"))
    return Norm(difference.args[0], argument(spread, "dim"), keepdim, dtype, eps, True, seen)


def _mean_taken_off(node: Any) -> Any:  # noqa: ANN401 - a node or None
    """The mean in ``x - mean(x)``; None for anything else."""
    node = skip(node)
    if not is_op(node, aten.sub.Tensor) or argument(node, "alpha") != 1:
        return None
    mean = skip(argument(node, "other"))
    if not is_op(mean, aten.mean.dim) or argument(mean, "dtype") is not None:
        return None
    return mean if origin(mean.args[0]) is origin(node.args[0]) else None


def grow(node: Node, norm: Norm, sizes: tuple[int | str, ...]) -> Node:
    """Take in a cast back, a weight and a bias that follow; the last node taken in."""
    end = _undo_cast(node, norm)
    for target in (aten.mul.Tensor, aten.add.Tensor):
        if target is aten.add.Tensor and not norm.centered:
            break
        last = last_identity(end)
        user = only_user(last)
        if user is None or not is_op(user, target):
            continue
        if target is aten.add.Tensor and not plain_sum(user):
            continue
        operand = next((b for a, b in sides(user) if a is last and b is not last), None)
        if shape_of(operand) != sizes or dtype_of(operand) != dtype_of(norm.x):
            continue
        if target is aten.mul.Tensor:
            norm.weight = operand
        else:
            norm.bias = operand
        norm.seen.extend(path(end, user))
        end = user
    return end


def _undo_cast(node: Node, norm: Norm) -> Node:
    """Where x was widened and the result is cast back, work on x itself."""
    widened = skip(norm.x)
    narrow = skip(widened.args[0]) if is_widening(widened) else norm.x
    last = last_identity(node)
    user = only_user(last)
    if user is None or not is_op(user, *CASTS) or dtype_of(user) != dtype_of(narrow):
        return node
    norm.x = narrow
    norm.seen.extend(path(node, user))
    return user
