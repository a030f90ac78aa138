"""The metrics of one value against its reference, and their sums over chunks and batches.

For a reference ``b`` and a value ``a`` of the same shape, over the elements that are compared:

    max_abs  = max|a - b|
    rel_l2   = ||a - b||_2 / ||b||_2
    sqnr_db  = 20 log10(||b||_2 / ||a - b||_2)       decibels; infinite where nothing differs
    cosine   = a . b / (||a||_2 ||b||_2)

Sums are accumulated in float64, over chunks, so that no copy of a value is made. Where the
reference is NaN, nothing is demanded. Where it is infinite, or at the edge of its type's range
(masks are filled with ``torch.finfo(dtype).min``; beside such values all others would look like
zeros), the value must be so too, with the same sign, and the element enters no sum. A value
that fails this, or is not finite where the reference is, has ``max_abs`` and ``rel_l2`` infinite,
``sqnr_db`` minus infinity and cosine 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import UsageError

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
class Sums:
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
        """Whether nothing differs at all."""
        return not self.broken and self.max_abs == 0.0

    def __iadd__(self, other: Sums) -> Sums:
        scale = min(self.scale, other.scale)  # powers of two: bringing to one scale is exact
        mine, theirs = (scale / self.scale) ** 2, (scale / other.scale) ** 2
        self.signal = self.signal * mine + other.signal * theirs
        self.noise = self.noise * mine + other.noise * theirs
        self.energy = self.energy * mine + other.energy * theirs
        self.dot = self.dot * mine + other.dot * theirs
        self.scale = scale
        self.max_abs = max(self.max_abs, other.max_abs)
        self.peak = max(self.peak, other.peak)
        self.broken |= other.broken
        return self

    def fidelity(self) -> Fidelity:
        """The metrics of what was gathered."""
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


def sums_of(b: object, a: object) -> Sums:
    """The sums of a value ``a`` of any kind against its reference, of the same kind and shape."""
    if isinstance(b, Tensor) and isinstance(a, Tensor):
        return tensor_sums(b, a)
    if _is_number(b):
        return tensor_sums(as_tensor(b), as_tensor(a))
    return Sums(broken=a != b)


class Accumulator:
    """The fidelity of one value over many batches: sums are added up, as if all were one tensor.

    Batches may differ in size. A value may be a tuple, as operators with several outputs give;
    each of its parts is measured by itself, and the worst of each metric counts.
    """

    def __init__(self) -> None:
        self._parts: list[Sums] = []
        self._batches = 0

    def add(self, reference: object, value: object) -> None:
        """Add one batch.

        Args:
            reference: a tensor, a number, a string or None, or a nest of tuples of them.
            value: likewise, of the same structure and shapes; dtypes may differ.

        Raises:
            UsageError: structures, kinds or shapes differ, so that nothing can be measured.
        """
        old, new = _leaves(reference), _leaves(value)
        if len(old) != len(new) or (self._batches and len(old) != len(self._parts)):
            wanted = len(self._parts) if self._batches else len(old)
            raise UsageError(f"a value has {len(new)} parts, and its reference {wanted}")
        if not self._batches:
            self._parts = [Sums() for _ in old]
        for position, (b, a) in enumerate(zip(old, new, strict=True)):
            problem = kind_problem(b, a) or shape_problem(b, a)
            if problem:
                part = f"part {position} of a value" if len(old) > 1 else "a value"
                raise UsageError(f"{part} {problem}")
            self._parts[position] += sums_of(b, a)
        self._batches += 1

    def fidelity(self) -> Fidelity:
        """The fidelity of all batches so far; of several parts, the worst of each metric.

        Raises:
            UsageError: there was no batch.
        """
        if not self._batches:
            raise UsageError("nothing was measured: there was no batch")
        found = worst([part.fidelity() for part in self._parts])
        return found or Fidelity(math.inf, 1.0, 0.0, 0.0, equal=True)


def _leaves(value: object) -> list[object]:
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def kind_problem(b: object, a: object) -> str | None:
    """Say that one is a tensor and the other is not, and the like."""
    same = isinstance(a, Tensor) if isinstance(b, Tensor) else type(a) is type(b)
    if same:
        return None
    return f"is a {type(a).__name__} where the reference is a {type(b).__name__}"


def shape_problem(b: object, a: object) -> str | None:
    """Say that two tensors differ in shape."""
    if isinstance(b, Tensor) and isinstance(a, Tensor) and a.shape != b.shape:
        return f"has shape {list(a.shape)} where the reference has {list(b.shape)}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))


def as_tensor(value: Any) -> Tensor:  # noqa: ANN401 - a Python number
    """A Python number as a tensor that loses nothing of it."""
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype)


def chunks(b: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk two tensors of one shape in flat pieces of at most ``_CHUNK`` elements, on the CPU."""
    if b.numel() <= _CHUNK:
        yield b.detach().cpu().reshape(-1), a.detach().cpu().reshape(-1)
        return
    axis = max(range(b.dim()), key=lambda d: b.shape[d])
    rows = max(1, _CHUNK * b.shape[axis] // b.numel())
    for x, y in zip(b.split(rows, axis), a.split(rows, axis), strict=True):
        yield from chunks(x, y)


def tensor_sums(b: Tensor, a: Tensor) -> Sums:
    """The sums of a tensor ``a`` against its reference.

    Raises:
        UsageError: their shapes differ.
    """
    problem = shape_problem(b, a)
    if problem:
        raise UsageError(f"the output {problem}")
    if b.is_complex() or a.is_complex():
        b, a = (torch.view_as_real(t if t.is_complex() else t.to(torch.complex64)) for t in (b, a))
    edge = 0.99 * torch.finfo(b.dtype).max if b.is_floating_point() else math.inf
    sums = Sums()
    if torch.float64 in (b.dtype, a.dtype):
        sums.scale = _power_of_two(b, a)
    exact = not (b.is_floating_point() or a.is_floating_point())
    for x, y in chunks(b, a):
        _add(sums, x, y, edge)
        if exact and sums.max_abs == 0.0 and not torch.equal(x, y):
            sums.max_abs, sums.noise = 1.0, 1.0  # 64-bit integers that are one number in float64
    return sums


def _power_of_two(b: Tensor, a: Tensor) -> float:
    """A scale at which the squares of two float64 tensors stay finite."""
    largest = 0.0
    for pair in chunks(b, a):
        for values in pair:
            finite = values[values.isfinite()].abs().to(torch.float64)
            largest = max(largest, float(finite.max()) if finite.numel() else 0.0)
    return math.ldexp(1.0, -math.frexp(largest)[1]) if largest > 1e100 else 1.0


def _add(sums: Sums, x: Tensor, y: Tensor, edge: float) -> None:
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
