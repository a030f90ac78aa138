"""Numeric comparison of outputs: every metric is defined here, and only here.

For a reference ``b`` and an output ``a`` of the same shape, over the elements that are compared:

    max_abs  = max|a - b|
    rel_l2   = ||a - b||_2 / ||b||_2
    sqnr_db  = 20 log10(||b||_2 / ||a - b||_2)       decibels; infinite where nothing differs
    cosine   = a . b / (||a||_2 ||b||_2)
    equal    : max|a - b| / max(1e-6, max|b|) <= the bound of the dtype

Sums are accumulated in float64, over chunks, so that no copy of an output is made. Where the
reference is NaN, nothing is demanded. Where it is infinite, or at the edge of its type's range
(masks are filled with ``torch.finfo(dtype).min``; beside such values all others would look like
zeros), the output must be so too, with the same sign, and the element enters no sum. An output
that fails this, or is not finite where the reference is, has ``max_abs`` and ``rel_l2`` infinite,
``sqnr_db`` minus infinity and cosine 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.ir.tensortype import dtype_name

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

_CHUNK = 1 << 18  # elements; 2 MiB in float64, so that a chunk stays in cache


@dataclass(frozen=True)
class Fidelity:
    """How near outputs are to their reference; of several outputs, the worst of each metric.

    Attributes:
        sqnr_db: signal to noise in decibels; infinite where nothing differs.
        cosine: cosine similarity, -1 to 1.
        max_abs: largest absolute difference.
        rel_l2: relative L2 error, as a ratio.
        equal: whether nothing differs at all.
    """

    sqnr_db: float
    cosine: float
    max_abs: float
    rel_l2: float
    equal: bool

    def to_dict(self) -> dict[str, float | bool | None]:
        """For JSON, which has no infinities: they are None; ``equal`` tells the good one."""
        values: dict[str, float | bool | None] = {
            name: value if math.isfinite(value) else None
            for name, value in (
                ("sqnr_db", self.sqnr_db),
                ("cosine", self.cosine),
                ("max_abs", self.max_abs),
                ("rel_l2", self.rel_l2),
            )
        }
        return {**values, "equal": self.equal}

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        return (
            f"SQNR {self.sqnr_db:.1f} dB, cosine {self.cosine:.6f}, max abs {self.max_abs:.3g}, "
            f"relative L2 {self.rel_l2:.3g}"
        )


@dataclass
class _Sums:
    """What one walk over two tensors gathers; ``scale`` keeps float64 squares from overflowing."""

    scale: float = 1.0
    signal: float = 0.0  # sum b^2
    noise: float = 0.0  # sum (a - b)^2
    energy: float = 0.0  # sum a^2
    dot: float = 0.0  # sum a b
    max_abs: float = 0.0
    peak: float = 0.0  # max|b|
    broken: bool = False  # not finite where it must be, or the reverse

    @property
    def equal(self) -> bool:
        return not self.broken and self.max_abs == 0.0

    def fidelity(self) -> Fidelity:
        if self.broken:
            return Fidelity(-math.inf, 0.0, math.inf, math.inf, equal=False)
        if self.equal:
            return Fidelity(math.inf, 1.0, 0.0, 0.0, equal=True)
        signal, noise = math.sqrt(self.signal), math.sqrt(self.noise)
        norms = signal * math.sqrt(self.energy)
        return Fidelity(
            sqnr_db=_decibels(signal, noise),
            cosine=max(-1.0, min(1.0, self.dot / norms)) if norms else 0.0,
            max_abs=self.max_abs,
            rel_l2=noise / signal if signal else math.inf,
            equal=False,
        )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 20.0 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def sqnr_db(reference: Tensor, output: Tensor) -> float:
    """Signal to quantization noise ratio in decibels; infinite where nothing differs."""
    return _sums(reference, output).fidelity().sqnr_db


def cosine(reference: Tensor, output: Tensor) -> float:
    """Cosine similarity; 1 where nothing differs, 0 where one side alone is zero."""
    return _sums(reference, output).fidelity().cosine


def max_abs(reference: Tensor, output: Tensor) -> float:
    """Largest absolute difference."""
    return _sums(reference, output).fidelity().max_abs


def rel_l2(reference: Tensor, output: Tensor) -> float:
    """``||output - reference|| / ||reference||``; infinite where only the reference is zero."""
    return _sums(reference, output).fidelity().rel_l2


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
        problem = _kind_problem(b, a) or _shape_problem(b, a)
        if problem:
            raise UsageError(f"output {position} {problem}")
        found.append(_measure_one(b, a))
    return worst(found) or Fidelity(math.inf, 1.0, 0.0, 0.0, equal=True)


def worst(found: Sequence[Fidelity]) -> Fidelity | None:
    """The worst of each metric; None of nothing."""
    if not found:
        return None
    return Fidelity(
        sqnr_db=min(f.sqnr_db for f in found),
        cosine=min(f.cosine for f in found),
        max_abs=max(f.max_abs for f in found),
        rel_l2=max(f.rel_l2 for f in found),
        equal=all(f.equal for f in found),
    )


def _measure_one(b: object, a: object) -> Fidelity:
    if isinstance(b, Tensor) and isinstance(a, Tensor):
        return _sums(b, a).fidelity()
    if _is_number(b):
        return _sums(_as_tensor(b), _as_tensor(a)).fidelity()
    return _Sums(broken=a != b).fidelity()


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
    problem = _kind_problem(b, a) or _shape_problem(b, a)
    if problem:
        return problem
    if not isinstance(b, Tensor) or not isinstance(a, Tensor):
        if not isinstance(b, float):
            return None if a == b else f"is {a!r} where the reference is {b!r}"
        b, a = _as_tensor(b), _as_tensor(a)
    elif a.dtype != b.dtype:
        return f"is {dtype_name(a.dtype)} where the reference is {dtype_name(b.dtype)}"
    if not (b.is_floating_point() or b.is_complex()):
        count = _count_unequal(b, a)
        return f"differs in {count} of {b.numel()} {dtype_name(b.dtype)} values" if count else None
    sums = _sums(b, a)
    if sums.broken:
        return "is not finite where the reference is, or finite where the reference is not"
    scale = max(SMALLEST_SCALE, sums.peak)
    if sums.max_abs <= bound * scale:
        return None
    return (
        f"differs by {sums.max_abs:.3g}, which is {sums.max_abs / scale:.3g} of its scale "
        f"{scale:.3g}; the bound for {dtype_name(b.dtype)} is {bound:g}"
    )


def _kind_problem(b: object, a: object) -> str | None:
    """Say that one is a tensor and the other is not, and the like."""
    same = isinstance(a, Tensor) if isinstance(b, Tensor) else type(a) is type(b)
    if same:
        return None
    return f"is a {type(a).__name__} where the reference is a {type(b).__name__}"


def _shape_problem(b: object, a: object) -> str | None:
    if isinstance(b, Tensor) and isinstance(a, Tensor) and a.shape != b.shape:
        return f"has shape {list(a.shape)} where the reference has {list(b.shape)}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def _as_tensor(value: Any) -> Tensor:  # noqa: ANN401 - a Python number
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype)


def _count_unequal(b: Tensor, a: Tensor) -> int:
    return sum(int((x != y).sum()) for x, y in _chunks(b, a))


def _chunks(b: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk two tensors of one shape in flat pieces of at most ``_CHUNK`` elements, on the CPU."""
    if b.numel() <= _CHUNK:
        yield b.detach().cpu().reshape(-1), a.detach().cpu().reshape(-1)
        return
    axis = max(range(b.dim()), key=lambda d: b.shape[d])
    rows = max(1, _CHUNK * b.shape[axis] // b.numel())
    for x, y in zip(b.split(rows, axis), a.split(rows, axis), strict=True):
        yield from _chunks(x, y)


def _sums(b: Tensor, a: Tensor) -> _Sums:
    problem = _shape_problem(b, a)
    if problem:
        raise UsageError(f"the output {problem}")
    if b.is_complex() or a.is_complex():
        b, a = (torch.view_as_real(t if t.is_complex() else t.to(torch.complex64)) for t in (b, a))
    edge = 0.99 * torch.finfo(b.dtype).max if b.is_floating_point() else math.inf
    sums = _Sums()
    if torch.float64 in (b.dtype, a.dtype):
        sums.scale = _power_of_two(b, a)
    exact = not (b.is_floating_point() or a.is_floating_point())
    for x, y in _chunks(b, a):
        _add(sums, x, y, edge)
        if exact and sums.max_abs == 0.0 and not torch.equal(x, y):
            sums.max_abs, sums.noise = 1.0, 1.0  # 64-bit integers that are one number in float64
    return sums


def _power_of_two(b: Tensor, a: Tensor) -> float:
    """A scale at which the squares of two float64 tensors stay finite."""
    largest = 0.0
    for pair in _chunks(b, a):
        for values in pair:
            finite = values[values.isfinite()].abs().to(torch.float64)
            largest = max(largest, float(finite.max()) if finite.numel() else 0.0)
    return math.ldexp(1.0, -math.frexp(largest)[1]) if largest > 1e100 else 1.0


def _add(sums: _Sums, x: Tensor, y: Tensor, edge: float) -> None:
    """Add one chunk: ``x`` of the reference, ``y`` of the output."""
    x, y = x.to(torch.float64), y.to(torch.float64)
    usual = x.abs() < edge
    if not bool(usual.all()):
        far = x.abs() >= edge  # infinite, or the largest of the type; NaN is neither
        kept = y[far]
        same = (kept.sign() == x[far].sign()) & (kept.abs() >= edge)
        sums.broken |= not bool((same & (kept.isinf() == x[far].isinf())).all())
        x, y = x[usual], y[usual]
    if not x.numel():
        return
    error = y - x
    largest = float(error.abs().max())
    if not bool(y.isfinite().all()):
        sums.broken = True
        return
    sums.max_abs = max(sums.max_abs, largest)
    sums.peak = max(sums.peak, float(x.abs().max()))
    if sums.scale != 1.0:
        x, y, error = x * sums.scale, y * sums.scale, error * sums.scale
    sums.signal += float(x @ x)
    sums.noise += float(error @ error)
    sums.energy += float(y @ y)
    sums.dot += float(x @ y)
