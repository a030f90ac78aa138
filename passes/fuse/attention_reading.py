"""Read attention that was written out, from the product with the values back to q, k and masks."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch.fx import Node

from planish.ir.ops import ELEMENTWISE_UNARY, argument, aten, is_op, op_name
from planish.ir.program import Program
from planish.passes.fuse.matching import (
    CASTS,
    SAME_VALUES,
    VIEWS,
    dtype_of,
    is_widening,
    plain_sum,
    scalar_of,
    scaled,
    shape_of,
    sides,
    skip,
)

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
_FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_WHERES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_MAX_STEPS = 12


class Mask(NamedTuple):
    """What is added to the scores, or which of them are kept or dropped.

    Attributes:
        node: the float to add, or the condition.
        kind: what it does.
        fill: the value that dropped scores are set to; 0 for "add".
        scores: shape of the scores at that place; views may stand between two masks.
    """

    node: Node
    kind: Literal["add", "keep", "drop"]
    fill: float
    scores: tuple[int | str, ...]


@dataclass
class Attention:
    """``softmax(scale * query @ key + masks) @ value``; ``key`` as the product reads it."""

    value: Any
    weights: Any = None
    query: Any = None
    key: Any = None
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)  # from the softmax inwards
    seen: list[Node] = field(default_factory=list)


def read(root: Node, program: Program) -> Attention | str | None:
    """Read a product as attention.

    Returns:
        What was read; why it is attention of another kind; None for another product.
    """
    found = Attention(root.args[1])
    softmax = _softmax(root.args[0], found)
    if isinstance(softmax, str) or softmax is None:
        return softmax
    shape = shape_of(softmax) or ()
    found.weights = softmax
    if not leads_to_product(softmax.args[0]):
        return None
    if not shape or argument(softmax, "dim") % len(shape) != len(shape) - 1:
        return "the softmax is not over the keys"
    return _scores(softmax.args[0], found, program) or found


def _softmax(node: Any, found: Attention) -> Node | str | None:  # noqa: ANN401
    """The softmax behind the weights, past casts and views."""
    for _ in range(_MAX_STEPS):
        node = skip(node, found.seen)
        if not isinstance(node, Node):
            return None
        if is_op(node, *SOFTMAXES):
            found.seen.append(node)
            return node
        if not is_op(node, *CASTS) and not _folds(node):
            break
        found.seen.append(node)
        node = node.args[0]
    operands = [skip(n) for n in node.all_input_nodes]
    weights = [n for n in operands if is_op(n, *SOFTMAXES) and leads_to_product(n.args[0])]
    if weights and node.op == "call_function" and shape_of(node) == shape_of(weights[0]):
        return f"the weights pass through {op_name(node.target)} after the softmax"
    return None


def _scores(node: Any, found: Attention, program: Program) -> str | None:  # noqa: ANN401
    """Walk from the softmax to the product of q and k; what stands in the way, if anything."""
    for _ in range(_MAX_STEPS):
        node = skip(node, found.seen)
        found.seen.append(node)
        factor = scaled(node, program)
        if is_op(node, *PRODUCTS):
            found.query, found.key = node.args
            return None
        if is_op(node, aten.baddbmm.default):
            return _added_product(node, found)
        if is_widening(node) or _folds(node):
            node = node.args[0]
        elif factor is not None:
            found.scale *= factor.factor
            node = factor.value
        else:
            masked = _masked(node, program)
            if isinstance(masked, str):
                return masked
            node, mask = masked
            if found.scale != 1.0:
                return "the scores are scaled after the mask"
            found.masks.append(mask)
    return "the scores pass through too many operators"


def _added_product(node: Node, found: Attention) -> str | None:
    """``baddbmm``: ``beta * mask + alpha * q @ k``."""
    mask, found.query, found.key = node.args[:3]
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    if beta != 0:
        if found.scale != 1.0:
            return "the scores are scaled after the mask"
        if beta != 1:
            return "the mask of baddbmm is scaled"
        assert isinstance(mask, Node)
        found.masks.append(Mask(mask, "add", 0.0, shape_of(node) or ()))
    found.scale *= float(alpha)
    return None


def _masked(node: Node, program: Program) -> tuple[Any, Mask] | str:
    """Split a masked score into the score and the mask; the reason where that cannot be done."""
    shape = shape_of(node) or ()
    if is_op(node, aten.add.Tensor):
        if not plain_sum(node):
            return "the mask is added with a factor"
        both = [(s, m) for s, m in sides(node) if leads_to_product(s) and isinstance(m, Node)]
        whole = [(s, m) for s, m in both if shape_of(s) == shape]
        if not whole:
            return "a mask is larger than the scores"
        score, mask = whole[0]
        return score, Mask(mask, "add", 0.0, shape)
    kind: Literal["keep", "drop"] = "drop"
    if is_op(node, *_FILLS):
        score, condition, value = node.args[0], argument(node, "mask"), argument(node, "value")
    elif is_op(node, *_WHERES):
        condition, score, value = node.args[:3]
        kind = "keep"
        if scalar_of(score, program) is not None:
            score, value, kind = value, score, "drop"
    else:
        return f"the scores pass through {op_name(node.target)}"
    fill = scalar_of(value, program)
    if fill is None or not isinstance(condition, Node):
        return "masked scores are replaced by another tensor"
    if shape_of(score) != shape:
        return "a mask is larger than the scores"
    return score, Mask(condition, kind, fill, shape)


def leads_to_product(node: Any) -> bool:  # noqa: ANN401
    """Whether a few operators that scores may pass through end at a product of two tensors."""
    queue, looked = deque([node]), 0
    while queue and looked < 2 * _MAX_STEPS:
        node = queue.popleft()
        looked += 1
        if is_op(node, *PRODUCTS, aten.baddbmm.default):
            return True
        if is_op(node, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, *_WHERES):
            queue.extend(n for n in node.args if isinstance(n, Node))
        elif is_op(node, *SAME_VALUES, *VIEWS, *_FILLS, *ELEMENTWISE_UNARY):
            queue.append(node.args[0])
    return False


def _folds(node: Any) -> bool:  # noqa: ANN401
    """Whether a view only merges or splits leading dimensions."""
    if not is_op(node, *VIEWS):
        return False
    before, after = shape_of(node.args[0]), shape_of(node)
    return bool(before and after and min(len(before), len(after)) >= 2) and (
        before[-2:] == after[-2:]  # type: ignore[index]
    )


def unfolded(node: Any) -> Any:  # noqa: ANN401 - a node or None
    """The 4-D tensor that a 3-D one ``[B * H, L, E]`` is a view of; None where there is none."""
    node = skip(node)
    if not _folds(node) or len(shape_of(node) or ()) != 3:
        return None
    return node.args[0] if len(shape_of(node.args[0]) or ()) == 4 else None


class Operand(NamedTuple):
    """A query or key, whether the product reads it transposed, and a factor taken off it."""

    node: Any
    transposed: bool
    factor: float


def plain(node: Any, program: Program) -> Operand:  # noqa: ANN401
    """Take transposes of the last two dimensions and multiplications by a number off."""
    transposed, factor = False, 1.0
    for _ in range(_MAX_STEPS):
        node = skip(node)
        number = scaled(node, program)
        if swaps_last(node):
            transposed, node = not transposed, node.args[0]
        elif number is not None and math.isfinite(number.factor) and len(node.users) == 1:
            factor, node = factor * number.factor, number.value
        else:
            break
    return Operand(node, transposed, factor)


def swaps_last(node: Any) -> bool:  # noqa: ANN401
    """Whether a node swaps the last two dimensions and leaves the others."""
    rank = len(shape_of(node) or ())
    if is_op(node, aten.mT.default):
        return True
    if is_op(node, aten.permute.default):
        dims = [d % rank for d in argument(node, "dims")]
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    if is_op(node, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        axes: tuple[Any, ...] = node.args[1:]
        return rank >= 2 and {d % rank for d in axes} == {rank - 1, rank - 2}
    return False


def same_dtype(found: Attention, root: Node) -> bool:
    """Whether q, k, v, float masks and the result have one dtype."""
    floats = [m.node for m in found.masks if m.kind == "add"]
    nodes = [found.query, found.key, found.value, root, *floats]
    return len({dtype_of(node) for node in nodes}) == 1
