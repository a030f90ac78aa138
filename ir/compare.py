"""Numeric comparison of outputs: what counts as equal, and by how much they differ.

For a reference ``b`` and an output ``a`` of the same shape, over the elements that are compared:

    max_abs  = max|a - b|
    rel_l2   = ||a - b||_2 / ||b||_2
    sqnr_db  = 20 log10(||b||_2 / ||a - b||_2)       decibels; infinite where nothing differs
    cosine   = a . b / (||a||_2 ||b||_2)
    equal    : max|a - b| / max(1e-6, max|b|) <= the bound of the dtype

How sums are gathered, and what infinities and NaN do, says ``planish.ir.fidelity``, which holds the
metrics themselves; everybody else takes them from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import UsageError
from planish.ir.fidelity import (
    Accumulator,
    Fidelity,
    as_tensor,
    chunks,
    kind_problem,
    shape_problem,
    sums_of,
    tensor_sums,
    worst,
)
from planish.ir.program import Program
from planish.ir.tensortype import dtype_name

__all__ = [
    "BOUNDS",
    "SMALLEST_SCALE",
    "Accumulator",
    "Fidelity",
    "bound_of",
    "bounds_of",
    "cosine",
    "difference",
    "max_abs",
    "measure",
    "rel_l2",
    "sqnr_db",
    "worst",
]

# The bound of "equal" for a whole model. Types that are not here (integers, bool, 8-bit floats)
# are compared exactly.
BOUNDS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,  # about ten roundings of 2**-10
    torch.bfloat16: 8e-2,  # about ten roundings of 2**-7
    torch.complex128: 1e-10,
    torch.complex64: 1e-4,
}

# A reference smaller than this everywhere is compared absolutely.
SMALLEST_SCALE = 1e-6


def sqnr_db(reference: Tensor, output: Tensor) -> float:
    """Signal to quantization noise ratio in decibels; infinite where nothing differs."""
    return tensor_sums(reference, output).fidelity().sqnr_db


def cosine(reference: Tensor, output: Tensor) -> float:
    """Cosine similarity; 1 where nothing differs, 0 where one side alone is zero."""
    return tensor_sums(reference, output).fidelity().cosine


def max_abs(reference: Tensor, output: Tensor) -> float:
    """Largest absolute difference."""
    return tensor_sums(reference, output).fidelity().max_abs


def rel_l2(reference: Tensor, output: Tensor) -> float:
    """``||output - reference|| / ||reference||``; infinite where only the reference is zero."""
    return tensor_sums(reference, output).fidelity().rel_l2


def measure(reference_outputs: Sequence[Any], outputs: Sequence[Any]) -> Fidelity:
    """Measure flat outputs against a reference.

    Args:
        reference_outputs: tensors, Python numbers, strings or None.
        outputs: likewise, of the same count and shapes; dtypes may differ.

    Returns:
        The worst of each metric over the outputs; ``equal`` where all are.

    Raises:
        UsageError: the counts, kinds or shapes differ, so that nothing can be measured.
    """
    if len(reference_outputs) != len(outputs):
        raise UsageError(f"{len(outputs)} outputs, and a reference with {len(reference_outputs)}")
    found = []
    for position, (b, a) in enumerate(zip(reference_outputs, outputs, strict=True)):
        problem = kind_problem(b, a) or shape_problem(b, a)
        if problem:
            raise UsageError(f"output {position} {problem}")
        found.append(sums_of(b, a).fidelity())
    return worst(found) or Fidelity(math.inf, 1.0, 0.0, 0.0, equal=True)


def difference(
    reference_outputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    names: Sequence[str] = (),
    bounds: Sequence[float] | None = None,
) -> str | None:
    """Say how outputs differ from a reference by more than the bound of their dtype.

    Equal means: same count, shapes and dtypes; finite where the reference is;
    ``max|a - b| / max(1e-6, max|b|)`` at most the bound. Integers and bools are compared exactly.

    Args:
        reference_outputs: tensors, Python numbers, strings or None.
        outputs: likewise.
        names: of the outputs, for the sentence.
        bounds: one per output, from ``bounds_of``; None takes ``BOUNDS`` by dtype.

    Returns:
        A sentence that names the first output that differs, or None where all are equal.
    """
    if len(reference_outputs) != len(outputs):
        return f"there are {len(outputs)} outputs where the reference has {len(reference_outputs)}"
    for position, (b, a) in enumerate(zip(reference_outputs, outputs, strict=True)):
        bound = bounds[position] if bounds is not None else bound_of(b)
        problem = _difference_of_one(b, a, bound)
        if problem:
            name = f" ({names[position]})" if position < len(names) else ""
            return f"output {position}{name} {problem}"
    return None


def bound_of(value: object) -> float:
    """The bound of "equal" for one output; 0 for what is compared exactly.

    A Python float is as good as the float32 tensor it was read from.
    """
    if isinstance(value, Tensor):
        return BOUNDS.get(value.dtype, 0.0)
    return BOUNDS[torch.float32] if isinstance(value, (float, torch.SymFloat)) else 0.0


def bounds_of(program: Program) -> tuple[float, ...]:
    """The bound of each output of a reference program: that of the coarsest type on its way.

    The logits of a bfloat16 model are no more exact for being returned as float32. Take the bounds
    from the program before any pass, so that none can loosen them.
    """
    worst: dict[Node, float] = {}
    for node in program.graph.nodes:
        own = _leaf_bounds(node.meta.get("val"))
        worst[node] = max([own, *(worst[n] for n in node.all_input_nodes)])
    result = []
    for value in program.results:
        own = bound_of(value.meta.get("val") if isinstance(value, Node) else value)
        result.append(max(own, worst.get(value, 0.0)) if own else 0.0)
    return tuple(result)


def _leaf_bounds(value: object) -> float:
    if isinstance(value, (tuple, list)):
        return max((_leaf_bounds(v) for v in value), default=0.0)
    return bound_of(value)


def _difference_of_one(b: object, a: object, bound: float) -> str | None:
    problem = kind_problem(b, a) or shape_problem(b, a)
    if problem:
        return problem
    if not isinstance(b, Tensor) or not isinstance(a, Tensor):
        if not isinstance(b, float):
            return None if a == b else f"is {a!r} where the reference is {b!r}"
        b, a = as_tensor(b), as_tensor(a)
    elif a.dtype != b.dtype:
        return f"is {dtype_name(a.dtype)} where the reference is {dtype_name(b.dtype)}"
    if not (b.is_floating_point() or b.is_complex()):
        count = _count_unequal(b, a)
        return f"differs in {count} of {b.numel()} {dtype_name(b.dtype)} values" if count else None
    sums = tensor_sums(b, a)
    if sums.broken:
        return "is not finite where the reference is, or finite where the reference is not"
    scale = max(SMALLEST_SCALE, sums.peak)
    if sums.max_abs <= bound * scale:
        return None
    return (
        f"differs by {sums.max_abs:.3g}, which is {sums.max_abs / scale:.3g} of its scale "
        f"{scale:.3g}; the bound for {dtype_name(b.dtype)} is {bound:g}"
    )


def _count_unequal(b: Tensor, a: Tensor) -> int:
    return sum(int((x != y).sum()) for x, y in chunks(b, a))
